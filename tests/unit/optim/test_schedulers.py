"""Every learning-rate scheduler of torch gives the rates that it gives on the bare optimizer; warnings are errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as lr
from torch.optim.swa_utils import SWALR

import balanceopt as bo
from tests.models import watch
from tests.training import batches, groups_of, sgd, small_model, train

# Of SequentialLR itself in torch 2.6.
pytestmark = pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lr.MultiplicativeLR(o, lambda step: 0.95),
    "StepLR": lambda o: lr.StepLR(o, 2, 0.1),
    "MultiStepLR": lambda o: lr.MultiStepLR(o, [2, 4], 0.1),
    "ConstantLR": lambda o: lr.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr.LinearLR(o, 0.5, total_iters=4),
    "ExponentialLR": lambda o: lr.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr.PolynomialLR(o, 5, 2.0),
    "CosineAnnealingLR": lambda o: lr.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr.CyclicLR(o, 0.001, 0.1, step_size_up=2, cycle_momentum="momentum" in o.defaults),
    "OneCycleLR": lambda o: lr.OneCycleLR(o, 0.1, total_steps=20),
    "SequentialLR": lambda o: lr.SequentialLR(
        o, [lr.ConstantLR(o, 0.1, 2), lr.ExponentialLR(o, 0.9)], milestones=[2]
    ),
    "ChainedScheduler": lambda o: lr.ChainedScheduler([lr.ConstantLR(o, 0.1, 2), lr.ExponentialLR(o, 0.9)]),
    "ReduceLROnPlateau": lambda o: lr.ReduceLROnPlateau(o, patience=0),
    "SWALR": lambda o: SWALR(o, 0.05, anneal_epochs=3),
}

BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda groups: sgd(groups, momentum=0.9),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.1),
    "AdamW fused": lambda groups: torch.optim.AdamW(groups, lr=0.1, fused=True),
    "AdamW foreach": lambda groups: torch.optim.AdamW(groups, lr=0.1, foreach=True),
}


def schedule(base: str, name: str, form: Callable[[Any, Any], Any]) -> list[Any]:
    model = small_model()
    optimizer = form(BASES[base](groups_of(model)), watch(model))
    scheduler = SCHEDULERS[name](optimizer)
    found = []
    for one in batches(model, 6):
        train(model, optimizer, [one])
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        found.append([(g["lr"], g.get("momentum"), g.get("betas")) for g in optimizer.param_groups])
    return found


@pytest.mark.parametrize(
    ("name", "base"),
    [
        *((name, base) for name in SCHEDULERS for base in ("SGD", "AdamW")),
        *((name, base) for name in ("StepLR", "OneCycleLR") for base in ("AdamW fused", "AdamW foreach")),
    ],
)
def test_same_rates_as_on_the_bare_optimizer(name: str, base: str):
    bare = schedule(base, name, lambda o, monitor: o)
    assert schedule(base, name, lambda o, monitor: bo.ModulatedOptimizer(o, monitor, bo.OGM(0.5))) == bare


@pytest.mark.parametrize("name", SCHEDULERS)
def test_with_hooks(name: str):
    def form(optimizer: Any, monitor: Any) -> Any:
        bo.attach(optimizer, monitor, bo.OGM(0.5, noise=False, apply_to="update"))
        return optimizer

    bare = schedule("SGD", name, lambda o, monitor: o)
    assert schedule("SGD", name, form) == bare


def test_no_scheduler_is_left_out():
    public = {name for name, value in vars(lr).items() if isinstance(value, type) and name in lr.__all__}
    assert public - {"LRScheduler"} <= SCHEDULERS.keys()


def test_stepping_the_scheduler_first_is_still_warned_of():
    model = small_model()
    optimizer = bo.ModulatedOptimizer(sgd(groups_of(model)), watch(model))
    scheduler = lr.StepLR(optimizer, 1)
    with pytest.warns(UserWarning, match=r"`lr_scheduler\.step\(\)` before `optimizer\.step\(\)`"):
        scheduler.step()
