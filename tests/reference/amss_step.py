"""A step of AMSS or AMSS+ written out naively: unit by unit, in floats and loops."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tests.reference.amss import capped_probabilities, systematic_sample


def weights(
    units: Sequence[Sequence[float]],
    ratio: float,
    uniforms: Sequence[float],
    scale: str = "none",
) -> list[float]:
    """What each unit's gradient is multiplied by, from the gradient of each unit and one draw of numbers in [0, 1)."""
    squares = [sum(g * g for g in unit) for unit in units]
    n, s = len(units), [math.sqrt(f) if scale == "unbiased" else f for f in squares]
    if sum(s) == 0 or not math.isfinite(sum(s)):
        return [1.0] * n
    if scale == "unbiased":
        pi = capped_probabilities(s, n * ratio)
        order = sorted(range(n), key=lambda j: uniforms[1 + j])
        taken = systematic_sample(pi, order, uniforms[0])
        return [1 / p if t else 0.0 for p, t in zip(pi, taken, strict=True)]
    k = min(n, max(1, math.ceil(n * ratio - 1e-6)))
    first = sorted(range(n), key=lambda j: arrival(s[j], uniforms[j]))[:k]
    weight = [1.0] * n if scale == "none" else [1 / (x / sum(s) + 1 / n) for x in s]
    return [w if j in first else 0.0 for j, w in enumerate(weight)]


def arrival(s: float, uniform: float) -> tuple[bool, float]:
    """When a unit ends an exponential race; units of no importance after all others."""
    time = -math.log1p(-uniform)
    return (s == 0, time if s == 0 else time / s)
