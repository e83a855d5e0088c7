"""modulation_coefficient and drop_probability."""

from __future__ import annotations

import math

import pytest
import torch

from balanceopt.functional import drop_probability, modulation_coefficient

FORMS = ("cvpr", "cvpr_v0", "tpami")

# algorithms.md 2.1: k just above ratio 1, and at ratio 2.
TABLE: dict[str, dict[float, tuple[float, float]]] = {
    "cvpr": {0.1: (0.900, 0.803), 0.3: (0.709, 0.463), 0.8: (0.336, 0.078), 1.0: (0.238, 0.036)},
    "cvpr_v0": {0.1: (1, 0.900), 0.3: (1, 0.709), 0.8: (1, 0.336), 1.0: (1, 0.238)},
    "tpami": {0.1: (1, 0.924), 0.3: (1, 0.772), 0.8: (1, 0.391), 1.0: (1, 0.238)},
}


@pytest.mark.parametrize("form", FORMS)
def test_table_of_the_three_forms(form):
    for alpha, expected in TABLE[form].items():
        k = modulation_coefficient(torch.tensor([1 + 1e-6, 2.0]), alpha, form)
        assert k.tolist() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_those_who_do_not_dominate_are_left_alone(form):
    k = modulation_coefficient(torch.tensor([0.0, 0.5, 1.0]), 0.8, form)
    assert k.tolist() == [1, 1, 1]


@pytest.mark.parametrize("form", FORMS)
def test_alpha_zero_changes_nothing(form):
    assert modulation_coefficient(torch.tensor([0.1, 1.0, 3.0, 1e30]), 0.0, form).tolist() == [1] * 4


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("alpha", [1.0, 5.0, 1e4])
def test_never_outside_zero_and_one(form, alpha):
    k = modulation_coefficient(torch.tensor([1.0001, 2.0, 1e8, math.inf]), alpha, form)
    assert ((k >= 0) & (k <= 1)).all()


@pytest.mark.parametrize("form", FORMS)
def test_a_ratio_that_is_not_a_number_modulates_nothing(form):
    assert modulation_coefficient(torch.tensor([math.nan, 0.5]), 0.3, form).tolist() == [1, 1]


@pytest.mark.parametrize("alpha", [-0.1, math.nan])
def test_bad_alpha(alpha):
    with pytest.raises(ValueError, match="`alpha` should be a finite number of at least 0"):
        modulation_coefficient(torch.ones(2), alpha)


def test_unknown_form():
    with pytest.raises(ValueError, match=r"`form` should be one of .*'tpami'.*Found form = 'b'"):
        modulation_coefficient(torch.ones(2), 0.1, "b")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_is_kept(dtype):
    ratio = torch.tensor([2.0, 0.5], dtype=dtype)
    assert modulation_coefficient(ratio, 0.3).dtype == dtype
    assert drop_probability(ratio).dtype == dtype


def test_drop_probability_by_hand():
    q = drop_probability(torch.tensor([2.0, 1.0, 0.5]), q_base=0.4, lam=0.5)
    assert q.tolist() == pytest.approx([0.4 * (1 + 0.5 * math.tanh(1)), 0, 0])


def test_drop_probability_stays_a_probability():
    q = drop_probability(torch.tensor([1.5, 1e9, math.inf, math.nan]), q_base=0.9, lam=5.0)
    assert q.tolist() == [1, 1, 1, 0]
    assert drop_probability(torch.tensor([3.0, 0.1]), q_base=0.0).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"q_base": -0.1}, "`q_base` should be a finite number from 0 to 1"),
        ({"q_base": 1.1}, "`q_base` should be a finite number from 0 to 1"),
        ({"q_base": math.nan}, "`q_base` should be a finite number from 0 to 1"),
        ({"lam": -1.0}, "`lam` should be a finite number of at least 0"),
    ],
)
def test_bad_drop_options(options, message):
    with pytest.raises(ValueError, match=message):
        drop_probability(torch.ones(2), **options)
