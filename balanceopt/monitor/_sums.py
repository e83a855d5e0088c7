"""What the monitor accumulates: sums over samples that add up over micro-batches and ranks."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from balanceopt.distributed import Group, sum_over_ranks
from balanceopt.functional import significance_from_sums


@dataclass(frozen=True)
class ModalitySums:
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

    def __add__(self, other: ModalitySums) -> ModalitySums:
        return ModalitySums(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

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

    def over_ranks(self, group: Group) -> ModalitySums:
        """The same sums over all ranks, in one collective."""
        return ModalitySums.from_flat(sum_over_ranks(self.flat(), group), self.score.numel())

    def flat(self) -> Tensor:
        """All of it as one vector `(4 M + C,)`."""
        return torch.cat([getattr(self, f.name) for f in fields(self)])

    @classmethod
    def from_flat(cls, flat: Tensor, modalities: int) -> ModalitySums:
        """The reverse of `flat`."""
        m = modalities
        return cls(*flat.split([m, m, m, m, flat.numel() - 4 * m]))

    @classmethod
    def zeros(cls, modalities: int, classes: int, device: torch.device) -> ModalitySums:
        """No sample seen."""
        sizes = (modalities, modalities, modalities, modalities, classes)
        return cls(*(torch.zeros(n, dtype=torch.float32, device=device) for n in sizes))
