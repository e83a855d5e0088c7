"""G-Blending's rule: how much the loss of each head should weigh."""

from __future__ import annotations

import torch
from torch import Tensor

from balanceopt._options import check_number, check_tensor
from balanceopt.functional._dtypes import narrowed, wide


@torch.no_grad()
def blend_weights(
    train_before: Tensor, train_after: Tensor, val_before: Tensor, val_after: Tensor, *, floor: float = 0.1
) -> Tensor:
    r"""Compute the weight w of each head's loss by its ratio of generalisation to overfitting.

    $$w_k = \frac{1}{Z} \frac{\max(G_k, 0)}{\max(|O_k|,\ \epsilon \max_j |O_j|)^2}$$

    with the gain \(G = V_{\text{before}} - V_{\text{after}}\) of the validation loss V over some epochs, and the growth
    \(O = (V - T)_{\text{after}} - (V - T)_{\text{before}}\) of its distance to the training loss T.

    Args:
        train_before: `(K,)` mean training losses of the heads when the epochs began.
        train_after: `(K,)` the same, when they ended.
        val_before: `(K,)` mean validation losses when the epochs began.
        val_after: `(K,)` the same, when they ended.
        floor: the least |O| as a share of the largest one, in [0.001, 1], because 1/O^2 explodes near 0; at 1 the
            weights are proportional to the gains.

    Returns:
        `(K,)` in [0, 1], which sum to 1, with 0 for a head that gained nothing; all 0 where no head gained. NaN for all
        where a loss is not finite.

    Raises:
        ValueError: if the losses differ in shape, or `floor` is outside its range.
        TypeError: if losses are no tensors.

    Example:
        >>> before = torch.tensor([1.6, 1.6])
        >>> blend_weights(before, torch.tensor([0.6, 1.0]), before, torch.tensor([1.0, 1.2]))
        tensor([0.2727, 0.7273])

    Reference:
        Wang, Tran, Feiszli, What Makes Training Multi-Modal Classification Networks Hard?, CVPR 2020,
        Proposition 1 and Algorithm 1; the floor, and 0 for heads that lose, are this package's.
    """
    named = {
        "train_before": train_before,
        "train_after": train_after,
        "val_before": val_before,
        "val_after": val_after,
    }
    for name, losses in named.items():
        check_tensor(name, losses, "(K,)", dims=(1,), empty=False)
        if losses.shape != train_before.shape:
            raise ValueError(
                f"`{name}` should be of the shape of `train_before`, {tuple(train_before.shape)}. Found shape "
                f"{tuple(losses.shape)}."
            )
    check_number("floor", floor, at_least=0.001, at_most=1)
    t0, t1, v0, v1 = (wide(losses) for losses in named.values())
    gain = v0 - v1
    overfitting = ((v1 - t1) - (v0 - t0)).abs()
    # By logarithms, in which neither the squares nor the quotients of small losses leave the range of float32.
    scale = overfitting.max()
    relative = torch.where(scale > 0, overfitting / scale, 1).clamp(min=floor)
    weights = (gain.clamp(min=0).log() - 2 * relative.log()).softmax(0)
    usable = torch.isfinite(torch.stack([t0, t1, v0, v1])).all()
    weights = torch.where((gain > 0).any(), weights, 0)
    return narrowed(torch.where(usable, weights, torch.nan), train_before)
