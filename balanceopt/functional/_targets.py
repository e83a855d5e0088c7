"""Checked labels: class indices or class probabilities, with rows to ignore."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from balanceopt._deferred import on_host
from balanceopt._options import check_count, check_tensor

# Tolerance of a row's sum of probabilities, because half precision rounds each of them.
_SUM_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Targets:
    """Checked labels of a batch.

    Attributes:
        valid: bool `(B,)`, False for rows to ignore.
        index: int64 `(B,)` class indices, 0 where not valid; None for soft labels.
        probabilities: `(B, C)` float32 class probabilities; None for class indices.
        num_classes: number of classes C.
    """

    valid: Tensor
    index: Tensor | None
    probabilities: Tensor | None
    num_classes: int

    def pick(self, values: Tensor) -> Tensor:
        """Take `values` `(..., B, C)` at each row's label, or the mean by soft label: `(..., B)`, 0 where not valid."""
        if self.index is not None:
            index = self.index.expand(values.shape[:-1]).unsqueeze(-1)
            picked = values.gather(-1, index).squeeze(-1)
        else:
            assert self.probabilities is not None
            # 0 * -inf is NaN, so classes of probability 0 must not count.
            picked = torch.where(self.probabilities > 0, self.probabilities * values, 0).sum(-1)
        return torch.where(self.valid, picked, 0)

    def class_counts(self) -> Tensor:
        """Count the valid rows of each class, float32 `(C,)`."""
        if self.index is None:
            assert self.probabilities is not None
            return torch.where(self.valid.unsqueeze(-1), self.probabilities, 0).sum(0)
        counts = torch.zeros(self.num_classes, dtype=torch.float32, device=self.index.device)
        return counts.index_add_(0, self.index, self.valid.to(counts.dtype))


def as_targets(labels: Tensor, num_classes: int, ignore_index: int = -100) -> Targets:
    """Check labels `(B,)` (class indices) or `(B, C)` (class probabilities).

    Integers of any dtype are indices; a row of probabilities that are all 0 is ignored.

    Raises:
        TypeError: if `labels` is not a tensor.
        ValueError: for another shape or dtype, and for CPU labels outside [0, C) or that are not probabilities;
            other devices would have to synchronise.
    """
    check_tensor("labels", labels, "(B,) or (B, C)")
    check_count("ignore_index", ignore_index, at_least=None)
    if labels.dim() == 2 and labels.is_floating_point():
        if labels.shape[1] != num_classes:
            raise ValueError(
                f"soft `labels` should have one column for each of the {num_classes} classes. "
                f"Found shape {tuple(labels.shape)}."
            )
        probabilities = labels.detach().float()
        _refuse_improbable(probabilities, labels.dtype)
        return Targets(probabilities.sum(1) > 0, None, probabilities, num_classes)
    if labels.dim() != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            "`labels` should be class indices of shape (B,) or class probabilities of shape (B, C). "
            f"Found shape {tuple(labels.shape)} and dtype {labels.dtype}."
        )
    index = labels.long()  # before the comparison, in which -100 would be 156 among 8-bit labels
    valid = index != ignore_index
    index = torch.where(valid, index, 0)
    seen = on_host(index)
    if seen is not None and seen.size and not (seen.min() >= 0 and seen.max() < num_classes):
        raise ValueError(
            f"`labels` should lie in [0, {num_classes}) or equal ignore_index={ignore_index}. "
            f"Found labels from {seen.min()} to {seen.max()}."
        )
    return Targets(valid, index, None, num_classes)


def _refuse_improbable(probabilities: Tensor, given: torch.dtype) -> None:
    seen = on_host(probabilities)
    if seen is None or not seen.size:
        return
    sums = seen.sum(1)
    tolerance = max(_SUM_TOLERANCE, 2 * torch.finfo(given).eps)
    # The comparison is negated because NaN, for which it is false, should raise.
    if not (seen.min() >= 0 and (np.minimum(abs(sums - 1), sums) <= tolerance).all()):
        raise ValueError(
            "soft `labels` should be probabilities, none negative, with a sum of 1 in each row (or 0, for rows that do "
            f"not count). Found entries from {seen.min():g} to {seen.max():g}, and sums from {sums.min():g} to "
            f"{sums.max():g}. Several labels a sample and regression need their own loss, as `loss=` of the monitor."
        )
