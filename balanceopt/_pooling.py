"""Feature maps and token sequences as one vector a sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from balanceopt._options import shown

Pool = Literal["auto", "mean", "max", "flatten"] | Callable[[Tensor], Tensor]
_RULES = get_args(get_args(Pool)[0])


def check_pool(pool: Pool) -> None:
    """Refuse an unknown rule.

    Raises:
        ValueError: if `pool` is neither a rule nor a function.
    """
    if not callable(pool) and pool not in _RULES:
        raise ValueError(f"`pool` should be one of {_RULES} or a function. Found {pool!r}.")


def as_real(features: Tensor) -> Tensor:
    """Complex features as real ones, twice as many: the real parts, then the imaginary ones."""
    if not features.is_complex():
        return features
    channels = -1 if features.dim() < 4 else 1
    parts = (features.real, features.imag)
    return torch.stack(parts, 1) if features.dim() == 1 else torch.cat(parts, channels)


def pool_features(
    features: Tensor, pool: Pool, projection: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """`(B, ...)` as `(B, D)`.

    Args:
        features: `(B,)` and `(B, D)` need no rule. The rules take `(B, T, D)` over the positions T, and maps
            `(B, D, ...)` of four dimensions or more over all after D.
        pool: `"mean"`, `"max"`, `"flatten"`, a function, or `"auto"`: `projection` where it is known, else the mean.
        projection: how the head gets these features.

    Raises:
        ValueError: if a function returns something else than `(B, D)`.
    """
    if features.dim() == 0:
        raise ValueError("features should have one row for each sample. Found a single number.")
    if callable(pool):
        pooled = pool(features)
        if not isinstance(pooled, Tensor) or pooled.dim() != 2 or len(pooled) != len(features):
            raise ValueError(f"`pool` should return ({len(features)}, D). Found {shown(pooled)}.")
        return as_real(pooled)
    features = as_real(features)
    if features.dim() <= 2:
        return features.unsqueeze(-1) if features.dim() == 1 else features
    if pool == "flatten":
        return features.flatten(1)
    if pool == "auto" and projection is not None:
        return projection(features)
    positions = features.transpose(1, 2) if features.dim() == 3 else features.flatten(2)
    return positions.amax(2) if pool == "max" else positions.mean(2)
