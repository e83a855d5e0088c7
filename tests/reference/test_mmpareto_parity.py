"""MMPareto against its formulas on lists of numbers, in both scopes, with and without conflict."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import balanceopt as bo
from balanceopt.functional import min_norm_weight, pareto_gradient
from tests.models import CLASSES, FUSIONS, Concat, watch
from tests.objectives import given
from tests.reference.mmpareto import combine, dot, encoder_gradients, flat, weight


@pytest.mark.parametrize("seed", range(20))
def test_the_rule(seed: int):
    generator = torch.Generator().manual_seed(seed)
    joint, unimodal = torch.randn(2, 4, dtype=torch.float64, generator=generator)
    j, u = joint.tolist(), unimodal.tolist()
    expected = torch.tensor(combine(j, u, 1.3), dtype=torch.float64)
    torch.testing.assert_close(pareto_gradient(joint, unimodal, 1.3), expected)
    sums = (torch.tensor(dot(a, b), dtype=torch.float64) for a, b in ((j, j), (u, u), (j, u)))
    assert float(min_norm_weight(*sums)) == pytest.approx(weight(j, u))


def both_gradients(model: Any, objective: bo.UnimodalObjective, **options: Any) -> None:
    groups = [{"params": list(model.parameters())}, {"params": list(objective.parameters())}]
    method = bo.MMPareto(objective, **options)
    optimizer = bo.ModulatedOptimizer(torch.optim.SGD(groups, lr=0.1), objective.monitor, method)
    inputs, labels = given(len(model.names))
    torch.manual_seed(1)  # of dropout in the fusion
    F.cross_entropy(model(*inputs), labels).backward()
    before = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p.grad, b) for p, b in zip(model.parameters(), before, strict=True))
    assert optimizer.stats()["modulated"] == 1


@pytest.mark.parametrize("scope", ["output", "encoder"])
@pytest.mark.parametrize("conflict", [False, True])
@pytest.mark.parametrize("modalities", [2, 3])
@pytest.mark.parametrize("kind", [kind for kind in FUSIONS if kind != "inline"])
def test_encoders_get_the_combined_gradient(kind: str, modalities: int, conflict: bool, scope: Any):
    torch.manual_seed(0)
    model = FUSIONS[kind](modalities).double()
    objective = bo.UnimodalObjective(watch(model), CLASSES, inject=True, seed=0).double()
    inputs, labels = given(modalities)
    F.cross_entropy(model(*inputs), labels).backward()  # builds the heads
    model.zero_grad()
    objective.zero_grad()
    if conflict:  # heads that have learnt the wrong sign
        with torch.no_grad():
            for name in model.names:
                objective.head_of(name).weight.mul_(-3)
    twin = copy.deepcopy(model)
    heads = {name: copy.deepcopy(objective.head_of(name)) for name in model.names}
    both_gradients(model, objective, gamma=1.3, scope=scope)
    torch.manual_seed(1)
    expected = encoder_gradients(twin, heads, inputs, labels, 1.3, scope)
    for name, encoder in model.modalities.items():
        result = flat([p.grad for p in encoder.parameters() if p.grad is not None])
        assert result == pytest.approx(expected[name], rel=1e-6, abs=1e-9)


def test_joint_and_uni_modal_gradients_are_measured_apart():
    """A library took the joint gradient for both, so that the combined one was always the same multiple of the sum."""
    torch.manual_seed(0)
    model = Concat(3).double()
    plain = copy.deepcopy(model)
    gradients = []
    for one, act in ((model, True), (plain, False)):
        objective = bo.UnimodalObjective(watch(one), CLASSES, inject=True, seed=0).double()
        inputs, labels = given(3)
        optimizer: Any = torch.optim.SGD([*one.parameters(), *objective.parameters()], lr=0.1)
        if act:
            optimizer = bo.ModulatedOptimizer(optimizer, objective.monitor, bo.MMPareto(objective, gamma=1))
        for _ in range(2):
            F.cross_entropy(one(*inputs), labels).backward()
            with torch.no_grad():
                for name in one.names:
                    objective.head_of(name).weight.mul_(-5)
            one.zero_grad()
        F.cross_entropy(one(*inputs), labels).backward()
        gradients.append([p.grad for p in one.encoders.parameters()])
    ratios = torch.cat([(a / b).flatten() for a, b in zip(*gradients, strict=True)])
    assert float(ratios.std()) > 0.01
