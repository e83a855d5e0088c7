"""Own heads that no optimizer holds never train: said after the first step."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F

import balanceopt as bo
from tests.models import CLASSES, Concat, batch, watch


def run(inject, *, held, steps=3, accumulate=1):
    model = Concat()
    objective = bo.UnimodalObjective(watch(model), CLASSES, inject=inject)
    optimizers = [torch.optim.SGD(model.parameters(), 0.1)]
    if held == "beside":
        optimizers[0].add_param_group({"params": list(objective.parameters())})
    elif held == "apart":
        optimizers.append(torch.optim.SGD(objective.parameters(), 0.1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            for optimizer in optimizers:
                optimizer.zero_grad()
            for _ in range(accumulate):
                inputs, labels = batch(8)
                loss = F.cross_entropy(model(*inputs), labels)
                (loss if inject else loss + objective(labels)).backward()
            for optimizer in optimizers:
                optimizer.step()
    return [str(one.message) for one in caught]


@pytest.mark.parametrize("inject", [False, True])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_heads_that_no_optimizer_holds_are_said_once(inject, accumulate):
    (message,) = run(inject, held=None, accumulate=accumulate)
    assert "own heads are not trained" in message
    assert "list(objective.parameters())" in message


@pytest.mark.parametrize("inject", [False, True])
@pytest.mark.parametrize("held", ["beside", "apart"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_nothing_is_said_of_heads_that_are_trained(inject, held, accumulate):
    assert run(inject, held=held, accumulate=accumulate) == []


@pytest.mark.parametrize("inject", [False, True])
def test_nothing_is_said_before_a_step(inject):
    assert run(inject, held=None, steps=1, accumulate=3) == []
