"""What must hold for each method on each base optimizer."""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torch_optimizer
from torch import Tensor, nn

import balanceopt as bo
from tests.contract.bases import BASES, Base, classes_of
from tests.contract.methods import METHODS, Method
from tests.contract.runs import advance, build
from tests.models import Multimodal
from tests.training import groups_of, same_bits, small_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:LBFGS evaluates its closure several times"),
    pytest.mark.filterwarnings(
        "ignore:Using backward\\(\\) with create_graph=True"
    ),  # Adahessian asks for it
    pytest.mark.filterwarnings("ignore:This overload of add"),  # torch-optimizer's Ranger
    pytest.mark.filterwarnings("ignore:loading gave Lookahead param groups of its own"),
]

EVERY_PAIR = [(method, base) for method in METHODS for base in BASES]
# For what hangs on the kind of method and base: each base with gradients scaled, updates scaled and units masked, each
# method on bases of four kinds. The rest of the product is slow.
SHOWN_METHODS = ("OGM-GE", "OGM update", "AMSS")
SHOWN_BASES = ("momentum", "AdamW foreach", "LBFGS", "torch_optimizer.Adahessian")


def case(method: Method, base: Base, *, shown: bool) -> Any:
    return pytest.param((method, base), id=f"{method}-{base}", marks=() if shown else pytest.mark.slow)


@cache
def bare_run(base: Base) -> tuple[nn.Module, list[float]]:
    """A model after four steps of the base alone, and the losses of its closures."""
    model = small_model()
    return model, advance(model, base.make(groups_of(model)), base, range(4))


@pytest.mark.parametrize("pair", [case(*pair, shown=True) for pair in EVERY_PAIR])
def test_at_its_limit_it_is_the_base_bit_for_bit(pair: tuple[Method, Base]):
    method, base = pair
    model, optimizer = build(base, method.limit())
    losses = advance(model, optimizer, base, range(4))
    twin, expected = bare_run(base)
    assert losses == expected
    assert same_bits(model, twin)


@dataclass(frozen=True)
class Run:
    """Four steps of a method at work, with a checkpoint after the second.

    Attributes:
        start: a copy of the parameters before the first step.
        losses: of the base's closures.
        file: the checkpoint.
    """

    method: Method
    base: Base
    model: nn.Module
    optimizer: bo.ModulatedOptimizer
    start: list[Tensor]
    losses: list[float]
    file: io.BytesIO


def run_of(method: Method, base: Base) -> Run:
    model, optimizer = build(base, method.make())
    start = copy.deepcopy([p.detach() for p in model.parameters()])
    losses = advance(model, optimizer, base, range(2))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    losses += advance(model, optimizer, base, range(2, 4))
    return Run(method, base, model, optimizer, start, losses, file)


@pytest.fixture(
    scope="module",
    params=[
        case(method, base, shown=method.name in SHOWN_METHODS or base.name in SHOWN_BASES)
        for method, base in EVERY_PAIR
    ],
)
def run(request: pytest.FixtureRequest) -> Run:
    return run_of(*request.param)


def test_steps(run: Run):
    parameters = list(run.model.parameters())
    assert all(bool(p.isfinite().all()) for p in parameters)
    moved = [not torch.equal(p, before) for p, before in zip(parameters, run.start, strict=True)]
    assert all(moved if run.base.name != "Muon" else moved[::2])  # Muon was given the matrices only
    assert run.optimizer.stats()["modulated"] >= 4
    assert run.optimizer.param_groups[0]["balanceopt_step"] == 4
    assert len(run.losses) == (4 if run.base.closure else 0)


def test_resumes_bit_for_bit(run: Run):
    run.file.seek(0)
    saved = torch.load(run.file, weights_only=True)
    resumed, again = build(run.base, run.method.make())
    resumed.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    advance(resumed, again, run.base, range(2, 4))
    assert same_bits(run.model, resumed)


def rates(model: Multimodal, optimizer: torch.optim.Optimizer, base: Base) -> list[list[float]]:
    """The learning rates of each group after each of a few steps under a scheduler."""
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.1)
    seen = []
    for number in range(3):
        advance(model, optimizer, base, [number])
        scheduler.step()
        seen.append([group["lr"] for group in optimizer.param_groups])
    return seen


@pytest.mark.parametrize(
    "pair",
    [
        case(method, base, shown=method.name == "OGM-GE" or base.name == "momentum")
        for method, base in EVERY_PAIR
    ],
)
def test_schedulers_reach_the_base(pair: tuple[Method, Base]):
    method, base = pair
    twin = small_model()
    assert rates(*build(base, method.make()), base) == rates(twin, base.make(groups_of(twin)), base)


def test_no_base_is_left_out():
    tried = {type(base.make(groups_of(small_model()))).__qualname__ for base in BASES}
    # SparseAdam takes sparse gradients only: tests/unit/modulation/test_ogm.py has it.
    assert classes_of(torch.optim) - tried == {"SparseAdam"}
    assert classes_of(torch_optimizer) <= tried
