"""Constant coefficients against learning rates of each encoder's own, and PDMP's rule against its words."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

import balanceopt as bo
from balanceopt.functional import priority_coefficients
from tests.reference.fixed import priority, sgd_by_modality
from tests.training import batches, distance, modulated, same_bits, small_model, train


@pytest.mark.parametrize("accuracy", [[0.5, 0.7, 0.6], [0.7, 0.7], [0.2]])
def test_the_rule(accuracy: list[float]):
    found = priority_coefficients(torch.tensor(accuracy), 2.0, 0.25)
    assert found.tolist() == priority(accuracy, 2.0, 0.25)


@pytest.mark.parametrize("apply_to", ["grad", "update"])
@pytest.mark.parametrize("factors", [{"audio": 0.5, "visual": 4.0}, {"audio": 0.0}, {"visual": 0.3}])
def test_on_plain_sgd_it_is_a_learning_rate_of_its_own(factors: Mapping[str, float], apply_to: str):
    model, optimizer = modulated(bo.FixedModulation(factors, apply_to=apply_to))  # type: ignore[arg-type]
    twin = small_model()
    train(model, optimizer, batches(model, 5))
    train(twin, sgd_by_modality(twin, factors, 0.1), batches(twin, 5))
    exact = apply_to == "grad" and 0.3 not in factors.values()  # a power of two is no rounding
    assert same_bits(model, twin) if exact else distance(model, twin) < 1e-6
