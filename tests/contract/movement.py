"""How far a base moves one modality's weights, with and without a constant factor on its gradients or updates."""

from __future__ import annotations

import math
from functools import cache

import torch

import balanceopt as bo
from balanceopt.modulation import StepContext
from balanceopt.modulation._scaling import scale_grads_
from tests.contract.bases import Base
from tests.models import watch
from tests.training import backward, batch, groups_of, small_model

FACTOR = 0.25
# The rectified ones (RAdam, Ranger) begin as plain SGD: what they do after that counts.
FIRST, STEPS = 7, 14


class Constant(bo.Modulation):
    """The same factor on the first modality at every step."""

    needs_scores = False

    def __init__(self, factor: float, apply_to: str) -> None:
        super().__init__()
        self.factor = factor
        self.apply_to = apply_to

    def modulate(self, step: StepContext) -> None:
        name = step.modalities[0]
        if self.apply_to == "update":
            step.scale_update([slot.parameter for slot in step.slots[name]], torch.tensor(self.factor))
        else:
            scale_grads_(step.slots[name], torch.tensor(self.factor))


@cache
def movement(base: Base, factor: float, apply_to: str) -> float:
    """How far the first modality's weights move from step FIRST to step STEPS with given gradients."""
    model = small_model()
    optimizer = bo.ModulatedOptimizer(base.make(groups_of(model)), watch(model), Constant(factor, apply_to))
    weights = [p for p in model.modalities["audio"].parameters() if p.dim() == 2]
    start: list[torch.Tensor] = []
    for number in range(STEPS):
        if number == FIRST:
            start = [w.detach().clone() for w in weights]
        torch.manual_seed(number)
        optimizer.zero_grad()
        if base.create_graph:
            backward(model, batch(number, model), create_graph=True)
        else:
            for p in model.parameters():
                p.grad = 0.1 * torch.randn_like(p) + 0.05
        optimizer.step()
    return math.sqrt(sum(float((w.detach() - s).square().sum()) for w, s in zip(weights, start, strict=True)))
