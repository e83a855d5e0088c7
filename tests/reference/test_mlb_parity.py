"""MLB against its formula written naively: the rule, and the gradients of a step with the uni-modal losses' heads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import balanceopt as bo
from balanceopt.functional import balance_coefficient
from tests.models import CLASSES, watch
from tests.reference.mlb import coefficients
from tests.training import backward, batch, grad_of, groups_of, modulated, sgd, small_model


@pytest.mark.parametrize("scores", [[0.8, 0.2], [0.6, 0.3, 0.1], [0.5, 0.4999]])
@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 10.0), (2.0, 2.0), (0.0, 3.0)])
def test_the_rule(scores: list[float], alpha: float, beta: float):
    found = balance_coefficient(torch.tensor(scores, dtype=torch.float64), alpha, beta)
    expected = torch.tensor(coefficients(scores, alpha, beta), dtype=torch.float64)
    torch.testing.assert_close(found, expected)


def test_gradients_are_scaled_by_the_coefficients():
    model, optimizer = modulated(bo.MLB(0.5, beta=10))
    recorder = bo.Recorder(optimizer)
    twin = small_model()
    for one in (model, twin):
        backward(one, batch(0, one))
    optimizer.step()
    names = list(model.modalities)
    scores = [recorder.series("score")[name][1][0] for name in names]
    for name, factor in zip(names, coefficients(scores, 0.5, 10), strict=True):
        assert abs(factor - 1) > 0.1
        for p, q in zip(model.modalities[name].parameters(), twin.modalities[name].parameters(), strict=True):
            torch.testing.assert_close(grad_of(p), factor * grad_of(q))


def test_the_whole_recipe_with_the_losses_own_heads():
    objective: bo.UnimodalObjective
    model = small_model()
    monitor = watch(model, scores=lambda features: objective.unimodal_logits(features))
    objective = bo.UnimodalObjective(monitor, CLASSES, seed=0)
    base = sgd(groups_of(model))
    for name in model.modalities:
        base.add_param_group({"params": objective.head_of(name).parameters(), "modality": name})
    optimizer = bo.ModulatedOptimizer(base, monitor, bo.MLB(2.0, beta=10))
    inputs, labels = batch(0, model)
    loss = F.cross_entropy(model(*inputs), labels) + objective(labels)
    loss.backward()
    scores, before = [], {}
    for (name, encoder), x in zip(model.modalities.items(), inputs, strict=True):
        trained = [*encoder.parameters(), *objective.head_of(name).parameters()]
        before[name] = [(p, grad_of(p).clone()) for p in trained]
        logits = objective.head_of(name)(encoder.forward(x)).detach()  # no hooks
        scores.append(float(logits.softmax(1)[torch.arange(len(labels)), labels].mean()))
    joint = [(p, grad_of(p).clone()) for p in model.head.parameters()]
    optimizer.step()
    for (name, pairs), factor in zip(before.items(), coefficients(scores, 2.0, 10), strict=True):
        assert abs(factor - 1) > 1e-3, name
        for p, gradient in pairs:
            torch.testing.assert_close(grad_of(p), factor * gradient)
    assert all(torch.equal(grad_of(p), gradient) for p, gradient in joint)
