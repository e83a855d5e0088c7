"""What must hold of MLB's rule for any scores."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import balanceopt as bo
from balanceopt.functional import balance_coefficient
from tests.training import batches, modulated, same_bits, small_model, train

scores = st.lists(st.floats(2**-10, 1, width=32), min_size=2, max_size=5)
strengths = st.floats(0.01, 4)
largest = st.floats(1, 20)


def rule(values: list[float], alpha: float = 0.5, beta: float = 2.0) -> Tensor:
    return balance_coefficient(torch.tensor(values, dtype=torch.float64), alpha, beta)


@given(scores, strengths, largest)
def test_bounds(values: list[float], alpha: float, beta: float):
    k = rule(values, alpha, beta)
    assert bool((k >= (1 - math.tanh(alpha)) * (1 - 1e-12)).all())
    assert bool((k <= beta).all())


@given(scores, strengths, largest, st.integers(0, 4), st.floats(1.01, 4))
def test_it_falls_with_the_own_score_and_grows_with_the_others(
    values: list[float], alpha: float, beta: float, index: int, factor: float
):
    index %= len(values)
    raised = [v * factor if i == index else v for i, v in enumerate(values)]
    before, after = rule(values, alpha, beta), rule(raised, alpha, beta)
    rest = torch.arange(len(values)) != index
    assert float(after[index]) <= float(before[index]) + 1e-12
    assert bool((after[rest] >= before[rest] - 1e-12).all())


@given(scores, strengths, largest, st.floats(0.01, 100))
def test_a_common_factor_does_not_matter(values: list[float], alpha: float, beta: float, factor: float):
    moved = rule([factor * v for v in values], alpha, beta)
    torch.testing.assert_close(rule(values, alpha, beta), moved, rtol=1e-6, atol=1e-9)


@given(scores, strengths, largest, st.randoms())
def test_order_of_modalities_does_not_matter(values: list[float], alpha: float, beta: float, random: object):
    order = list(range(len(values)))
    random.shuffle(order)  # type: ignore[attr-defined]
    moved = rule([values[i] for i in order], alpha, beta)
    torch.testing.assert_close(rule(values, alpha, beta)[torch.tensor(order)], moved, rtol=1e-9, atol=1e-12)


@given(st.floats(2**-10, 1, width=32), st.floats(2**-10, 1, width=32), strengths)
def test_of_two_one_is_sped_up_where_the_other_is_slowed(a: float, b: float, alpha: float):
    assume(abs(a - b) > 1e-3)
    k = rule([a, b], alpha)
    weaker = 0 if a < b else 1
    assert float(k[weaker]) > 1 > float(k[1 - weaker])


@given(strengths, largest)
def test_it_is_continuous_where_the_modalities_are_equal(alpha: float, beta: float):
    k = rule([0.5, 0.5 + 1e-12], alpha, beta)
    torch.testing.assert_close(k, torch.ones_like(k), rtol=0, atol=1e-9)


@given(st.floats(2**-10, 1, width=32), st.integers(1, 5), strengths, largest)
def test_equal_scores_and_one_modality_have_one_exactly(s: float, count: int, alpha: float, beta: float):
    assert bool((balance_coefficient(torch.tensor([s] * count), alpha, beta) == 1).all())


@given(scores, largest)
def test_without_strength_it_is_one_exactly(values: list[float], beta: float):
    assert bool((rule([*values, 0.0], 0.0, beta) == 1).all())


@given(scores)
def test_arguments_stay_and_absent_modalities_are_left_out(values: list[float]):
    given_scores = torch.tensor([0.9, *values])
    before = given_scores.clone()
    present = torch.ones(len(given_scores), dtype=torch.bool)
    present[0] = False
    k = balance_coefficient(given_scores, present=present)
    assert float(k[0]) == 1
    torch.testing.assert_close(k[1:], balance_coefficient(given_scores[1:]))
    assert torch.equal(given_scores, before)


def test_a_score_of_zero_is_finite():
    assert balance_coefficient(torch.tensor([0.0, 0.5]), 0.5, 7.0).tolist()[0] == 7
    assert balance_coefficient(torch.zeros(3)).tolist() == [1, 1, 1]


@pytest.mark.parametrize("bad", [{"alpha": -1}, {"alpha": math.nan}, {"beta": 0.5}, {"beta": math.inf}])
def test_options_outside_their_range(bad: dict[str, Any]):
    with pytest.raises(ValueError, match="should be a finite number of at least"):
        bo.MLB(**bad)


def test_unusable_scores_leave_the_base_alone():
    model, optimizer = modulated(bo.MLB())
    twin = small_model()
    inputs, labels = batches(model, 1)[0]
    broken = [(inputs, torch.full_like(labels, -100))]
    with pytest.warns(UserWarning, match="can't be used|not finite|no scores"):
        train(model, optimizer, broken)
    train(twin, torch.optim.SGD(twin.parameters(), lr=0.1), broken)
    assert same_bits(model, twin)
