"""OPM's formulas, written as naively as they stand in the paper: one sample, one modality, one number at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tests.reference.ogm import ratios_eq7


def drop_probability_eq8(ratio: float, q_base: float, lam: float) -> float:
    """TPAMI 2024, Eq. 8, with z(rho) = tanh(rho - 1)."""
    if ratio > 1:
        return min(1.0, max(0.0, q_base * (1 + lam * math.tanh(ratio - 1))))
    return 0.0


def drop_probabilities(scores: Sequence[float], q_base: float, lam: float) -> list[float]:
    return [drop_probability_eq8(ratio, q_base, lam) for ratio in ratios_eq7(scores)]


def feature(z: Sequence[float], kept: bool) -> list[float]:
    """The drop: r z with r in {0, 1}."""
    return [float(kept) * x for x in z]


def theta(widths: Sequence[int], q: Sequence[float]) -> float:
    """What part of all features is dropped on average: the published code's divisor is 1 - theta."""
    return sum(d * p for d, p in zip(widths, q, strict=True)) / sum(widths)


def official_feature(
    z: Sequence[float], kept: bool, widths: Sequence[int], q: Sequence[float]
) -> list[float]:
    return [x / (1 - theta(widths, q)) for x in feature(z, kept)]
