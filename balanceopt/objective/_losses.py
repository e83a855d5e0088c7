"""Cross-entropy of one modality's logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from balanceopt.monitor._settle import two_classes

Loss = Callable[[Tensor, Tensor], Tensor]


def as_target(labels: Tensor, logits: Tensor, name: str) -> Tensor:
    """Class indices `(B,)`, or class probabilities `(B, C)`, on the logits' device.

    Raises:
        ValueError: if they are not one for each row of the logits.
    """
    target = torch.as_tensor(labels).to(logits.device)
    soft = target.is_floating_point() and target.dim() == 2 and target.shape[1] > 1
    if not soft:
        # A single logit: binary labels, often kept as floats for BCEWithLogitsLoss.
        target = target.flatten().long() if logits.shape[-1] == 1 else target
        target = target.flatten() if target.dim() == 2 and target.shape[1] == 1 else target
    if target.shape[:1] != logits.shape[:1] or (target.dim() != 1 and not soft):
        raise ValueError(
            f"`labels` should have one entry for each of the {len(logits)} samples of {name!r}. "
            f"Found shape {tuple(target.shape)}."
        )
    return target


def mean_cross_entropy(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Mean over the rows whose label counts; 0 where none does."""
    soft = target.is_floating_point()
    total = row_cross_entropy(logits, target, ignore_index).sum()
    count = torch.ones_like(target[:, 0]) if soft else target != ignore_index
    return total / count.sum().clamp(min=1)


def widened(x: Tensor) -> Tensor:
    """In float32 or wider."""
    return x if x.dtype == torch.float64 else x.float()


def row_cross_entropy(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """`(B,)`; 0 where the label does not count."""
    if target.is_floating_point():
        return F.cross_entropy(widened(logits), target, reduction="none")
    pair = widened(two_classes(logits))
    return F.cross_entropy(pair, target, reduction="none", ignore_index=ignore_index)


def loss_of(loss: Loss, logits: Tensor, labels: Any) -> Tensor:
    """The user's loss of uni-modal logits; a module's hooks wait for the loop's own calls, and are passed by."""
    return loss.forward(logits, labels) if isinstance(loss, nn.Module) else loss(logits, labels)
