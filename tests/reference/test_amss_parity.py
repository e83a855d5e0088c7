"""The package's AMSS rules against the formulas written out naively."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from balanceopt.functional import (
    inclusion_probabilities,
    keep_ratio,
    sample_units_padded,
    systematic_sample_padded,
    unit_importance,
)
from tests.reference import amss


@pytest.mark.parametrize(
    "u",
    [[0.34, 0.08], [0.2, 0.2], [5.0, 0.1], [0.3, 0.2, 0.25], [0.3, -0.1], [0.0, 1.0], [math.nan, 1.0], [0.4]],
)
@pytest.mark.parametrize("temperature", [0.2, 0.5, 3.0])
def test_keep_ratio(u, temperature):
    expected = amss.keep_ratio(u, temperature, 0.1, 0.9)
    found = keep_ratio(torch.tensor(u, dtype=torch.float64), temperature)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_keep_ratio_of_two_modalities_is_the_published_form():
    expected = amss.keep_ratio_of_two(0.3, 0.2, 0.2)
    assert keep_ratio(torch.tensor([0.3, 0.2], dtype=torch.float64)).tolist() == pytest.approx(expected)


def test_unit_importance():
    grad = torch.randn(5, 12, dtype=torch.float64)
    expected = amss.unit_importance(grad.tolist())
    assert unit_importance(grad.view(5, 3, 2, 2)).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    "importance", [[1.0, 1, 1, 1], [1.0, 2, 3, 4], [0.01, 0.1, 1, 10], [5.0, 5, 1, 1e-3]]
)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_sample_units_has_the_inclusion_probabilities_of_successive_draws(importance, k):
    draws = 20_000
    rows = torch.tensor(importance).expand(draws, 4)
    sizes, count = torch.full((draws,), 4), torch.full((draws,), k)
    masks = sample_units_padded(rows, sizes, count, torch.rand(draws, 4, dtype=torch.float64))
    expected = torch.tensor(amss.successive_inclusion(importance, k))
    # A frequency has standard deviation sqrt(pi (1 - pi) / draws); 4.5 of them leave 7e-6 per comparison.
    bound = 4.5 * (expected * (1 - expected) / draws).sqrt() + 1e-6
    assert ((masks.double().mean(0) - expected).abs() <= bound).all()


@pytest.mark.parametrize("budget", [0.3, 1.0, 2.0, 2.5, 3.0, 3.9, 4.0, 9.0])
@pytest.mark.parametrize(
    "s", [[1.0, 1, 1, 1, 0], [10.0, 1, 1, 1, 1], [1e6, 1e3, 1, 1e-3, 0], [3.0, 3, 3, 1e-8, 1e-9]]
)
def test_inclusion_probabilities(s, budget):
    found = inclusion_probabilities(torch.tensor(s, dtype=torch.float64), budget)
    expected = torch.tensor(amss.capped_probabilities(s, budget), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


def test_systematic_sample():
    pi = [0.3, 0.65, 0.05, 0.5, 0.2]
    orders = list(itertools.permutations(range(5)))
    starts = torch.rand(len(orders), dtype=torch.float64)
    # Uniform numbers whose sorting gives the order: unit order[i] has the i-th smallest.
    keys = torch.tensor([[order.index(j) / 5 for j in range(5)] for order in orders], dtype=torch.float64)
    found = systematic_sample_padded(
        torch.tensor(pi, dtype=torch.float64).expand(len(orders), 5), starts, keys
    )
    expected = [amss.systematic_sample(pi, list(o), float(u)) for o, u in zip(orders, starts, strict=True)]
    assert found.tolist() == expected
