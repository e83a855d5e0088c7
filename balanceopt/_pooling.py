"""Pooling of feature maps and token sequences into one vector for each sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from balanceopt._deferred import on_host
from balanceopt._options import shown

Pool = Literal["auto", "mean", "max", "flatten"] | Callable[[Tensor], Tensor]
Projection = Callable[[Tensor, int], Tensor]
_RULES = get_args(get_args(Pool)[0])


def check_pool(pool: Pool) -> None:
    """Check a pooling rule.

    Raises:
        ValueError: if `pool` is neither the name of a rule nor a function.
    """
    if not callable(pool) and pool not in _RULES:
        raise ValueError(f"`pool` should be one of {_RULES} or a function. Found {pool!r}.")


def as_real(features: Tensor) -> Tensor:
    """Convert complex features to twice as many real features: the real parts, then the imaginary parts."""
    if not features.is_complex():
        return features
    channels = -1 if features.dim() < 4 else 1
    parts = (features.real, features.imag)
    return torch.stack(parts, 1) if features.dim() == 1 else torch.cat(parts, channels)


def samples_in(
    name: str, features: Tensor, samples: int | None, present: Tensor | None = None, *, frames: bool
) -> int:
    """Return the number of samples that features cover: `samples`, or the count of samples that have the modality.

    Args:
        name: the modality.
        features: one row, or several consecutive rows (frames of a clip), for each sample; or `(L, B, H)`.
        samples: batch size B; None where unknown.
        present: bool `(B,)`, which samples have the modality; None where unknown.
        frames: whether several rows for each sample are known to be consecutive.

    Raises:
        ValueError: if the number of rows fits neither count.
    """
    rows = len(features)
    if samples is None or rows == samples or (frames and samples > 0 and rows > 0 and rows % samples == 0):
        return rows if samples is None else samples
    if features.dim() == 3 and features.shape[1] == samples:
        return samples
    if present is not None:
        host_value = on_host(present)
        having = int(present.sum() if host_value is None else host_value.sum())
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
    """Pool features `(B, ...)` to vectors `(B, D)`.

    Args:
        features: `(B,)` and `(B, D)` need no rule. The rules reduce `(B, T, D)` over the positions T, and maps
            `(B, D, ...)` of four dimensions or more over all dimensions after D.
        pool: `"mean"`, `"max"`, `"flatten"`, a function, or `"auto"`: `projection` where there is one, else the mean.
        projection: the model's own pooling before the head, a function of features and B; None where unknown.
        samples: B, where features may have several rows for each sample, which the rules reduce too.

    Raises:
        ValueError: if features are 0-d, or a function returns another shape than `(B, D)`.
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
        if len(features) % max(samples, 1):  # (L, B, H) of a recurrent encoder
            return pool_features(features.transpose(0, 1), pool)
        features = pool_features(features, pool).unflatten(0, (samples, -1))
    if features.dim() <= 2:
        return features.unsqueeze(-1) if features.dim() == 1 else features
    if pool == "flatten":
        return features.flatten(1)
    positions = features.transpose(1, 2) if features.dim() == 3 else features.flatten(2)
    return positions.amax(2) if pool == "max" else positions.mean(2)
