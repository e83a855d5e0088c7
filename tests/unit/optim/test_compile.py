"""A compiled step is the step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

import balanceopt as bo
from tests.models import watch
from tests.training import backward, batches, distance, groups_of, sgd, small_model

pytestmark = [  # torch's own, met while it traces
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda groups: sgd(groups, momentum=0.9),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01),
}
MODULATIONS = {
    "noise": partial(bo.OGM, 0.5),
    "update": partial(bo.OGM, 0.5, noise=False, apply_to="update"),
}


def hooked(base: Any, monitor: Any, modulation: Any, seed: int) -> Any:
    bo.attach(base, monitor, modulation, seed=seed)
    return base


def run(form: Any, base: str, modulation: str, *, compiled: bool) -> torch.nn.Module:
    model = small_model()
    optimizer = form(BASES[base](groups_of(model)), watch(model), MODULATIONS[modulation](), seed=1)
    step: Callable[[], Any] = lambda: optimizer.step()  # noqa: E731
    if compiled:
        step = torch.compile(step, backend="eager")
    for one in batches(model, 4):
        optimizer.zero_grad()
        backward(model, one)
        step()
    assert optimizer.param_groups[0]["balanceopt_step"] == 4
    assert len(optimizer.param_groups) == 3
    return model


@pytest.mark.parametrize(
    ("form", "base", "modulation"),
    [
        (bo.ModulatedOptimizer, "sgd", "noise"),
        (bo.ModulatedOptimizer, "adamw", "update"),
        (hooked, "sgd", "update"),
        (hooked, "adamw", "noise"),
    ],
)
def test_compiled_step(form: Any, base: str, modulation: str):
    eager = run(form, base, modulation, compiled=False)
    assert distance(eager, run(form, base, modulation, compiled=True)) < 1e-6


def test_a_compiled_base_under_an_eager_wrapper():
    def run_with(compiled: bool) -> torch.nn.Module:
        model = small_model()
        base = BASES["adamw"](groups_of(model))
        if compiled:
            vars(base)["step"] = torch.compile(base.step, backend="eager")
        optimizer = bo.ModulatedOptimizer(base, watch(model), bo.OGM(0.5), seed=1)
        for one in batches(model, 4):
            optimizer.zero_grad()
            backward(model, one)
            optimizer.step()
        return model

    assert distance(run_with(False), run_with(True)) < 1e-6


def test_a_compiled_model():
    model = small_model()
    optimizer = bo.ModulatedOptimizer(sgd(groups_of(model)), watch(model), bo.OGM(0.5), seed=1)
    compiled: Any = torch.compile(model, backend="eager")
    for one in batches(model, 3):
        optimizer.zero_grad()
        backward(compiled, one)
        optimizer.step()
    assert optimizer.stats()["modulated"] == 3
