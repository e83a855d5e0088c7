"""Re-initialisation strength, and soft re-initialisation in place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from balanceopt._options import check_kind, check_number, check_tensor, is_number, shown
from balanceopt._torch import foreach_copy_, foreach_lerp_
from balanceopt.functional._dtypes import narrowed, wide


@torch.no_grad()
def reinit_strength(gap: Tensor | float, lam: float) -> Tensor:
    r"""Compute the re-initialisation strength of a modality's encoder.

    $$\alpha = \tanh(\lambda g)$$

    Args:
        gap: purity gap $|P_D - P_V|$ between training and validation features, a tensor of any shape or a float.
        lam: factor $\lambda \ge 0$; 0 never re-initialises.

    Returns:
        Tensor of the gap's shape and dtype (the default dtype for a float).

    Raises:
        ValueError: if `lam` is negative or not finite, or `gap` complex.
        TypeError: if `gap` is neither a tensor nor a number.

    Example:
        >>> reinit_strength(torch.tensor([0.0, 0.1]), lam=3.0)
        tensor([0.0000, 0.2913])

    Reference:
        Wei et al., Diagnosing and Re-learning for Balanced Multimodal Learning, ECCV 2024, Eq. 4-5.
    """
    check_number("lam", lam, at_least=0)
    if isinstance(gap, Tensor):
        check_tensor("gap", gap, "(...)")
        values = gap
    elif is_number(gap):
        values = torch.tensor(float(gap), dtype=torch.get_default_dtype(), device="cpu")
    else:
        raise TypeError(f"`gap` should be a tensor or a finite number. Found gap = {shown(gap)}.")
    return narrowed(torch.tanh(lam * wide(values)), values)


@torch.no_grad()
def soft_reinit_(
    params: Iterable[Tensor], initial: Iterable[Tensor], strength: float | Tensor | Sequence[float | Tensor]
) -> None:
    r"""Move parameters towards their initial values, in place.

    $$\theta \leftarrow (1 - \alpha) \theta + \alpha \theta^{\text{init}}$$

    Args:
        params: floating tensors, each once; leaf parameters too. The storage stays the same.
        initial: one tensor per parameter, of the parameter's shape; another dtype or device is converted.
        strength: alpha in [0, 1], for all or one per parameter. 0 changes no bit, 1 copies the initial values
            (also over NaN). A tensor is read with a device synchronisation.

    Raises:
        ValueError: if the lengths or shapes differ, a parameter is not floating or comes twice, a complex initial
            value is given for a real parameter, or a strength is outside [0, 1]; no parameter is changed then.
        TypeError: if `params` or `initial` is not an iterable of tensors.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 3.0]))
        >>> soft_reinit_([weight], [torch.zeros(2)], 0.25)
        >>> weight.data
        tensor([0.7500, 2.2500])

    Reference:
        Wei et al., Diagnosing and Re-learning for Balanced Multimodal Learning, ECCV 2024, Eq. 6.
    """
    for role, given in (("`params`", params), ("`initial`", initial)):
        check_kind(role, given, Iterable, "an iterable of tensors")
    params, initial = list(params), list(initial)
    for role, tensors in (("params", params), ("initial", initial)):
        for index, x in enumerate(tensors):
            check_tensor(f"{role}[{index}]", x, "(...)", kind="any")
    strengths = _strengths(strength, len(params))
    _check_pairs(params, initial)
    groups: dict[tuple[torch.device, torch.dtype, float], tuple[list[Tensor], list[Tensor]]]
    groups = defaultdict(lambda: ([], []))
    for current, start, alpha in zip(params, initial, strengths, strict=True):
        device, dtype = current.device, current.dtype
        if alpha == 0:
            continue
        if start.dtype is not dtype or start.device != device:
            # Converted one by one, so that the device never holds copies of all initial values.
            _move_([current], [start.to(device, dtype)], alpha)
        else:
            targets, sources = groups[device, dtype, alpha]
            targets.append(current)
            sources.append(start)
    for (_, _, alpha), (targets, sources) in groups.items():
        _move_(targets, sources, alpha)


def _move_(params: list[Tensor], initial: list[Tensor], alpha: float) -> None:
    if alpha == 1:
        foreach_copy_(params, initial)
    else:
        foreach_lerp_(params, initial, alpha)


def _strengths(strength: float | Tensor | Sequence[float | Tensor], count: int) -> list[float]:
    several = isinstance(strength, (list, tuple)) or (isinstance(strength, Tensor) and strength.dim() == 1)
    given = list(strength) if several else [strength] * count  # type: ignore[arg-type]
    values: list[Any] = [a.item() if isinstance(a, Tensor) and a.numel() == 1 else a for a in given]
    if len(values) != count:
        raise ValueError(
            f"`strength` should be one value, or one per parameter ({count}). Found {len(values)}."
        )
    for alpha in values:
        check_number("strength", alpha, at_least=0, at_most=1)
    return values


def _check_pairs(params: Sequence[Tensor], initial: Sequence[Tensor]) -> None:
    if len(params) != len(initial):
        raise ValueError(
            f"`initial` should have one tensor per parameter ({len(params)}). Found {len(initial)}."
        )
    if len({id(p) for p in params}) != len(params):
        raise ValueError("`params` should hold each tensor once. Found one twice.")
    for dtype in {p.dtype for p in params}:
        if not (dtype.is_floating_point or dtype.is_complex):
            raise ValueError(f"`params` should be floating tensors. Found dtype {dtype}.")
    for current, start in zip(params, initial, strict=True):
        if start.is_complex() and not current.is_complex():
            raise ValueError("`initial` should be real for a real parameter. Found complex numbers.")
        if current.shape != start.shape:
            raise ValueError(
                f"`initial` should have the shapes of `params`. Found {tuple(start.shape)} for {tuple(current.shape)}."
            )
