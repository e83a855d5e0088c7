"""AGM against its formulas written naively, and against the published construction through autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import balanceopt as bo
from balanceopt.functional import adaptive_coefficient
from tests.models import Concat, watch
from tests.reference.agm import coefficients
from tests.training import Batch, backward, batch, grad_of, sgd, small_model


class Scaled(torch.autograd.Function):
    """The identity whose gradient is multiplied, as the published code's backward hooks do."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None  # type: ignore[attr-defined]


def parts(model: Concat, given: Batch) -> list[Tensor]:
    """Each modality's Shapley value of the logits, zeros for what is missing: its columns, and a share of the bias."""
    names = list(model.modalities)
    features = [model.modalities[name](x) for name, x in zip(names, given[0], strict=True)]
    head = model.head
    assert isinstance(head, torch.nn.Linear)
    columns = head.weight.split([z.shape[1] for z in features], dim=1)
    return [F.linear(z, w, head.bias / len(names)) for z, w in zip(features, columns, strict=True)]


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_the_rule(alpha: float):
    history = [[0.5, 1.5, 1.0], [0.2, 1.4, 0.9], [0.1, 1.6, 0.3]]
    current, running = torch.tensor(history[-1]), torch.tensor(history).mean(0)
    found = adaptive_coefficient(current, running, alpha, 1.0)
    torch.testing.assert_close(found, torch.tensor(coefficients(history, alpha, 1.0)))


def test_gradients_are_those_of_the_published_construction():
    model, twin = small_model(), small_model()
    optimizer = bo.ModulatedOptimizer(sgd(model.parameters(), lr=0.0), watch(model), bo.AGM(2.0))
    history: list[list[float]] = []
    for number in range(3):
        given = batch(number, model)
        optimizer.zero_grad()
        backward(model, given)
        optimizer.step()
        with torch.no_grad():
            history.append([float(F.cross_entropy(part, given[1])) for part in parts(twin, given)])
    factors = coefficients(history, 2.0, 10.0)
    assert max(abs(k - 1) for k in factors) > 0.01  # there is something to see
    shown = [Scaled.apply(part, k) for part, k in zip(parts(twin, given), factors, strict=True)]
    F.cross_entropy(torch.stack(shown).sum(0), given[1]).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(grad_of(p), grad_of(q), rtol=1e-4, atol=1e-6)
