"""Training runs that the tests of optimizers share: a small model, batches that depend on nothing but their number."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import balanceopt as bo
from tests.models import INPUTS, Concat, Multimodal, watch

MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
Batch = tuple[list[Tensor], Tensor]


def batch(number: int, model: Multimodal, size: int = 8) -> Batch:
    """The `number`-th batch: the first modality alone shows the class."""
    generator = torch.Generator().manual_seed(1000 + number)
    classes = int(model.get_parameter("head.weight").shape[0])
    labels = torch.randint(classes, (size,), generator=generator)
    inputs = [torch.randn(size, n, generator=generator) for n in INPUTS[: len(model.modalities)]]
    inputs[0] = inputs[0] + 3 * F.one_hot(labels, INPUTS[0])
    return inputs, labels


def batches(model: Multimodal, count: int, first: int = 0) -> list[Batch]:
    return [batch(first + i, model) for i in range(count)]


def small_model(modalities: int = 2, **options: Any) -> Concat:
    """The same one each time, trained until the first modality dominates; leaves the global random stream alone."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = Concat(modalities, **options)
    if not options:
        model.load_state_dict(_trained(modalities))
    return model


@cache
def _trained(modalities: int) -> dict[str, Tensor]:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = Concat(modalities)
    train(model, sgd(model.parameters()), batches(model, 60, first=1000))
    return model.state_dict()


def groups_of(model: Multimodal) -> list[dict[str, Any]]:
    return bo.modality_groups(model, model.modalities)


def sgd(groups: Any, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(groups, **{"lr": 0.1, **options})


def modulated(
    modulation: Any = None, make: MakeOptimizer = sgd, *, seed: int = 7, **options: Any
) -> tuple[Concat, bo.ModulatedOptimizer]:
    """A small model and its wrapped optimizer; noiseless OGM on SGD by default."""
    model = small_model(**options)
    modulation = bo.OGM(0.5, noise=False) if modulation is None else modulation
    return model, bo.ModulatedOptimizer(make(groups_of(model)), watch(model), modulation, seed=seed)


def bare(make: MakeOptimizer = sgd, **options: Any) -> tuple[Concat, torch.optim.Optimizer]:
    model = small_model(**options)
    return model, make(groups_of(model))


def backward(model: nn.Module, given: Batch, *, create_graph: bool = False) -> Tensor:
    inputs, labels = given
    loss = F.cross_entropy(model(*inputs), labels)
    loss.backward(create_graph=create_graph)
    return loss.detach()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, given: Iterable[Batch]) -> None:
    """The user's own loop."""
    for one in given:
        optimizer.zero_grad()
        backward(model, one)
        optimizer.step()


def grad_of(parameter: Tensor) -> Tensor:
    """Its gradient, which is there."""
    assert parameter.grad is not None
    return parameter.grad


def bits(x: Tensor) -> Tensor:
    """The bytes, so that NaN equals itself and -0.0 differs from 0.0."""
    return x.detach().contiguous().view(-1).view(torch.uint8)


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(bits(x), bits(y)) for x, y in pairs)


def distance(a: nn.Module, b: nn.Module) -> float:
    """The largest difference of any two parameters."""
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((x - y).detach().abs().max()) for x, y in pairs)


def answering(*certainty: float) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """For `scores=`: uni-modal logits that give class 0 the probability `certainty[m]`, whatever the features."""

    def logits(features: dict[str, Tensor]) -> dict[str, Tensor]:
        rows = [torch.tensor([p, 1 - p, 0.0, 0.0, 0.0]).log() for p in certainty]
        return {name: row.expand(len(features[name]), -1) for name, row in zip(features, rows, strict=True)}

    return logits


def class_zero(model: Multimodal, number: int = 0) -> Batch:
    """A batch of class 0 alone, as `answering` expects it."""
    inputs, labels = batch(number, model)
    return inputs, torch.zeros_like(labels)
