"""Feature maps and token sequences as one vector a sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from balanceopt._options import shown

Pool = Literal["auto", "mean", "max", "flatten"] | Callable[[Tensor], Tensor]
Projection = Callable[[Tensor, int], Tensor]
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


def samples_in(
    name: str, features: Tensor, samples: int | None, present: Tensor | None = None, *, frames: bool
) -> int:
    """The number of samples whose features these are: `samples`, or as many as have the modality.

    Args:
        name: the modality.
        features: a row, or several rows one after the other (frames of a clip), for each sample; or `(L, B, H)`.
        samples: B; None where it is not known.
        present: bool `(B,)`, the samples that have the modality, where the user told.
        frames: it is known that a sample's rows stand one after the other.

    Raises:
        ValueError: if the rows are of neither.
    """
    rows = len(features)
    if samples is None or rows == samples or (frames and samples > 0 and rows > 0 and rows % samples == 0):
        return rows if samples is None else samples
    if features.dim() == 3 and features.shape[1] == samples:
        return samples
    if present is not None:
        having = int(present.sum())
        if rows == having or (frames and having > 0 and rows > 0 and rows % having == 0):
            return having
    raise ValueError(
        f"the encoder of {name!r} returned {rows} rows for {samples} samples, as labels or logits are. Where it runs "
        "on those that have the modality, tell which: monitor.observe(labels, present={modality: bool (B,)}). Else "
        "pass `select=` to the monitor: a function from the encoder's output to one row for each sample."
    )


def pool_features(
    features: Tensor, pool: Pool, projection: Projection | None = None, samples: int | None = None
) -> Tensor:
    """`(B, ...)` as `(B, D)`.

    Args:
        features: `(B,)` and `(B, D)` need no rule. The rules take `(B, T, D)` over the positions T, and maps
            `(B, D, ...)` of four dimensions or more over all after D.
        pool: `"mean"`, `"max"`, `"flatten"`, a function, or `"auto"`: `projection` where it is known, else the mean.
        projection: how the head gets these features.
        samples: B, where features may have several rows for each sample, over which the rules go too.

    Raises:
        ValueError: if a function returns something else than `(B, D)`.
    """
    if features.dim() == 0:
        raise ValueError("features should have one row for each sample. Found a single number.")
    samples = len(features) if samples is None else samples
    if callable(pool):
        pooled = pool(features)
        if not isinstance(pooled, Tensor) or pooled.dim() != 2 or len(pooled) != samples:
            raise ValueError(f"`pool` should return ({samples}, D). Found {shown(pooled)}.")
        return as_real(pooled)
    features = as_real(features)
    if pool == "auto" and projection is not None and (features.dim() > 2 or len(features) != samples):
        return projection(features, samples)
    if len(features) != samples:
        if len(features) % max(samples, 1):  # (L, B, H), states of a recurrent encoder
            return pool_features(features.transpose(0, 1), pool)
        features = pool_features(features, pool).unflatten(0, (samples, -1))
    if features.dim() <= 2:
        return features.unsqueeze(-1) if features.dim() == 1 else features
    if pool == "flatten":
        return features.flatten(1)
    positions = features.transpose(1, 2) if features.dim() == 3 else features.flatten(2)
    return positions.amax(2) if pool == "max" else positions.mean(2)
