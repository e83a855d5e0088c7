"""What compiling costs beside the bare optimizer and the bare model, in graphs and breaks; and a real compiler."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

import balanceopt as bo
from tests.models import watch
from tests.training import backward, batches, distance, groups_of, sgd, small_model

pytestmark = [  # torch's own, met while it traces
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

METHODS: dict[str, Callable[[], Any]] = {
    "bare": list,
    "OGM-GE": lambda: [bo.OGM(0.5)],
    "AMSS+": lambda: [bo.AMSS(scale="unbiased")],
    "OGM-GE, AMSS": lambda: [bo.OGM(0.5), bo.AMSS()],
}


class Cost(NamedTuple):
    graphs: int
    breaks: int


# Torch 2.6 leaves the function in which the graph breaks to Python, and breaks in its callers too. A
# list comprehension, in which the model calls its encoders, is a function of its own until Python 3.12.
MODEL = (
    Cost(1, 7) if torch.__version__.startswith("2.6.") else Cost(4, 4 if sys.version_info < (3, 12) else 3)
)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def train(
    methods: list[bo.Modulation], what: str, backend: Any, *, drop: bool, steps: int = 4
) -> torch.nn.Module:
    """Train with the parts named in `what` compiled: "model", "base" (its step), "step" (the wrapper's)."""
    model = small_model()
    optimizer: Any = torch.optim.AdamW(groups_of(model), lr=0.01)
    if "base" in what:
        vars(optimizer)["step"] = torch.compile(optimizer.step, backend=backend)
    if methods:
        monitor = watch(model)
        modulator = bo.OPM(monitor, seed=1) if drop else None
        optimizer = bo.ModulatedOptimizer(optimizer, monitor, methods, seed=1)
    run: Any = torch.compile(model, backend=backend) if "model" in what else model
    step: Callable[[], Any] = lambda: optimizer.step()  # noqa: E731
    step = torch.compile(step, backend=backend) if "step" in what else step
    for one in batches(model, steps):
        optimizer.zero_grad()
        backward(run, one)
        step()
    if methods:
        assert optimizer.stats()["modulated"] == steps
        assert modulator is None or modulator.stats()["dropping"] > 0
    return model


# Of a step's two graphs the first is without the counter: a number in `param_groups` that changes costs one more.
@pytest.mark.parametrize(
    ("methods", "what", "expected"),
    [
        ("bare", "base", Cost(1, 1)),
        ("bare", "step", Cost(1, 2)),
        ("OGM-GE, AMSS", "base", Cost(2, 1)),
        ("OGM-GE, AMSS", "step", Cost(2, 2)),
        ("bare", "model", Cost(1, 0)),
        ("OGM-GE, AMSS", "model", MODEL),
        ("OGM-GE, AMSS", "model base", Cost(MODEL.graphs + 2, MODEL.breaks + 1)),
    ],
)
def test_graphs_and_breaks(methods: str, what: str, expected: Cost):
    counter = CompileCounter()
    train(METHODS[methods](), what, counter, drop=methods != "bare")
    assert Cost(counter.frame_count, sum(counters["graph_break"].values())) == expected


def attach_late(what: str) -> None:
    model = small_model()
    run: Any = torch.compile(model, backend="eager") if what == "wrapper" else model
    if what == "in place":
        model.compile(backend="eager")
    given = batches(model, 12)
    run(*given[0][0])
    optimizer = bo.ModulatedOptimizer(sgd(groups_of(model)), watch(model), bo.OGM(0.5))
    for one in given:
        optimizer.zero_grad()
        backward(run, one)
        optimizer.step()
    assert optimizer.stats()["modulated"] == len(given)


@pytest.mark.filterwarnings("ignore:no scores since the last step")
@pytest.mark.parametrize("what", ["wrapper", "in place"])
def test_attached_after_the_first_call_is_modulated_or_an_error(what: str):
    """Whether compiled code looks for new hooks is torch's affair; training is never silently unbalanced."""
    try:
        attach_late(what)
    except RuntimeError as error:
        assert "model compiled before the monitor was built" in str(error)  # noqa: PT017
        assert "10 steps in a row" in str(error)  # noqa: PT017


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler"
)
@pytest.mark.parametrize("what", ["model", "base", "step", "model base"])
@pytest.mark.parametrize("methods", ["OGM-GE", "AMSS+", "OGM-GE, AMSS"])
def test_inductor(methods: str, what: str):
    eager = train(METHODS[methods](), "", None, drop=True)
    compiled = train(METHODS[methods](), what, "inductor", drop=True)
    assert distance(eager, compiled) < 1e-5
