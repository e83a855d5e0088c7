"""Statistics against scipy, and against formulas written out."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from benchmarks.evidence.statistics import (
    bootstrap_interval,
    effect_size,
    expected_calibration_error,
    holm,
    paired,
    recovery,
)

VALUES = np.random.default_rng(3).normal(0.7, 1.3, 10)


def test_interval_is_scipy_s_percentile_bootstrap():
    expected = stats.bootstrap(
        (VALUES,), np.mean, n_resamples=50_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert bootstrap_interval(VALUES) == pytest.approx(tuple(expected), abs=0.03)


def test_interval_narrows_with_the_level_and_is_repeatable():
    wide, narrow = bootstrap_interval(VALUES, 0.99), bootstrap_interval(VALUES, 0.5)
    assert wide[0] < narrow[0] < VALUES.mean() < narrow[1] < wide[1]
    assert bootstrap_interval(VALUES) == bootstrap_interval(VALUES)


def test_tests_are_scipy_s():
    before = np.random.default_rng(4).normal(90, 2, 10)
    found = paired(VALUES)
    assert found.t == pytest.approx(stats.ttest_rel(before + VALUES, before).pvalue)
    assert found.wilcoxon == pytest.approx(stats.wilcoxon(VALUES).pvalue)
    assert found.mean == pytest.approx(VALUES.mean())


def test_effect_size_follows_from_t():
    t = stats.ttest_1samp(VALUES, 0).statistic
    assert effect_size(VALUES) == pytest.approx(t / np.sqrt(len(VALUES)))


@pytest.mark.parametrize(
    ("values", "t", "effect"), [([0.0, 0.0], 1.0, 0.0), ([1.0, 1.0], 0.0, np.inf), ([-1, -1], 0.0, -np.inf)]
)
def test_equal_differences(values, t, effect):
    found = paired(values)
    assert (found.t, found.effect) == (t, effect)
    assert found.low == found.high == values[0]


def test_one_pair_tells_no_p():
    found = paired([0.4])
    assert found.mean == found.low == found.high == 0.4
    assert np.isnan([found.t, found.wilcoxon, found.effect]).all()


def naive_holm(p_values):
    """Holm (1979): the r-th smallest times (m - r + 1), never below the one before."""
    m, adjusted, before = len(p_values), {}, 0.0
    for r, name in enumerate(sorted(p_values, key=p_values.get), start=1):
        before = adjusted[name] = max(before, min(1.0, (m - r + 1) * p_values[name]))
    return adjusted


def test_holm():
    p_values = dict(zip("abcdef", [0.01, 0.04, 0.03, 0.005, 0.5, 0.2], strict=True))
    assert holm(p_values) == pytest.approx(naive_holm(p_values))
    # By hand: 0.01 to 0.04 are multiplied by 3, 2 and 1, and 0.04 may not fall below 0.06.
    assert holm({"a": 0.01, "b": 0.03, "c": 0.04}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})


def test_holm_counts_only_what_is_known():
    found = holm({"a": 0.02, "b": float("nan")})
    assert found["a"] == 0.02
    assert np.isnan(found["b"])


def test_recovery_is_nothing_for_joint_and_all_for_alone():
    joint, alone = VALUES + 60, VALUES + 68
    assert recovery(joint, joint, alone) == (0.0, 0.0, 0.0)
    assert recovery(alone, joint, alone) == pytest.approx((1.0, 1.0, 1.0))
    share, low, high = recovery(joint + np.linspace(2, 6, 10), joint, alone)
    assert share == pytest.approx(0.5)
    assert low < 0.5 < high


def naive_ece(probabilities, labels, bins):
    total = 0.0
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    for b in range(bins):
        inside = (confidence >= b / bins) & (confidence < (b + 1) / bins if b < bins - 1 else True)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return total


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_error(bins):
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(5) / 2, 300)
    labels = rng.integers(5, size=300)
    found = expected_calibration_error(probabilities, labels, bins)
    assert found == pytest.approx(naive_ece(probabilities, labels, bins))


def test_calibration_of_the_sure():
    sure = np.eye(3)[[0, 1, 2, 0]]
    assert expected_calibration_error(sure, np.array([0, 1, 2, 0])) == 0
    assert expected_calibration_error(sure, np.array([1, 2, 0, 1])) == 1
