"""A frozen encoder: its parameters and the base's state of them stay bit for bit, on each base optimizer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import balanceopt as bo
from tests.contract.bases import BASES, Base
from tests.contract.runs import advance, build
from tests.training import bits, groups_of, small_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True"),
    pytest.mark.filterwarnings("ignore:This overload of add"),
]
MOVING = ("LBFGS", "torch_optimizer.Lookahead")


def frozen(**options: Any) -> bo.FixedModulation:
    return bo.FixedModulation({"audio": 0}, frozen=True, **options)


@pytest.mark.parametrize("base", [base for base in BASES if base.name not in MOVING], ids=str)
def test_parameters_and_state_stay(base: Base):
    model, optimizer = build(base, frozen(start=2, end=3))
    encoder = list(model.modalities["audio"].parameters())
    advance(model, optimizer, base, range(2))
    weights, state = copy.deepcopy([p.detach() for p in encoder]), repr([optimizer.state[p] for p in encoder])
    others = [p.detach().clone() for p in model.modalities["visual"].parameters()]
    advance(model, optimizer, base, range(2, 4))
    assert all(torch.equal(bits(p), bits(w)) for p, w in zip(encoder, weights, strict=True))
    assert repr([optimizer.state[p] for p in encoder]) == state
    moved = zip(model.modalities["visual"].parameters(), others, strict=True)
    assert any(not torch.equal(p, w) for p, w in moved)
    assert all(p.grad is not None for p in encoder)
    advance(model, optimizer, base, range(4, 5))
    assert any(not torch.equal(p, w) for p, w in zip(encoder, weights, strict=True))


@pytest.mark.parametrize("base", [base for base in BASES if base.name in MOVING], ids=str)
def test_a_base_that_moves_parameters_without_a_gradient_is_refused(base: Base):
    with pytest.raises(NotImplementedError, match=r"FixedModulation\(frozen=True\) keeps encoders from"):
        build(base, frozen())


def test_without_freezing_momentum_goes_on():
    base = next(base for base in BASES if base.name == "momentum")
    model, optimizer = build(base, bo.FixedModulation({"audio": 0}, start=2))
    advance(model, optimizer, base, range(2))
    weight = next(model.modalities["audio"].parameters())
    before = weight.detach().clone()
    advance(model, optimizer, base, range(2, 3))
    assert not torch.equal(weight, before)


@pytest.mark.parametrize("form", ["wrapper", "hooks"])
def test_a_step_that_raises_gives_the_gradients_back(form: str):
    class Breaking(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise ArithmeticError

    model = small_model()
    base = Breaking(groups_of(model), lr=0.1)
    monitor = bo.ModalityMonitor(model, model.modalities)
    make: Any = bo.ModulatedOptimizer if form == "wrapper" else bo.attach
    handle = make(base, monitor, frozen())
    stepped = handle if form == "wrapper" else base
    inputs = [torch.randn(4, 5), torch.randn(4, 6)]
    model(*inputs).sum().backward()
    with pytest.raises(ArithmeticError):
        stepped.step()
    handle.remove()
    assert all(p.grad is not None for p in model.parameters())
