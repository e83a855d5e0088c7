"""What must hold for each optimizer of the `pytorch_optimizer` package that steps on its own, once it is wrapped."""

from __future__ import annotations

import copy
import io
from collections.abc import Collection

import pytest
import torch

import balanceopt as bo
from balanceopt.modulation._cancelling import cancels_constant_factor
from tests.contract.bases import Base
from tests.contract.methods import METHODS, Method
from tests.contract.movement import FACTOR, movement
from tests.contract.package_bases import (
    BASES,
    GLOBAL,
    LEFT_OUT,
    UNSAFE_STATE,
    UPDATE_OTHERWISE,
    make,
)
from tests.contract.runs import advance, build
from tests.models import Concat, Multimodal
from tests.training import backward, batch, distance, grad_of, groups_of, same_bits, small_model

pytestmark = [
    pytest.mark.bases,
    pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True"),
]

# Some take their first steps without moving anything.
LATER = 12

every_base = pytest.mark.parametrize("base", BASES, ids=str)
every_pair = pytest.mark.parametrize(
    ("method", "base"),
    [pytest.param(method, base, id=f"{method}-{base}") for method in METHODS for base in BASES],
)


def only(names: Collection[str]) -> pytest.MarkDecorator:
    """The bases that are exceptions: each is tested to be one still."""
    return pytest.mark.parametrize("base", [base for base in BASES if base.name in names], ids=str)


def but(names: Collection[str]) -> pytest.MarkDecorator:
    """All others."""
    return pytest.mark.parametrize("base", [base for base in BASES if base.name not in names], ids=str)


def bare(base: Base) -> tuple[Multimodal, torch.optim.Optimizer]:
    model = small_model()
    return model, base.make(groups_of(model))


# -- steps -----------------------------------------------------------------------------------------------------------


@every_pair
def test_steps(method: Method, base: Base):
    model, optimizer = build(base, method.make())
    start = copy.deepcopy(model)
    advance(model, optimizer, base, range(LATER))
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert distance(model, start) > 0
    assert optimizer.stats()["modulated"] == LATER


@every_pair
def test_at_its_limit_it_is_the_base_bit_for_bit(method: Method, base: Base):
    model, optimizer = build(base, method.limit())
    twin, plain = bare(base)
    advance(model, optimizer, base, range(4))
    advance(twin, plain, base, range(4))
    assert same_bits(model, twin)


def given_gradients(
    model: Concat, optimizer: torch.optim.Optimizer, base: Base, factor: float = 1.0
) -> Concat:
    """Steps of which only the modulation, or `factor`, makes encoders' gradients others than they are given."""
    for number in range(1 if base.create_graph else LATER):
        optimizer.zero_grad()
        torch.manual_seed(number)
        backward(model, batch(number, model), create_graph=base.create_graph)
        for p in () if base.create_graph else model.parameters():
            p.grad = 0.1 * torch.randn_like(p) + 0.05
        for p in model.encoders.parameters():
            grad_of(p).mul_(factor)
        optimizer.step()
    return model


@but(GLOBAL)
def test_a_method_changes_the_encoders_and_nothing_else(base: Base):
    model, optimizer = build(base, bo.OGM(0.5))
    twin, plain = bare(base)
    assert isinstance(model, Concat)
    assert isinstance(twin, Concat)
    given_gradients(model, optimizer, base)
    given_gradients(twin, plain, base)
    assert distance(model.encoders, twin.encoders) > 0
    assert same_bits(model.head, twin.head)


@only(GLOBAL)
def test_these_couple_parameters_by_themselves(base: Base):
    (model, optimizer), (twin, plain) = bare(base), bare(base)
    assert isinstance(model, Concat)
    assert isinstance(twin, Concat)
    given_gradients(model, optimizer, base, factor=0.5)
    given_gradients(twin, plain, base)
    assert not same_bits(model.head, twin.head)


# -- schedulers, checkpoints -------------------------------------------------------------------------------------------


@but(["A2Grad"])
def test_schedulers_reach_the_base(base: Base):
    rates: list[list[list[float]]] = []
    for model, optimizer in (bare(base), build(base, bo.OGM(0, noise_scale=0))):
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.1)
        rates.append([])
        for number in range(5):
            advance(model, optimizer, base, [number])
            scheduler.step()
            rates[-1].append([group["lr"] for group in optimizer.param_groups])
    assert rates[0] == rates[1]


def test_a_base_without_a_learning_rate_takes_no_scheduler():
    base = next(base for base in BASES if base.name == "A2Grad")
    with pytest.raises(KeyError, match="lr"):
        torch.optim.lr_scheduler.StepLR(bare(base)[1], 2)


@every_base
def test_resumes_bit_for_bit(base: Base):
    model, optimizer = build(base, bo.OGM(0.5))
    advance(model, optimizer, base, range(3))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    advance(model, optimizer, base, range(3, 5))
    file.seek(0)
    saved = torch.load(file, weights_only=base.name not in UNSAFE_STATE)
    resumed, again = build(base, bo.OGM(0.5))
    resumed.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    advance(resumed, again, base, range(3, 5))
    assert same_bits(model, resumed)


@only(UNSAFE_STATE)
def test_these_states_of_their_own_do_not_load_safely(base: Base):
    model, optimizer = bare(base)
    advance(model, optimizer, base, range(3))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(file, weights_only=True)


# -- a constant factor, on gradients and on updates --------------------------------------------------------------------


@every_base
def test_the_hint_comes_where_the_base_takes_most_of_the_factor_out(base: Base):
    listed = cancels_constant_factor(base.make(groups_of(small_model())))
    measured = movement(base, FACTOR, "grad") / movement(base, 1.0, "grad")
    assert (measured > 1.4 * FACTOR) == listed, measured


def slowing(base: Base) -> float:
    return movement(base, FACTOR, "update") / movement(base, 1.0, "grad")


@but(UPDATE_OTHERWISE)
def test_scaled_updates_move_parameters_by_the_factor(base: Base):
    assert slowing(base) == pytest.approx(FACTOR, rel=0.05)


@only(UPDATE_OTHERWISE)
def test_scaled_updates_of_these_mean_something_else(base: Base):
    assert slowing(base) != pytest.approx(FACTOR, rel=0.05)


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_is_left_out_does_not_step_on_its_own(name: str):
    with pytest.raises(Exception, match=r"\w"):
        advance(*bare(base := Base(name, lambda groups: make(name, groups))), base, [0])
