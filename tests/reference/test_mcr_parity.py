"""`CompetitionObjective` against the fusion run again with permuted features, and gradients term by term."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import balanceopt as bo
from balanceopt.functional import permutation_divergence
from tests.models import PER_HEAD, SPLIT, watch
from tests.objectives import given, permutation_of
from tests.reference.mcr import FACTORS, divergence, gradients
from tests.training import grad_of

ADDITIVE = {**SPLIT, **PER_HEAD}


def test_the_rule():
    logits, permuted = 3 * torch.randn(2, 6, 4, dtype=torch.float64)
    rows = zip(logits.softmax(1).tolist(), permuted.softmax(1).tolist(), strict=True)
    expected = torch.tensor([divergence(p, q) for p, q in rows], dtype=torch.float64)
    torch.testing.assert_close(permutation_divergence(logits, permuted), expected)


@pytest.mark.parametrize("strategy", FACTORS)
@pytest.mark.parametrize("modalities", [2, 3])
@pytest.mark.parametrize("kind", ADDITIVE)
def test_value_and_gradients(kind: str, modalities: int, strategy: Any):
    model = ADDITIVE[kind](modalities).double()
    twin = copy.deepcopy(model)
    competition = bo.CompetitionObjective(watch(model), weight=0.7, strategy=strategy, samples=2, seed=5)
    for step in range(2):
        inputs, labels = given(modalities, seed=step)
        model.zero_grad()
        loss = F.cross_entropy(model(*inputs), labels)
        term = competition()
        (loss + term).backward()
        drawn = {
            name: [permutation_of(m, len(labels), seed=5, call=step, number=n) for n in range(2)]
            for m, name in enumerate(model.names)
        }
        value, expected = gradients(twin, inputs, drawn, strategy)
        torch.testing.assert_close(term, 0.7 * value)
        twin.zero_grad()
        F.cross_entropy(twin(*inputs), labels).backward()
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(grad_of(p), grad_of(q) + 0.7 * expected[name], msg=name)
