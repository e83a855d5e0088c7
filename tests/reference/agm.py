"""AGM's rule (Li et al., ICCV 2023), written naively: one modality after the other, in Python's floats."""

from __future__ import annotations

import math
from collections.abc import Sequence


def lead(cross_entropy: Sequence[float]) -> list[float]:
    m = len(cross_entropy)
    mean = sum(cross_entropy) / m
    return [math.exp(m / (m - 1) * (mean - c)) for c in cross_entropy]


def coefficients(history: Sequence[Sequence[float]], alpha: float, cap: float) -> list[float]:
    """The coefficients of the last of several steps, from the cross-entropies of all of them."""
    running = [sum(values) / len(history) for values in zip(*history, strict=True)]
    pairs = zip(lead(running), lead(history[-1]), strict=True)
    return [math.exp(alpha * min(before - now, cap)) for before, now in pairs]
