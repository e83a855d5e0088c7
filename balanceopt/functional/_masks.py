"""How many units of a layer to update, and how much each matters."""

from __future__ import annotations

import math
from typing import overload

import torch
from torch import Tensor


def _wide(values: Tensor) -> Tensor:
    """At least float32, for arithmetic that half precision would spoil."""
    return values if values.dtype == torch.float64 else values.float()


def check_vector(name: str, values: Tensor) -> None:
    """Raise for anything but a real vector."""
    if values.dim() != 1 or values.is_complex():
        raise ValueError(
            f"`{name}` should be a real vector. Found shape {tuple(values.shape)}, dtype {values.dtype}."
        )


@torch.no_grad()
def keep_ratio(
    significance: Tensor,
    temperature: float = 0.2,
    clamp: tuple[float, float] = (0.1, 0.9),
    present: Tensor | None = None,
) -> Tensor:
    r"""Share of each modality's units to update: the less significant modality gets more.

    $$r^m = \mathrm{clamp}\left(1 - \mathrm{softmax}_m(u / T)\right)$$

    where $u$ is the modal significance and $T$ the temperature. A significance that is not positive or not
    finite says nothing about the balance, so every modality then gets the balanced $(M - 1) / M$, not clamped.

    Args:
        significance: `(M,)`, the modal significance of each modality.
        temperature: T > 0; small values follow the significance more sharply.
        clamp: lower and upper limit of the ratios.
        present: bool `(M,)`; the others are left out, M counts only these. None for all.

    Returns:
        `(M,)`, in the dtype of `significance`; 1 for a single modality and for those left out.

    Raises:
        ValueError: if `significance` is not a vector with an entry, `temperature` is not positive, or `clamp`
            is not a pair `0 <= low <= high <= 1`.

    Example:
        >>> keep_ratio(torch.tensor([0.34, 0.08]))
        tensor([0.2142, 0.7858])
        >>> keep_ratio(torch.tensor([0.34, -0.08]))
        tensor([0.5000, 0.5000])

    Reference:
        AMSS, adaptive mask subnetworks considering modal significance: the authors' published code
        (`AMSS/train_test.py`), with (M - 1) / M in place of its 0.5 for M > 2.
    """
    check_vector("significance", significance)
    if significance.numel() == 0:
        raise ValueError("`significance` should hold one value per modality. Found none.")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"`temperature` should be positive. Found {temperature}.")
    low, high = clamp
    if not 0 <= low <= high <= 1:
        raise ValueError(f"`clamp` should be a pair (low, high) with 0 <= low <= high <= 1. Found {clamp}.")
    u = _wide(significance)
    here = torch.ones_like(u, dtype=torch.bool) if present is None else present
    modalities = here.sum().to(u.dtype)
    others = torch.where(here, u, -math.inf)
    # Shifted before the division: a large significance over a small temperature stays finite.
    ratio = (1 - torch.softmax((others - others.amax()) / temperature, 0)).clamp(low, high)
    usable = (torch.isfinite(u) & (u > 0) | ~here).all()
    ratio = torch.where(usable, ratio, (modalities - 1) / modalities)
    ratio = torch.where(here & (modalities > 1), ratio, 1)
    return ratio.to(significance.dtype) if significance.is_floating_point() else ratio


@overload
def kept_units(n: int, ratio: float) -> int: ...
@overload
def kept_units(n: int | Tensor, ratio: Tensor) -> Tensor: ...
@torch.no_grad()
def kept_units(n: int | Tensor, ratio: float | Tensor) -> int | Tensor:
    r"""Number of units that a keep ratio stands for.

    $$k = \min(n, \max(1, \lceil n r - 10^{-9} \rceil))$$

    Args:
        n: number of units, or a tensor of them that broadcasts with `ratio`.
        ratio: keep ratio; a float, or a tensor of any shape, for which the device is not waited for. In a
            tensor narrower than float64 the rounding of the ratio itself is taken off as well: 10 units at
            0.1 are one unit, although 0.1 in float32 is a little more.

    Returns:
        An int, or an int64 tensor.

    Example:
        >>> kept_units(100, 0.07)
        7
        >>> kept_units(10, torch.tensor([0.0, 0.1, 0.31]))
        tensor([1, 1, 4])
    """
    if isinstance(ratio, Tensor):
        product = ratio.double() * n
        rounding = torch.finfo(ratio.dtype).eps if ratio.dtype != torch.float64 else 0.0
        count = (product * (1 - rounding) - 1e-9).ceil().long().clamp(min=1)
        return count.minimum(torch.as_tensor(n, device=count.device))
    if isinstance(n, Tensor):
        raise TypeError("`ratio` should be a tensor when `n` is one. Found a float.")
    return min(n, max(1, math.ceil(n * ratio - 1e-9)))


@torch.no_grad()
def unit_importance(grad: Tensor, unit_dim: int = 0) -> Tensor:
    r"""Importance of each unit of a parameter: the diagonal empirical Fisher information, summed.

    $$F_j = \sum_{\theta \in \text{unit } j} \left(\partial L / \partial \theta\right)^2$$

    Args:
        grad: gradient of any floating dtype, at least 1-D; a unit is a slice along `unit_dim`.
        unit_dim: dimension of the units: 0 for the filters of a convolution and the rows of a linear layer,
            1 for a transposed convolution.

    Returns:
        `(n,)` in float32, or in float64 for a float64 gradient.

    Raises:
        ValueError: if `grad` is not floating, has no dimension, or has no dimension `unit_dim`.

    Example:
        >>> unit_importance(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        tensor([25.,  1.])
        >>> unit_importance(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), unit_dim=1)
        tensor([ 9., 17.])

    Reference:
        AMSS, adaptive mask subnetworks considering modal significance: the authors' published code, `gn` mode.
    """
    if grad.dim() == 0 or not grad.is_floating_point():
        raise ValueError(
            "`grad` should be a floating tensor with at least one dimension. "
            f"Found shape {tuple(grad.shape)}, dtype {grad.dtype}."
        )
    if not -grad.dim() <= unit_dim < grad.dim():
        raise ValueError(f"`unit_dim` should be a dimension of `grad` ({grad.dim()}-D). Found {unit_dim}.")
    unit_dim %= grad.dim()
    # The norm along a dimension runs on all cores and makes no copy; a product and its sum do neither.
    values = grad.unsqueeze(-1)
    others = tuple(d for d in range(values.dim()) if d != unit_dim)
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    if grad.dtype.itemsize < 2:
        values = values.to(wide)
    norms: Tensor = torch.linalg.vector_norm(values, dim=others, dtype=wide)
    return norms.square_()
