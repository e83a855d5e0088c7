"""`UnimodalObjective(joint=...)` against gradients that are put together by hand at the features."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import balanceopt as bo
from balanceopt.functional import mixed_gradient
from tests.models import CLASSES, FUSIONS, Concat, SumHeads, watch
from tests.objectives import given
from tests.reference.dgl import gradients, mixed

WEIGHT = 1.7
SHARES = [0.0, 0.3, 1.0]


@pytest.mark.parametrize("share", SHARES)
def test_the_rule(share: float):
    joint, unimodal = torch.randn(2, 7, dtype=torch.float64)
    expected = torch.tensor(mixed(joint.tolist(), unimodal.tolist(), share), dtype=torch.float64)
    torch.testing.assert_close(mixed_gradient(joint, unimodal, share), expected)


def training_step(model: Any, objective: bo.UnimodalObjective, inputs: Any, labels: Any) -> None:
    torch.manual_seed(1)  # of dropout in the fusion
    loss = F.cross_entropy(model(*inputs), labels)
    (loss if objective.inject else loss + objective(labels)).backward()


def same(model: Any, expected: dict[str, torch.Tensor], skipped: str = "-") -> None:
    for name, p in model.named_parameters():
        if not name.startswith(skipped):
            torch.testing.assert_close(p.grad, expected[name], msg=name)


@pytest.mark.parametrize("inject", [False, True])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("modalities", [2, 3])
@pytest.mark.parametrize("kind", [kind for kind in FUSIONS if kind != "inline"])
def test_heads_of_their_own(kind: str, modalities: int, share: float, inject: bool):
    model = FUSIONS[kind](modalities).double()
    twin = copy.deepcopy(model)
    options: dict[str, Any] = {"weight": WEIGHT, "joint": share, "inject": inject, "seed": 0}
    objective = bo.UnimodalObjective(watch(model), CLASSES, **options).double()
    inputs, labels = given(modalities)
    training_step(model, objective, inputs, labels)
    torch.manual_seed(1)
    heads = {name: objective.head_of(name) for name in model.names}
    same(model, gradients(twin, heads, inputs, labels, WEIGHT, share))


@pytest.mark.parametrize("inject", [False, True])
@pytest.mark.parametrize("modalities", [2, 3])
@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("make", [Concat, SumHeads])
def test_the_shared_head(make: Any, share: float, modalities: int, inject: bool):
    model = make(modalities).double()
    twin, alone = copy.deepcopy(model), copy.deepcopy(model)
    options: dict[str, Any] = {"weight": WEIGHT, "joint": share, "inject": inject, "heads": "shared"}
    objective = bo.UnimodalObjective(watch(model), CLASSES, **options)
    inputs, labels = given(modalities)
    training_step(model, objective, inputs, labels)

    def logits_of(model: Any, index: int, name: str) -> Any:
        if make is SumHeads:
            return model.own_heads[name]
        columns = slice(4 * index, 4 * index + 4)
        return lambda z: F.linear(z, model.head.weight[:, columns], model.head.bias / modalities)

    expected = gradients(
        twin, {n: logits_of(twin, i, n) for i, n in enumerate(twin.names)}, inputs, labels, WEIGHT, share
    )
    # The head gets that share of what the uni-modal losses say of it.
    for index, (name, x) in enumerate(zip(alone.names, inputs, strict=True)):
        z = alone.encoders[name](x).detach()
        (share * WEIGHT * F.cross_entropy(logits_of(alone, index, name)(z), labels)).backward()
    for name, p in alone.named_parameters():
        if p.grad is not None:
            expected[name] = expected[name] + p.grad
    same(model, expected)
