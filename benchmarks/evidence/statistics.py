"""What can be said of runs that are paired by seed: pure functions of arrays."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.extras import need

Values = Sequence[float] | np.ndarray

_RESAMPLES = 10_000


@dataclass(frozen=True)
class Paired:
    """Differences of paired runs.

    Args:
        mean: of the differences.
        low: lower end of the bootstrap interval of the mean, 95 %.
        high: its upper end.
        t: p of a paired t-test, two-sided.
        wilcoxon: p of Wilcoxon's signed-rank test, two-sided.
        effect: Cohen's d_z, the mean over the standard deviation of the differences.
    """

    mean: float
    low: float
    high: float
    t: float
    wilcoxon: float
    effect: float


def paired(differences: Values) -> Paired:
    """Interval, tests and effect size of paired differences; NaN for what one pair can't tell."""
    values = np.asarray(differences, dtype=float)
    low, high = bootstrap_interval(values)
    return Paired(float(values.mean()), low, high, _t(values), _wilcoxon(values), effect_size(values))


def bootstrap_interval(values: Values, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of the mean under resampling with replacement; always the same for the same values."""
    values = np.asarray(values, dtype=float)
    means = values[_resamples(len(values))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def effect_size(differences: Values) -> float:
    """Cohen's d_z; infinite where all differences are the same and not zero."""
    values = np.asarray(differences, dtype=float)
    if len(values) < 2:
        return float("nan")
    mean, spread = values.mean(), values.std(ddof=1)
    if spread == 0:
        return 0.0 if mean == 0 else float(np.copysign(np.inf, mean))
    return float(mean / spread)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down correction for several tests; NaN stays NaN and counts for nothing."""
    known = sorted((p, name) for name, p in p_values.items() if not np.isnan(p))
    adjusted = dict.fromkeys(p_values, float("nan"))
    largest = 0.0
    for rank, (p, name) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[name] = largest
    return adjusted


def recovery(probe: Values, joint: Values, alone: Values) -> tuple[float, float, float]:
    """How much of what the encoder loses in joint training it has back, and its bootstrap interval.

    (probe - joint) / (alone - joint) of the means over seeds: 0 is joint training, 1 the encoder trained alone. A ratio
    of means, because the gap of a single seed may be next to nothing.
    """
    gained = np.asarray(probe, dtype=float) - np.asarray(joint, dtype=float)
    gap = np.asarray(alone, dtype=float) - np.asarray(joint, dtype=float)
    index = _resamples(len(gap))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = gained[index].mean(axis=1) / gap[index].mean(axis=1)
        low, high = np.nanquantile(ratios, [0.025, 0.975])
        return float(gained.mean() / gap.mean()), float(low), float(high)


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over bins of equal width, weighted by the samples in each."""
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    count = np.bincount(place, minlength=bins)
    gap = np.bincount(place, weights=correct - confidence, minlength=bins)
    return float(np.abs(gap[count > 0]).sum() / len(labels))


def _resamples(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(count, size=(_RESAMPLES, count))


def _t(values: np.ndarray) -> float:
    if len(values) < 2:
        return float("nan")
    if values.std() == 0:
        return 1.0 if values[0] == 0 else 0.0
    return float(need("scipy.stats").ttest_1samp(values, 0).pvalue)


def _wilcoxon(values: np.ndarray) -> float:
    if len(values) < 2:
        return float("nan")
    if not values.any():
        return 1.0
    with warnings.catch_warnings():
        # Ties make it an approximation, which is said in the text.
        warnings.simplefilter("ignore")
        return float(need("scipy.stats").wilcoxon(values).pvalue)
