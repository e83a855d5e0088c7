"""Steps of AMSS with chosen significances and gradients, without a forward pass; and what real steps masked."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import balanceopt as bo
from balanceopt.modulation import Slot, StepContext
from balanceopt.monitor import Scores
from tests.models import Multimodal, watch
from tests.training import grad_of, groups_of, small_model

CLASSES = 5

# Of SGD.
SGD_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.5},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "weight decay": {"momentum": 0.9, "weight_decay": 0.1},
    "maximize": {"momentum": 0.9, "weight_decay": 0.1, "maximize": True},
    "foreach": {"momentum": 0.9, "weight_decay": 0.1, "foreach": True},
    "fused": {"momentum": 0.9, "weight_decay": 0.1, "fused": True},
    "loop": {"momentum": 0.9, "weight_decay": 0.1, "foreach": False, "fused": False},
}
every_option = pytest.mark.parametrize("options", SGD_OPTIONS.values(), ids=SGD_OPTIONS)


class Encoders(nn.Module):
    """Modules side by side with a linear head; only ever given gradients."""

    def __init__(self, **encoders: nn.Module) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(encoders)
        self.head = nn.Linear(2 * len(encoders), CLASSES)

    @property
    def modalities(self) -> dict[str, nn.Module]:
        return dict(self.encoders.items())


def sums(*significance: float | None, count: float = 10) -> Scores:
    """Sums whose significance is the one asked for; a modality that is None was absent."""
    here = torch.tensor([u is not None for u in significance])
    u = torch.tensor([u or 0.0 for u in significance])
    cross_entropy = count * (math.log(CLASSES) + 0.5 - u)
    return Scores(
        score=torch.where(here, 0.3 * count, 0),
        count=torch.where(here, count, 0.0),
        cross_entropy=torch.where(here, cross_entropy, 0),
        feature_entropy=torch.where(here, count, 0.0),
        parts=torch.full((CLASSES,), count / CLASSES),
    )


def fill_gradients(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Random gradients, of different size from unit to unit; returns copies by name."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, p in model.named_parameters():
        scale = torch.rand(p.shape[:1] + (1,) * (p.dim() - 1), generator=generator)
        p.grad = (torch.randn(p.shape, generator=generator) * scale**3).to(p)
        found[name] = p.grad.clone()
    return found


def step_of(
    model: Any, given: Scores, *, number: int = 0, seed: int = 7, optimizer: Any = None, **options: Any
) -> StepContext:
    """A step as the engine would make it."""
    groups = bo.modality_groups(model, model.modalities)
    base = torch.optim.SGD(groups, lr=0.1) if optimizer is None else optimizer
    held = [p for group in base.param_groups for p in group["params"]]
    graded = {id(p): Slot(index, p) for index, p in enumerate(held) if p.grad is not None}
    slots = {
        name: [graded[id(p)] for p in encoder.parameters() if id(p) in graded]
        for name, encoder in model.modalities.items()
    }
    monitor = bo.ModalityMonitor(model, model.modalities, head=model.head, scores="split", **options)
    return StepContext(given, monitor.modalities, slots, base, seed, number, monitor=monitor)


def mask(modulation: bo.AMSS, model: Any, *significance: float | None, **options: Any) -> dict[str, Tensor]:
    """Fill gradients, mask them, and return by what each was multiplied."""
    before = fill_gradients(model)
    modulation.modulate(step_of(model, sums(*significance), **options))
    return factors(model, before)


def factors(model: nn.Module, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """By what each gradient was multiplied, element by element."""
    return {name: grad_of(p) / before[name] for name, p in model.named_parameters()}


def kept(factor: Tensor, dim: int = 0) -> int:
    """How many slices along a dimension were not masked, each as a whole."""
    flat = factor.movedim(dim, 0).flatten(1) != 0
    assert torch.equal(flat.all(1), flat.any(1))
    return int(flat.all(1).sum())


def masked(**options: Any) -> tuple[Multimodal, bo.MaskedSubnetworkSGD]:
    model = small_model()
    given = {"lr": 0.1, "seed": 3, **options}
    return model, bo.MaskedSubnetworkSGD(groups_of(model), watch(model), **given)


def weights(model: Multimodal) -> list[Tensor]:
    """What is masked: the encoders' matrices, by rows."""
    return [p for encoder in model.modalities.values() for p in encoder.parameters() if p.dim() > 1]


def masked_rows(before: list[Tensor], after: list[Tensor]) -> list[Tensor]:
    """The rows whose gradient was set to zero."""
    return [(b != 0).any(1) & (a == 0).all(1) for b, a in zip(before, after, strict=True)]
