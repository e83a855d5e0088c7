"""TCMax's loss against all B^M x C combinations, and its gradients against autograd on all of them written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import balanceopt as bo
from balanceopt.functional import total_correlation_loss
from tests.models import PER_HEAD, SPLIT, watch
from tests.objectives import given
from tests.reference.tcmax import total_correlation_loss as naive


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("modalities", "size", "classes"), [(1, 4, 3), (2, 5, 3), (3, 4, 4), (4, 3, 2)])
def test_the_rule(modalities: int, size: int, classes: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(modalities, size, classes, dtype=torch.float64, generator=generator)
    labels = torch.randint(classes, (size,), generator=generator)
    expected = naive(logits.tolist(), labels.tolist())
    assert float(total_correlation_loss(list(logits), labels)) == pytest.approx(expected, rel=1e-12)


def combined(logits: list[Tensor], labels: Tensor) -> Tensor:
    """The naive loss of two or three modalities as tensors, for autograd."""
    size = len(labels)
    joint: Any = 0
    for m, rows in enumerate(logits):
        shape = [1] * len(logits)
        shape[m] = size
        joint = joint + rows.view(*shape, -1)
    of_labels = sum(rows[i, y] for rows in logits for i, y in enumerate(labels.tolist()))
    return joint.exp().sum().log() - of_labels / size - torch.tensor(size).log()


def parts(model: Any, inputs: list[Tensor]) -> list[Tensor]:
    """Each modality's part of the joint logits."""
    features = [encoder.forward(x) for encoder, x in zip(model.encoders.values(), inputs, strict=True)]
    if hasattr(model, "own_heads"):
        return [head.forward(z) for head, z in zip(model.own_heads.values(), features, strict=True)]
    bias = 0 if model.head.bias is None else model.head.bias / len(features)
    columns = model.head.weight.split(model.widths[0], 1)
    return [features[i] @ columns[at].T + bias for at, i in enumerate(model.order)]


@pytest.mark.parametrize("modalities", [2, 3])
@pytest.mark.parametrize("kind", [*SPLIT, *PER_HEAD])
def test_everything_gets_the_gradient_of_all_combinations(kind: str, modalities: int):
    torch.manual_seed(0)
    model = {**SPLIT, **PER_HEAD}[kind](modalities).double()
    objective = bo.TotalCorrelationLoss(watch(model), weight=0.7)
    inputs, labels = given(modalities)
    for _ in range(2):  # the second time the layout is known from the first
        model.zero_grad()
        model(*inputs)
        loss = objective(labels)
        loss.backward()
    expected = 0.7 * combined(parts(model, inputs), labels)
    torch.testing.assert_close(loss, expected)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    for (name, p), g in zip(model.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, g, msg=name)
