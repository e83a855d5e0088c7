"""Which bases divide a constant gradient factor out again, measured; and that `apply_to="lr"` acts on all of them."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch

import balanceopt as bo
from balanceopt.modulation import Step
from balanceopt.modulation._bases import cancels_constant_factor
from balanceopt.modulation._gradients import scale_grads_
from balanceopt.modulation._lr import scale_lr
from tests.contract.bases import BASES, Base
from tests.models import watch
from tests.training import backward, batch, groups_of, small_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True"),
    pytest.mark.filterwarnings("ignore:This overload of add"),
]

FACTOR = 0.25
# The rectified ones (RAdam, Ranger) begin as plain SGD: what they do after that counts.
FIRST, STEPS = 7, 14


class Constant(bo.Modulation):
    """The same factor on the first modality at every step."""

    def __init__(self, factor: float, apply_to: str) -> None:
        super().__init__()
        self.factor = factor
        self.apply_to = apply_to

    def modulate(self, step: Step) -> bo.modulation.Undo | None:
        name = step.modalities[0]
        if self.apply_to == "lr":
            return scale_lr(
                step.optimizer, step.slots, dict.fromkeys(step.modalities, 1.0) | {name: self.factor}
            )
        scale_grads_(step.slots[name], torch.tensor(self.factor))
        return None


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
        backward(model, batch(number, model), create_graph=base.create_graph)
        if not base.create_graph:  # Adahessian needs its own
            for p in model.parameters():
                p.grad = 0.1 * torch.randn_like(p) + 0.05
        optimizer.step()
    return math.sqrt(sum(float((w.detach() - s).square().sum()) for w, s in zip(weights, start, strict=True)))


# What the power of k is with which a parameter of MADGRAD moves: its sums of g and g^2 meet in s / cbrt(v).
MADGRAD = 2 / 3


@pytest.mark.parametrize("base", [base for base in BASES if not base.closure], ids=str)
def test_the_hint_comes_where_the_base_takes_most_of_the_factor_out(base: Base):
    listed = cancels_constant_factor(base.make(groups_of(small_model())))
    measured = movement(base, FACTOR, "grad") / movement(base, 1.0, "grad")
    assert (measured > 1.4 * FACTOR) == listed, measured


@pytest.mark.parametrize("base", [base for base in BASES if base.scales_lr], ids=str)
def test_lr_mode_moves_parameters_by_the_factor(base: Base):
    measured = movement(base, FACTOR, "lr") / movement(base, 1.0, "grad")
    expected = FACTOR**MADGRAD if "MADGRAD" in base.name else FACTOR
    assert measured == pytest.approx(expected, rel=0.05)
