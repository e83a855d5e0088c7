"""Scores as sums over samples, micro-batches and ranks, and the buffers that accumulate scores."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
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
    """Sums over samples, float32, for M modalities and C classes.

    Attributes:
        score: `(M,)` sum of the true class's probability in [0, 1] from each modality alone.
        count: `(M,)` number of samples in which the modality was present and the label valid.
        cross_entropy: `(M,)` uni-modal cross-entropy, nats.
        feature_entropy: `(M,)` entropy of the softmax over the features, nats; 0 unless a consumer needs entropies.
        label_counts: `(C,)` number of samples of each class.
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
        """`(M,)` mean uni-modal cross-entropy, nats, over the samples with the modality; 0 without such samples."""
        return self.cross_entropy / self.count.clamp(min=1)

    def significance(self, offset: float) -> Tensor:
        """Return the mutual-information rate `(M,)` (functional.modal_significance)."""
        return significance_from_sums(
            self.cross_entropy, self.feature_entropy, self.label_counts, self.count, offset
        )

    def over_ranks(self, group: Group) -> Scores:
        """Sum the scores over all ranks, in one collective."""
        return Scores.from_flat(sum_over_ranks(self.flat(), group), self.score.numel())

    def flat(self) -> Tensor:
        """Concatenate all sums to one vector `(4 M + C,)`."""
        return torch.cat([getattr(self, f.name) for f in fields(self)])

    @classmethod
    def from_flat(cls, flat: Tensor, modalities: int) -> Scores:
        """Build scores from a vector that `flat` returned."""
        m = modalities
        return cls(*flat.split([m, m, m, m, flat.numel() - 4 * m]))

    @classmethod
    def zeros(cls, modalities: int, classes: int, device: torch.device) -> Scores:
        """Build scores over no samples."""
        sizes = (modalities, modalities, modalities, modalities, classes)
        return cls(*(torch.zeros(n, dtype=torch.float32, device=device) for n in sizes))


class ScoreBuffer:
    """Accumulated scores of the passes that backward has reached since a consumer last took the scores.

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
        """Start empty, for the scores that `scorer` makes for `monitor`; options as in `ModalityMonitor.scores`."""
        self.needs_entropy = needs_entropy
        self.steps = steps
        self._monitor = monitor  # a strong reference: a consumer keeps the monitor alive
        self._scorer = scorer
        self._sums: Scores | None = None
        self._latest: Pass | None = None

    def add(self, done: Pass) -> None:
        """Add a pass, to be scored at the next `add`, `take` or `peek`, since labels may still arrive."""
        self._fold()
        self._latest = done

    def take(self) -> Scores | None:
        """Return the scores since the last take or discard, and clear the buffer; None without scored passes."""
        self._fold()
        sums, self._sums = self._sums, None
        return sums

    def peek(self) -> Scores | None:
        """Return the scores that the next take would return, without clearing the buffer."""
        self._fold()
        return self._sums

    def discard(self) -> None:
        """Discard the scores that were not taken."""
        if self._latest is not None:
            self._latest.closed = True
        if self._latest is not None or self._sums is not None:
            self._scorer.seen.note("thrown")
        self._sums, self._latest = None, None

    def empty(self, device: torch.device) -> Scores:
        """Return scores over no samples, in the shapes of the other ranks' scores."""
        head = unwrap(self._monitor.head) if isinstance(self._monitor.head, nn.Module) else None
        outputs = self._scorer.classes or getattr(head, "out_features", None) or 1
        return Scores.zeros(len(self._monitor.modalities), max(outputs, 2), device)

    def uncalled(self) -> list[str]:
        """Return the modalities whose encoder no hook has seen called."""
        seen = self._scorer.seen.total
        return [name for name in self._monitor.modalities if seen[f"missing:{name}"] == seen["forwards"]]

    def remove(self) -> None:
        """Detach the buffer from the monitor. May be called twice."""
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
        # A copy is empty and belongs to the monitor's copy, since a pass holds a graph, which can't be copied.
        return _buffer_of, (self._monitor, self.needs_entropy, self.steps)


def _buffer_of(monitor: ModalityMonitor, needs_entropy: bool, steps: bool) -> ScoreBuffer:
    return monitor.scores(needs_entropy=needs_entropy, steps=steps)
