"""The way back: how far, and soft re-initialisation in place."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from balanceopt.functional._scaling import wide


@torch.no_grad()
def reinit_strength(gap: Tensor | float, lam: float) -> Tensor:
    r"""How far a modality's encoder goes back to its initial weights.

    $$\alpha = \tanh(\lambda g)$$

    Args:
        gap: the purity gap $|P_D - P_V|$ between training and validation features, of any shape, or a float.
        lam: $\lambda \ge 0$; 0 never re-initialises.

    Returns:
        Tensor of the gap's shape and dtype (the default dtype for a float).

    Raises:
        ValueError: if `lam` is negative or not finite.

    Example:
        >>> reinit_strength(torch.tensor([0.0, 0.1]), lam=3.0)
        tensor([0.0000, 0.2913])

    Reference:
        Wei et al., Diagnosing and Re-learning for Balanced Multimodal Learning, ECCV 2024, Eq. 4-5.
    """
    if not (math.isfinite(lam) and lam >= 0):
        raise ValueError(f"`lam` should be non-negative and finite. Found {lam}.")
    values = torch.as_tensor(gap)
    return torch.tanh(lam * wide(values)).to(values.dtype)


@torch.no_grad()
def soft_reinit_(
    params: Iterable[Tensor], initial: Iterable[Tensor], strength: float | Tensor | Sequence[float | Tensor]
) -> None:
    r"""Move parameters towards their initial values, in place.

    $$\theta \leftarrow (1 - \alpha) \theta + \alpha \theta^{\text{init}}$$

    Args:
        params: floating tensors, each once; leaf parameters too. They keep their storage.
        initial: one tensor per parameter, of its shape; another dtype or device is converted.
        strength: alpha in [0, 1], for all or one per parameter. 0 changes no bit, 1 copies the initial values
            (also over NaN). A tensor is read on the host.

    Raises:
        ValueError: if the lengths or shapes differ, a parameter is not floating or comes twice, or a strength
            is outside [0, 1].

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 3.0]))
        >>> soft_reinit_([weight], [torch.zeros(2)], 0.25)
        >>> weight.data
        tensor([0.7500, 2.2500])

    Reference:
        Wei et al., Diagnosing and Re-learning for Balanced Multimodal Learning, ECCV 2024, Eq. 6.
    """
    params, initial = list(params), list(initial)
    strengths = _strengths(strength, len(params))
    _check_pairs(params, initial)
    groups: dict[tuple[torch.device, torch.dtype, float], tuple[list[Tensor], list[Tensor]]]
    groups = defaultdict(lambda: ([], []))
    for current, start, alpha in zip(params, initial, strengths, strict=True):
        device, dtype = current.device, current.dtype
        if alpha == 0:
            continue
        if start.dtype is not dtype or start.device != device:
            # One by one: what was kept elsewhere is never all here.
            _move_([current], [start.to(device, dtype)], alpha)
        else:
            targets, sources = groups[device, dtype, alpha]
            targets.append(current)
            sources.append(start)
    for (_, _, alpha), (targets, sources) in groups.items():
        _move_(targets, sources, alpha)


def _move_(params: list[Tensor], initial: list[Tensor], alpha: float) -> None:
    if alpha == 1:
        torch._foreach_copy_(params, initial)
    else:
        torch._foreach_lerp_(params, initial, alpha)


def _strengths(strength: float | Tensor | Sequence[float | Tensor], count: int) -> list[float]:
    if isinstance(strength, Tensor):
        values = strength.tolist() if strength.dim() else [float(strength)] * count
    elif isinstance(strength, Sequence):
        values = [float(a) for a in strength]
    else:
        values = [float(strength)] * count
    if len(values) != count:
        raise ValueError(
            f"`strength` should be one value, or one per parameter ({count}). Found {len(values)}."
        )
    for alpha in set(values):
        if not 0 <= alpha <= 1:
            raise ValueError(f"`strength` should lie in [0, 1]. Found {alpha}.")
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
        if current.shape != start.shape:
            raise ValueError(
                f"`initial` should have the shapes of `params`. Found {tuple(start.shape)} for {tuple(current.shape)}."
            )
