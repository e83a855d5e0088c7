"""Keep ratio, number of kept units and importance of units for subnetwork masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from balanceopt._options import check_count, check_number, check_tensor, is_number, shown
from balanceopt.functional._dtypes import narrowed, wide
from balanceopt.functional._scores import present_or_all


@torch.no_grad()
def keep_ratio(
    significance: Tensor,
    temperature: float = 0.2,
    clamp: tuple[float, float] = (0.1, 0.9),
    present: Tensor | None = None,
) -> Tensor:
    r"""Compute the share of each modality's units to update, larger for a less significant modality.

    $$r^m = \mathrm{clamp}\left(1 - \mathrm{softmax}_m(u / T)\right)$$

    where $u$ is the modal significance and $T$ the temperature. If a significance is not positive or not finite,
    every modality gets the balanced $(M - 1) / M$, not clamped.

    Args:
        significance: `(M,)`, the modal significance of each modality.
        temperature: T > 0; small values follow the significance more sharply.
        clamp: lower and upper limit of the ratios, in [0, 1].
        present: bool `(M,)`; False leaves a modality out, also of the count M. None for all True.

    Returns:
        Keep ratios `(M,)`, in the dtype of `significance`; 1 for a single modality and for absent modalities.

    Raises:
        ValueError: if `significance` is not a vector with an entry, `present` has another shape, `temperature` is not
            positive, or `clamp` is not a pair `0 <= low <= high <= 1`.
        TypeError: if `significance` or `present` is not a tensor.

    Example:
        >>> keep_ratio(torch.tensor([0.34, 0.08]))
        tensor([0.2142, 0.7858])
        >>> keep_ratio(torch.tensor([0.34, -0.08]))
        tensor([0.5000, 0.5000])

    Reference:
        AMSS, adaptive mask subnetworks considering modal significance: the authors' published code
        (`AMSS/train_test.py`), with (M - 1) / M in place of its 0.5 for M > 2.
    """
    check_tensor("significance", significance, "(M,)", dims=(1,), empty=False)
    check_number("temperature", temperature, above=0)
    check_clamp(clamp)
    low, high = clamp
    u = wide(significance)
    here = present_or_all(present, u)
    # A temperature that underflows to 0 would divide by 0.
    temperature = max(temperature, torch.finfo(u.dtype).tiny)
    modalities = here.sum().to(u.dtype)
    others = torch.where(here, u, -math.inf)
    # Shifted before the division: a large significance over a small temperature stays finite.
    ratio = (1 - torch.softmax((others - others.amax()) / temperature, 0)).clamp(low, high)
    usable = (torch.isfinite(u) & (u > 0) | ~here).all()
    ratio = torch.where(usable, ratio, (modalities - 1) / modalities)
    ratio = torch.where(here & (modalities > 1), ratio, 1)
    return narrowed(ratio, significance)


def check_clamp(clamp: object) -> None:
    """Check that `clamp` is a pair of ordered numbers between 0 and 1.

    Raises:
        ValueError: naming the given value.
    """
    if isinstance(clamp, (tuple, list)) and len(clamp) == 2 and all(map(is_number, clamp)):  # noqa: SIM102
        if 0 <= clamp[0] <= clamp[1] <= 1:
            return
    raise ValueError(
        f"`clamp` should be a pair (low, high) with 0 <= low <= high <= 1. Found clamp = {shown(clamp)}."
    )


@overload
def kept_units(n: int, ratio: float) -> int: ...
@overload
def kept_units(n: int | Tensor, ratio: Tensor) -> Tensor: ...
@torch.no_grad()
def kept_units(n: int | Tensor, ratio: float | Tensor) -> int | Tensor:
    r"""Compute the number of units to keep from a keep ratio.

    $$k = \min(n, \max(1, \lceil n r - 10^{-9} \rceil))$$

    Args:
        n: number of units, >= 0, or an integer tensor that broadcasts with `ratio`.
        ratio: keep ratio; a float, or a tensor of any shape, used without a device synchronisation. For a tensor
            narrower than float64 the ratio's rounding is subtracted too: 10 units at 0.1 are one unit,
            although 0.1 in float32 is a little more.

    Returns:
        An int, or an int64 tensor.

    Raises:
        ValueError: if `n` is not a whole number of at least 0, or `ratio` not finite.
        TypeError: if `n` is a tensor and `ratio` is not.

    Example:
        >>> kept_units(100, 0.07)
        7
        >>> kept_units(10, torch.tensor([0.0, 0.1, 0.31]))
        tensor([1, 1, 4])
    """
    if isinstance(n, Tensor):
        check_tensor("n", n, "(...)", kind="integer")
    else:
        check_count("n", n)
    if isinstance(ratio, Tensor):
        check_tensor("ratio", ratio, "(...)")
        product = ratio.double() * n
        rounded = ratio.is_floating_point() and ratio.dtype != torch.float64
        rounding = torch.finfo(ratio.dtype).eps if rounded else 0.0
        count = (product * (1 - rounding) - 1e-9).ceil().long().clamp(min=1)
        return count.minimum(n) if isinstance(n, Tensor) else count.clamp(max=n)
    if isinstance(n, Tensor):
        raise TypeError(f"`ratio` should be a tensor when `n` is one. Found {shown(ratio)}.")
    check_number("ratio", ratio)
    return min(n, max(1, math.ceil(n * ratio - 1e-9)))


def unit_importance(grad: Tensor, unit_dim: int | Sequence[int] = 0) -> Tensor:
    r"""Compute the importance of each unit of a parameter, the unit's summed diagonal empirical Fisher information.

    $$F_j = \sum_{\theta \in \text{unit } j} \left(\partial L / \partial \theta\right)^2$$

    Args:
        grad: gradient of any dtype, at least 1-D; a unit is a slice at one index of `unit_dim`.
        unit_dim: dimension of the units: 0 for the filters of a convolution and the rows of a linear layer,
            1 for a transposed convolution. Several dimensions number the units together, the last one fastest.

    Returns:
        `(n,)` in float32, or in float64 for a float64 gradient. The order of the sum depends on the processor and the
        number of threads: relative error 1e-6 up to 2^16 elements a unit, 2e-5 at 2^20.

    Raises:
        ValueError: if `grad` is sparse or 0-d, or has no dimension `unit_dim`.
        TypeError: if `grad` is not a tensor.

    Example:
        >>> unit_importance(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        tensor([25.,  1.])
        >>> unit_importance(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), unit_dim=1)
        tensor([ 9., 17.])

    Reference:
        AMSS, adaptive mask subnetworks considering modal significance: the authors' published code, `gn` mode.
    """
    check_tensor("grad", grad, "(n, ...)", kind="any")
    if grad.dim() == 0:
        raise ValueError("`grad` should have at least one dimension. Found a single number.")
    rank = grad.dim()
    dims: list[Any] = list(unit_dim) if isinstance(unit_dim, (list, tuple)) else [unit_dim]
    if not all(type(dim) is int and -rank <= dim < rank for dim in dims):
        raise ValueError(
            f"`unit_dim` should be a dimension of `grad` ({rank}-D), or several. Found unit_dim = {shown(unit_dim)}."
        )
    grad = grad.detach()
    if grad.dtype.itemsize < 2 or not (grad.is_floating_point() or grad.is_complex()):
        grad = grad.float()  # integers, and 8-bit floats, which torch does not reduce
    if dims == [0] and rank > 1 and grad.is_contiguous():
        # A reduction over one dimension is faster than over several.
        values, others = grad.flatten(1), [1]
    else:
        # The added dimension of size 1 is there to reduce where units are single elements.
        dims = [dim % rank for dim in dims]
        values, others = grad.unsqueeze(-1), [dim for dim in range(rank + 1) if dim not in dims]
    # The norm runs on all threads without a copy, unlike a product and a sum.
    dtype = torch.promote_types(grad.dtype, torch.float32)
    squares: Tensor = torch.linalg.vector_norm(values, dim=others, dtype=dtype).square_()
    return squares if squares.dim() == 1 else squares.flatten()
