"""masked="frozen": units that are masked do not move at all, on any base."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_optimizer
from torch import Tensor

import balanceopt as bo
from balanceopt.modulation import _amss, _parts
from tests.masking import every_option, masked, masked_rows, momenta, step_frozen, weights
from tests.training import (
    backward,
    bare,
    batches,
    bits,
    grad_of,
    modulated,
    same_bits,
    sgd,
    train,
)


@every_option
@pytest.mark.parametrize("scale", ["none", "unbiased"])
def test_frozen_units_and_their_momentum_do_not_move_at_all(options, scale):
    model, optimizer = masked(masked="frozen", scale=scale, clamp=(0.3, 0.7), **options)
    for number in range(5):
        momentum = momenta(optimizer, model)
        before, rows = step_frozen(model, optimizer, number)
        assert sum(int(row.sum()) for row in rows) > 5
        for now, old in ((weights(model), before), (momenta(optimizer, model), momentum)):
            for a, b, row in zip(now, old, rows, strict=True):
                assert torch.equal(bits(a[row]), bits(b[row]))


@every_option
def test_the_units_that_are_kept_make_sgds_step(options):
    model, optimizer = masked(masked="frozen", clamp=(0.3, 0.7), **options)
    twin, plain = bare(lambda groups: sgd(groups, **options))
    for number in range(4):
        _, rows = step_frozen(model, optimizer, number)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = grad_of(p).clone()
        held = [(q.detach().clone(), momenta(plain, twin)[i]) for i, q in enumerate(weights(twin))]
        plain.step()
        with torch.no_grad():
            for weight, (old, momentum), row in zip(weights(twin), held, rows, strict=True):
                weight[row] = old[row]
                if "momentum_buffer" in plain.state[weight]:
                    plain.state[weight]["momentum_buffer"][row] = momentum[row]
        assert same_bits(model, twin)


def all_state(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Tensor]:
    held = optimizer.state.get(p, {})
    return {k: v.clone() for k, v in held.items() if isinstance(v, Tensor) and v.shape == p.shape}


BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "Adam": lambda groups: torch.optim.Adam(groups, lr=0.01, weight_decay=0.1),
    "AdamW fused": lambda groups: torch.optim.AdamW(groups, lr=0.01, fused=True),
    "AMSGrad foreach": lambda groups: torch.optim.Adam(groups, lr=0.01, amsgrad=True, foreach=True),
    "RMSprop": lambda groups: torch.optim.RMSprop(
        groups, lr=0.01, momentum=0.9, centered=True, weight_decay=0.1
    ),
    "Adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.01, weight_decay=0.1),
    "NAdam": lambda groups: torch.optim.NAdam(groups, lr=0.01, weight_decay=0.1),
    "Adadelta": lambda groups: torch.optim.Adadelta(groups, weight_decay=0.1),
    "Ranger": lambda groups: torch_optimizer.Ranger(groups, lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
@pytest.mark.filterwarnings("ignore:This overload of add")
def test_frozen_with_any_base(base):
    model, optimizer = modulated(bo.AMSS(masked="frozen", clamp=(0.3, 0.7)), base)
    for number in range(8):
        states = [all_state(optimizer, p) for p in weights(model)]
        before, rows = step_frozen(model, optimizer, number)
        for p, old, state, row in zip(weights(model), before, states, rows, strict=True):
            assert torch.equal(bits(p[row]), bits(old[row]))
            for key, value in all_state(optimizer, p).items():
                was = state.get(key, torch.zeros_like(p) if "slow" not in key else old)
                assert torch.equal(value[row], was[row]), key


def test_state_that_an_option_sets_is_left_to_the_base():
    model, optimizer = modulated(
        bo.AMSS(masked="frozen", clamp=(0.3, 0.7)), lambda groups: torch.optim.Rprop(groups, lr=0.02)
    )
    step_frozen(model, optimizer, 0)
    assert all(bool((optimizer.state[p]["step_size"] == 0.02).all()) for p in weights(model))


class ManyMomenta(torch.optim.Optimizer):
    """Keeps its state in a list, as AggMo does."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                for buffer in self.state[p].setdefault("momenta", [torch.zeros_like(p), torch.zeros_like(p)]):
                    buffer.mul_(0.9).add_(p.grad + 0.1 * p)
                    p.sub_(buffer, alpha=0.05)


def test_state_in_containers_is_frozen_too():
    model, optimizer = modulated(bo.AMSS(masked="frozen", clamp=(0.3, 0.7)), ManyMomenta)
    for number in range(3):
        states = [[b.clone() for b in optimizer.state[p].get("momenta", [])] for p in weights(model)]
        _, rows = step_frozen(model, optimizer, number)
        for p, old, row in zip(weights(model), states, rows, strict=True):
            for now, was in zip(optimizer.state[p]["momenta"], old or [torch.zeros_like(p)] * 2, strict=True):
                assert torch.equal(now[row], was[row])


def test_frozen_weights_of_the_head():
    model, optimizer = masked(
        masked="frozen", mask_head=True, clamp=(0.5, 0.5), momentum=0.9, weight_decay=0.1
    )
    weight = model.get_parameter("head.weight")
    train(model, optimizer, batches(model, 2))
    optimizer.zero_grad()
    backward(model, batches(model, 1, first=2)[0])
    before, gradient = weight.detach().clone(), grad_of(weight).clone()
    momentum = optimizer.state[weight]["momentum_buffer"].clone()
    optimizer.step()
    still = (gradient != 0) & (grad_of(weight) == 0)
    assert int(still.sum()) == 20  # half of the weights of each modality
    assert torch.equal(weight[still], before[still])
    assert torch.equal(optimizer.state[weight]["momentum_buffer"][still], momentum[still])
    assert bool((weight != before)[~still].all())


def test_the_way_of_an_accelerator_freezes_the_same(monkeypatch):
    model, optimizer = masked(masked="frozen", momentum=0.9, weight_decay=0.1)
    train(model, optimizer, batches(model, 4))
    for module in (_amss, _parts):
        monkeypatch.setattr(module, "on_host", lambda tensor: None)
    twin, again = masked(masked="frozen", momentum=0.9, weight_decay=0.1)
    train(twin, again, batches(twin, 4))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    for a, b in zip(momenta(optimizer, model), momenta(again, twin), strict=True):
        assert torch.equal(a, b)


def test_frozen_units_are_put_back_when_the_base_fails():
    class Broken(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            raise RuntimeError("after the step")

    model, optimizer = modulated(
        bo.AMSS(masked="frozen", clamp=(0.3, 0.3)), lambda groups: Broken(groups, lr=0.1, weight_decay=0.1)
    )
    backward(model, batches(model, 1)[0])
    before, grads = [p.detach().clone() for p in weights(model)], [grad_of(p).clone() for p in weights(model)]
    with pytest.raises(RuntimeError, match="after the step"):
        optimizer.step()
    rows = masked_rows(grads, [grad_of(p) for p in weights(model)])
    for p, old, row in zip(weights(model), before, rows, strict=True):
        assert torch.equal(p[row], old[row])
        assert bool((p != old)[~row].any())
