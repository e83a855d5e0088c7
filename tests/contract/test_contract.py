"""What must hold for each method on each base optimizer."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch_optimizer
from torch import nn

from tests.contract.bases import BASES, Base, classes_of
from tests.contract.methods import METHODS, Method
from tests.contract.runs import advance, build
from tests.training import groups_of, same_bits, small_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:LBFGS evaluates its closure several times"),
    pytest.mark.filterwarnings(
        "ignore:Using backward\\(\\) with create_graph=True"
    ),  # Adahessian asks for it
    pytest.mark.filterwarnings("ignore:This overload of add"),  # torch-optimizer's Ranger
    pytest.mark.filterwarnings("ignore:loading gave Lookahead param groups of its own"),
]

PAIRS = [pytest.param(method, base, id=f"{method}-{base}") for method in METHODS for base in BASES]
every_pair = pytest.mark.parametrize(("method", "base"), PAIRS)
# What hangs on the wrapper and not on the method: third-party bases with one method only.
most_pairs = pytest.mark.parametrize(
    ("method", "base"),
    [pair for pair in PAIRS if "torch_optimizer" not in str(pair.id) or str(pair.id).startswith("OGM-GE")],
)


def finite(model: nn.Module) -> bool:
    return all(bool(p.isfinite().all()) for p in model.parameters())


@every_pair
def test_steps(method: Method, base: Base):
    model, optimizer = build(base, method.make())
    start = copy.deepcopy([p.detach() for p in model.parameters()])
    losses = advance(model, optimizer, base, range(3))
    assert finite(model)
    moved = [not torch.equal(p, before) for p, before in zip(model.parameters(), start, strict=True)]
    assert all(moved if base.name != "Muon" else moved[::2])  # Muon was given the matrices only
    assert optimizer.stats()["modulated"] >= 3
    assert optimizer.param_groups[0]["balanceopt_step"] == 3
    assert len(losses) == (3 if base.closure else 0)


@every_pair
def test_at_its_limit_it_is_the_base_bit_for_bit(method: Method, base: Base):
    model, optimizer = build(base, method.limit())
    twin = small_model()
    bare = base.make(groups_of(twin))
    losses = advance(model, optimizer, base, range(4))
    assert losses == advance(twin, bare, base, range(4))
    assert same_bits(model, twin)


@most_pairs
def test_schedulers_reach_the_base(method: Method, base: Base):
    rates: list[list[list[float]]] = []
    twin = small_model()
    model, optimizer = build(base, method.make())
    for one, stepped in ((model, optimizer), (twin, base.make(groups_of(twin)))):
        scheduler = torch.optim.lr_scheduler.StepLR(stepped, 2, 0.1)
        rates.append([])
        for number in range(5):
            advance(one, stepped, base, [number])
            scheduler.step()
            rates[-1].append([group["lr"] for group in stepped.param_groups])
    assert rates[0] == rates[1]


@every_pair
def test_resumes_bit_for_bit(method: Method, base: Base):
    model, optimizer = build(base, method.make())
    advance(model, optimizer, base, range(2))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    advance(model, optimizer, base, range(2, 4))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, again = build(base, method.make())
    resumed.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    advance(resumed, again, base, range(2, 4))
    assert same_bits(model, resumed)


def test_no_base_is_left_out():
    tried = {type(base.make(groups_of(small_model()))).__qualname__ for base in BASES}
    # SparseAdam takes sparse gradients only: tests/unit/modulation/test_ogm.py has it.
    assert classes_of(torch.optim) - tried == {"SparseAdam"}
    assert classes_of(torch_optimizer) <= tried
