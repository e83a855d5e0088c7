"""Scores of a step, the sums that scores are made of, and the buffers that accumulate sums over passes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from balanceopt._deferred import on_host
from balanceopt.distributed import Group, active_group, concatenate_over_ranks, sum_over_ranks
from balanceopt.functional import KeptPredictions, Loss, as_loss, significance_from_baseline
from balanceopt.modality import unwrap

if TYPE_CHECKING:
    from balanceopt.monitor._forward import Pass
    from balanceopt.monitor._monitor import ModalityMonitor
    from balanceopt.monitor._scorer import Scorer

_CROSS_ENTROPY = as_loss(None)


@dataclass(frozen=True)
class Scores:
    """Sums over samples, float32 or wider, for M modalities. A sample counts once, whatever its number of positions.

    Attributes:
        score: `(M,)` sum of the samples' scores in [0, 1]: for cross-entropy the true class's probability from each
            modality alone.
        count: `(M,)` number of samples in which the modality was present and the target valid.
        cross_entropy: `(M,)` uni-modal losses: nats for cross-entropies, multiples of the best constant prediction's
            loss for losses without a scale of their own.
        feature_entropy: `(M,)` entropy of the softmax over the features, nats; 0 unless a consumer needs entropies.
        parts: sums from which `loss` makes the best constant prediction's loss; for cross-entropy `(C,)`, the number of
            samples of each class.
        loss: the monitor's loss.
    """

    score: Tensor
    count: Tensor
    cross_entropy: Tensor
    feature_entropy: Tensor
    parts: Tensor
    loss: Loss = _CROSS_ENTROPY

    @property
    def mean_score(self) -> Tensor:
        """`(M,)` mean score of each modality over the samples with the modality; 0 without such samples."""
        return self.score / self.count.clamp(min=1)

    @property
    def present(self) -> Tensor:
        """Flags `(M,)` of the modalities with at least one sample."""
        return self.count > 0

    @cached_property
    def usable(self) -> Tensor:
        """Flags `(M,)` of the modalities that can be compared: at least two present, scores finite and not all 0."""
        comparable = (self.present.sum() > 1) & torch.isfinite(self.score).all() & (self.score > 0).any()
        return self.present & comparable

    @property
    def mean_cross_entropy(self) -> Tensor:
        """`(M,)` mean uni-modal loss over the samples with the modality; 0 without such samples."""
        return self.cross_entropy / self.count.clamp(min=1)

    @property
    def label_counts(self) -> Tensor:
        """`(C,)` number of samples of each class, for cross-entropy; empty for other losses."""
        return self.parts if self.loss.has_classes else self.parts[:0]

    @property
    def baseline(self) -> Tensor:
        """Loss of the best constant prediction, 0-d, in the unit of `cross_entropy`."""
        return torch.ones_like(self.score[0]) if self.loss.scale_free else self.loss.baseline(self.parts)

    def significance(self, offset: float) -> Tensor:
        """Return the mutual-information rate `(M,)` (functional.significance_from_baseline)."""
        return significance_from_baseline(
            self.cross_entropy, self.feature_entropy, self.baseline, self.count, offset
        )

    @classmethod
    def zeros(cls, modalities: int, classes: int, device: torch.device) -> Scores:
        """Build scores over no samples."""
        nothing, parts = (torch.zeros(n, dtype=torch.float32, device=device) for n in (modalities, classes))
        return cls(nothing, nothing, nothing, nothing, parts)


@dataclass(frozen=True)
class Sums:
    """Sums of passes under a loss in nats, which add over micro-batches and ranks; fields as in `Scores`."""

    score: Tensor
    count: Tensor
    cross_entropy: Tensor
    feature_entropy: Tensor
    parts: Tensor
    loss: Loss

    def __add__(self, other: Sums) -> Sums:
        score, count, cross_entropy, feature_entropy, parts = (
            a + b for a, b in zip(self.tensors, other.tensors, strict=True)
        )
        return Sums(score, count, cross_entropy, feature_entropy, parts, self.loss)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The sums, without the loss."""
        return self.score, self.count, self.cross_entropy, self.feature_entropy, self.parts

    def scores(self, group: Group) -> Scores:
        """Return the scores over all ranks, in one collective."""
        if active_group(group) is None:
            return Scores(*self.tensors, loss=self.loss)
        flat = sum_over_ranks(torch.cat(self.tensors), group)
        score, count, cross_entropy, feature_entropy, parts = flat.split([len(x) for x in self.tensors])
        return Scores(score, count, cross_entropy, feature_entropy, parts, self.loss)


@dataclass(frozen=True)
class Kept:
    """Predictions of passes under a loss whose scale is a statistic of the whole step (regression).

    Attributes:
        predictions: uni-modal predictions and targets of each micro-batch.
        entropy: feature entropies `(M, B)` of each micro-batch.
        loss: the monitor's loss.
    """

    predictions: KeptPredictions
    entropy: tuple[Tensor, ...]
    loss: Loss

    def __add__(self, other: Kept) -> Kept:
        return Kept(self.predictions + other.predictions, self.entropy + other.entropy, self.loss)

    @torch.no_grad()
    def scores(self, group: Group) -> Scores:
        """Return the scores over all ranks, in a collective for each statistic of the step and one for the sums."""
        step = self.predictions.losses(
            self.loss, partial(sum_over_ranks, group=group), partial(_concatenated, group=group)
        )
        entropy = torch.where(step.counted, torch.cat(self.entropy, 1), 0)
        parts = torch.stack([x.float() for x in (step.score, step.counted, step.in_units, entropy)])
        score, count, cross_entropy, feature_entropy = sum_over_ranks(parts.sum(-1), group)
        return Scores(score, count, cross_entropy, feature_entropy, score.new_empty(0), self.loss)


def _concatenated(rows: Tensor, group: Group) -> Tensor:
    """Concatenate rows of all ranks, each with another number of rows."""
    ranks = active_group(group)
    if ranks is None:
        return rows
    counts = torch.zeros(ranks.size(), dtype=torch.int64, device=rows.device)
    counts[ranks.rank()] = len(rows)
    return concatenate_over_ranks(rows, sum_over_ranks(counts, group).tolist(), group)


class ScoreBuffer:
    """Accumulated sums of the passes that backward has reached since a consumer last took the scores.

    Each consumer of a monitor has a buffer, so that none takes another's scores; each pass is scored once.
    """

    def __init__(
        self,
        monitor: ModalityMonitor,
        scorer: Scorer,
        *,
        needs_entropy: bool,
        steps: bool,
    ) -> None:
        """Start empty, for the sums that `scorer` makes for `monitor`; options as in `ModalityMonitor.scores`."""
        self.needs_entropy = needs_entropy
        self.steps = steps
        self._monitor = monitor  # a strong reference: a consumer keeps the monitor alive
        self._scorer = scorer
        self._sums: Sums | Kept | None = None
        self._latest: Pass | None = None

    def add(self, done: Pass) -> None:
        """Add a pass, to be scored at the next `add`, `take` or `peek`, since labels may still arrive."""
        self._fold()
        self._latest = done

    def take(self) -> Scores | None:
        """Return the scores of all ranks since the last take or discard, and clear the buffer; a collective.

        None where no rank has scored passes (on an accelerator with several ranks: scores over no samples).
        """
        self._fold()
        sums, self._sums = self._sums, None
        if active_group(self._monitor.group) is None:
            return None if sums is None else sums.scores(False)
        scores = (self._nothing() if sums is None else sums).scores(self._monitor.group)
        host = on_host(scores.count)
        return None if host is not None and not host.any() else scores

    def take_local(self) -> Scores | None:
        """Return this rank's scores since the last take or discard, and clear the buffer; no collective."""
        scores, self._sums = self.peek(), None
        return scores

    def peek(self) -> Scores | None:
        """Return this rank's scores since the last take or discard, without clearing the buffer."""
        self._fold()
        return None if self._sums is None else self._sums.scores(False)

    @property
    def is_empty(self) -> bool:
        """Whether no scored pass waits for the next take."""
        self._fold()
        return self._sums is None

    def discard(self) -> None:
        """Discard the scores that were not taken."""
        if self._latest is not None:
            self._latest.closed = True
        if self._latest is not None or self._sums is not None:
            self._scorer.seen.note("thrown")
        self._sums, self._latest = None, None

    def uncalled(self) -> list[str]:
        """Return the modalities whose encoder no hook has seen called."""
        seen = self._scorer.seen.total
        return [name for name in self._monitor.modalities if seen[f"missing:{name}"] == seen["forwards"]]

    def remove(self) -> None:
        """Detach the buffer from the monitor. May be called twice."""
        self.discard()
        self._scorer.buffers.discard(self)

    def _nothing(self) -> Sums | Kept:
        outputs = self._scorer.classes or _outputs_of(self._monitor.head) or 1
        return self._scorer.nothing(outputs, next(self._monitor.model.parameters()).device)

    def _fold(self) -> None:
        done, self._latest = self._latest, None
        if done is None:
            return
        sums = self._scorer.settled(done)
        if sums is not None:
            self._sums = sums if self._sums is None else self._sums + sums  # type: ignore[operator]

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy is empty and belongs to the monitor's copy, since a pass holds a graph, which can't be copied.
        return _buffer_of, (self._monitor, self.needs_entropy, self.steps)


def _outputs_of(head: nn.Module | Mapping[str, nn.Module] | None) -> int | None:
    """Return the number of outputs of the linear layer that a head, or each modality's head, ends with; else None."""
    last = next(iter(head.values())) if isinstance(head, Mapping) else head
    last = None if last is None else unwrap(last)
    while isinstance(last, nn.Sequential) and len(last):
        last = unwrap(last[-1])
    return getattr(last, "out_features", None)


def _buffer_of(monitor: ModalityMonitor, needs_entropy: bool, steps: bool) -> ScoreBuffer:
    return monitor.scores(needs_entropy=needs_entropy, steps=steps)
