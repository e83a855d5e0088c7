"""Scores: sums over samples that add up over micro-batches and ranks, and the buffers that collect them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from balanceopt.distributed import Group, sum_over_ranks
from balanceopt.functional import significance_from_sums
from balanceopt.modality import unwrap

if TYPE_CHECKING:
    from balanceopt.monitor._forward import Pass
    from balanceopt.monitor._monitor import ModalityMonitor
    from balanceopt.monitor._scorer import Scorer


@dataclass(frozen=True)
class Scores:
    """Sums over the samples seen since the last step, M modalities, C classes, all float32.

    Attributes:
        score: `(M,)` probability of the true class from each modality alone.
        count: `(M,)` samples in which the modality was present and the label valid.
        cross_entropy: `(M,)` uni-modal cross-entropy, nats.
        feature_entropy: `(M,)` entropy of softmax over the features, nats; 0 where no consumer asked for it.
        label_counts: `(C,)` how often each class occurred.
    """

    score: Tensor
    count: Tensor
    cross_entropy: Tensor
    feature_entropy: Tensor
    label_counts: Tensor

    def __add__(self, other: Scores) -> Scores:
        return Scores(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def mean_score(self) -> Tensor:
        """`(M,)` mean score of each modality over the samples in which it was present; 0 where in none."""
        return self.score / self.count.clamp(min=1)

    @property
    def present(self) -> Tensor:
        """bool `(M,)`, modalities with at least one sample."""
        return self.count > 0

    @property
    def usable(self) -> Tensor:
        """bool `(M,)`, the modalities that can be compared: present, with another one, scores finite and not all 0."""
        comparable = (self.present.sum() > 1) & torch.isfinite(self.score).all() & (self.score > 0).any()
        return self.present & comparable

    @property
    def mean_cross_entropy(self) -> Tensor:
        """`(M,)` mean uni-modal cross-entropy, nats, over the samples that have the modality; 0 where none."""
        return self.cross_entropy / self.count.clamp(min=1)

    def significance(self, offset: float) -> Tensor:
        """`(M,)`, the mutual-information rate (functional.modal_significance)."""
        return significance_from_sums(
            self.cross_entropy, self.feature_entropy, self.label_counts, self.count, offset
        )

    def over_ranks(self, group: Group) -> Scores:
        """The same sums over all ranks, in one collective."""
        return Scores.from_flat(sum_over_ranks(self.flat(), group), self.score.numel())

    def flat(self) -> Tensor:
        """All of it as one vector `(4 M + C,)`."""
        return torch.cat([getattr(self, f.name) for f in fields(self)])

    @classmethod
    def from_flat(cls, flat: Tensor, modalities: int) -> Scores:
        """The reverse of `flat`."""
        m = modalities
        return cls(*flat.split([m, m, m, m, flat.numel() - 4 * m]))

    @classmethod
    def zeros(cls, modalities: int, classes: int, device: torch.device) -> Scores:
        """No sample seen."""
        sizes = (modalities, modalities, modalities, modalities, classes)
        return cls(*(torch.zeros(n, dtype=torch.float32, device=device) for n in sizes))


class ScoreBuffer:
    """Passes that backward has reached since the consumer last took them.

    Several consumers of one monitor have one each, so that none takes the other's scores; each pass is scored once.
    """

    def __init__(
        self,
        monitor: ModalityMonitor,
        scorer: Scorer,
        *,
        needs_entropy: bool,
        steps: bool,
    ) -> None:
        """Sum what `scorer` makes of the passes of `monitor`; options as in `ModalityMonitor.scores`."""
        self.needs_entropy = needs_entropy
        self.steps = steps
        self._monitor = monitor  # a consumer keeps it alive
        self._scorer = scorer
        self._sums: Scores | None = None
        self._latest: Pass | None = None

    def add(self, done: Pass) -> None:
        """Note a pass. It is scored when the next one comes or the sums are taken: labels may still arrive."""
        self._fold()
        self._latest = done

    def take(self) -> Scores | None:
        """The sums over the passes since the last take or discard, and start anew; None where no pass had any."""
        self._fold()
        sums, self._sums = self._sums, None
        return sums

    def peek(self) -> Scores | None:
        """The sums that the next take would give, as far as they are of passes since the last one; they stay."""
        self._fold()
        return self._sums

    def discard(self) -> None:
        """Forget what was not taken."""
        if self._latest is not None:
            self._latest.closed = True
        if self._latest is not None or self._sums is not None:
            self._scorer.seen.note("thrown")
        self._sums, self._latest = None, None

    def empty(self, device: torch.device) -> Scores:
        """Sums over no sample, of the shape that other ranks have."""
        head = unwrap(self._monitor.head) if isinstance(self._monitor.head, nn.Module) else None
        outputs = self._scorer.classes or getattr(head, "out_features", None) or 1
        return Scores.zeros(len(self._monitor.modalities), max(outputs, 2), device)

    def uncalled(self) -> list[str]:
        """Modalities whose encoders no hook has seen a call of."""
        seen = self._scorer.seen.total
        return [name for name in self._monitor.modalities if seen[f"missing:{name}"] == seen["forwards"]]

    def remove(self) -> None:
        """Take no pass any more. May be called twice."""
        self.discard()
        self._scorer.buffers.discard(self)

    def _fold(self) -> None:
        done, self._latest = self._latest, None
        if done is None:
            return
        sums = self._scorer.settled(done)
        if sums is not None:
            self._sums = sums if self._sums is None else self._sums + sums

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy is of the monitor's copy, and empty: a pass holds a graph, which can't be copied.
        return _buffer_of, (self._monitor, self.needs_entropy, self.steps)


def _buffer_of(monitor: ModalityMonitor, needs_entropy: bool, steps: bool) -> ScoreBuffer:
    return monitor.scores(needs_entropy=needs_entropy, steps=steps)
