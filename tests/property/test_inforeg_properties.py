"""What must hold of InfoReg's rules for any losses and traces, and of its runs at their limits."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import balanceopt as bo
from balanceopt.functional import in_prime_window, regulation_strength
from tests.training import backward, bare, batch, batches, modulated, same_bits, train

losses = st.lists(st.floats(0, 8, width=32), min_size=1, max_size=5)
betas = st.floats(0, 3)


def rule(values: list[float], beta: float = 0.9) -> Tensor:
    return regulation_strength(torch.tensor(values, dtype=torch.float64), beta)


@given(losses, betas)
def test_only_modalities_ahead_are_held_back_never_all(values: list[float], beta: float):
    a = rule(values, beta)
    assert bool(((a == 0) | (a >= 1)).all())
    assert bool((a <= math.exp(beta) * (1 + 1e-12)).all())
    assert float(a[values.index(max(values))]) == 0


@given(losses, betas, st.randoms())
def test_order_of_modalities_does_not_matter(values: list[float], beta: float, random: object):
    distinct = sorted({round(v, 2) for v in values})  # at a tie rounding decides between 0 and 1
    order = list(range(len(distinct)))
    random.shuffle(order)  # type: ignore[attr-defined]
    mean = sum(distinct) / len(distinct)
    if all(abs(v - mean) > 1e-9 for v in distinct):
        moved = rule([distinct[i] for i in order], beta)
        torch.testing.assert_close(rule(distinct, beta)[torch.tensor(order)], moved, rtol=1e-9, atol=1e-12)


@given(st.floats(0, 8, width=32), st.integers(1, 5), betas)
def test_equal_losses_hold_nobody_back(value: float, count: int, beta: float):
    assert not bool(regulation_strength(torch.tensor([value] * count), beta).any())


@given(losses)
def test_arguments_stay_and_absent_modalities_are_left_out(values: list[float]):
    given_losses = torch.tensor([0.0, *values])
    before = given_losses.clone()
    present = torch.ones(len(given_losses), dtype=torch.bool)
    present[0] = False
    a = regulation_strength(given_losses, present=present)
    assert float(a[0]) == 0
    torch.testing.assert_close(a[1:], regulation_strength(given_losses[1:]))
    assert torch.equal(given_losses, before)


@given(st.lists(st.floats(0, 1e4, width=32), min_size=2, max_size=6), st.floats(-1, 1))
def test_the_window_of_each_modality_is_its_own(trace: list[float], threshold: float):
    one = torch.tensor(trace)
    both = torch.stack([one, one.flip(0)], 1)
    expected = [bool(in_prime_window(x, threshold)) for x in (one, one.flip(0))]
    assert in_prime_window(both, threshold).tolist() == expected
    assert not bool(in_prime_window(both, math.inf).any())


def test_the_window_without_history_or_gradients():
    assert bool(in_prime_window(torch.zeros(0)))
    assert not bool(in_prime_window(torch.zeros(0), math.inf))
    assert in_prime_window(torch.zeros(1, 2)).tolist() == [True, True]
    assert not bool(in_prime_window(torch.zeros(2)))  # 0 / 0


LIMITS: dict[str, dict[str, Any]] = {
    "threshold": {"threshold": math.inf},
    "scale": {"scale": 0},
    "window": {"start": 99},
}


def run(optimizer: Any, model: Any, epochs: int, steps: int, first: int = 0) -> None:
    for epoch in range(first, first + epochs):
        if isinstance(optimizer, bo.ModulatedOptimizer):
            optimizer.set_epoch(epoch)
        train(model, optimizer, batches(model, steps, first=epoch * steps))


@pytest.mark.parametrize("options", LIMITS.values(), ids=LIMITS)
def test_at_its_limits_it_is_the_base_bit_for_bit(options: dict[str, Any]):
    model, optimizer = modulated(bo.InfoReg(**options))
    twin, base = bare()
    run(optimizer, model, 2, 2)
    run(base, twin, 2, 2)
    assert same_bits(model, twin)


def test_the_first_step_of_every_epoch_is_the_bases():
    model, optimizer = modulated(bo.InfoReg())
    twin, base = bare()
    run(optimizer, model, 4, 1)
    run(base, twin, 4, 1)
    assert same_bits(model, twin)
    run(optimizer, model, 1, 2, first=4)
    run(base, twin, 1, 2, first=4)
    assert not same_bits(model, twin)


def test_without_an_epoch_the_first_step_raises():
    model, optimizer = modulated(bo.InfoReg())
    backward(model, batch(0, model))
    with pytest.raises(RuntimeError, match=r"InfoReg acts by epochs.*Call set_epoch\(epoch\)"):
        optimizer.step()


def test_a_run_resumed_in_mid_epoch_goes_on_bit_for_bit():
    def build() -> Any:
        return modulated(bo.InfoReg(threshold=-1), seed=1)

    model, optimizer = build()
    run(optimizer, model, 3, 3)
    optimizer.set_epoch(3)
    train(model, optimizer, batches(model, 2, first=50))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    train(model, optimizer, batches(model, 2, first=52))
    run(optimizer, model, 2, 2, first=4)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    twin, again = build()
    twin.load_state_dict(weights)
    again.load_state_dict(state)
    train(twin, again, batches(twin, 2, first=52))
    run(again, twin, 2, 2, first=4)
    assert same_bits(model, twin)


def test_a_bad_batch_does_not_enter_the_trace():
    model, optimizer = modulated(bo.InfoReg())
    optimizer.set_epoch(0)
    train(model, optimizer, batches(model, 2))
    assert isinstance(optimizer.modulation, bo.InfoReg)
    before = optimizer.modulation.state_dict()
    inputs, labels = batches(model, 1)[0]
    with pytest.warns(UserWarning, match="not finite"):
        train(model, optimizer, [([inputs[0] * math.nan, *inputs[1:]], labels)])
    after = optimizer.modulation.state_dict()
    assert torch.equal(before["total"], after["total"])
    assert torch.equal(before["steps"], after["steps"])


def test_a_step_size_with_which_the_pull_overshoots():
    make = torch.optim.SGD
    with pytest.warns(bo.OptimizerHintWarning, match="overshoots. Use a smaller `scale`"):
        modulated(bo.InfoReg(), lambda groups: make(groups, lr=0.5))
    modulated(bo.InfoReg(scale=0.1), lambda groups: make(groups, lr=0.5))
    modulated(bo.InfoReg(), lambda groups: torch.optim.AdamW(groups, lr=0.5))


@pytest.mark.parametrize(
    "bad", [{"beta": -1}, {"threshold": math.nan}, {"threshold": "1"}, {"scale": -1}, {"trace": "all"}]
)
def test_options_outside_their_range(bad: dict[str, Any]):
    with pytest.raises(ValueError, match="should be"):
        bo.InfoReg(**bad)


def test_a_damaged_state_is_refused_and_changes_nothing():
    method = bo.InfoReg()
    state = method.state_dict()
    for name, value in (("epoch", -1), ("history", 3), ("total", torch.zeros(2, 2)), ("anchors", [1])):
        with pytest.raises((ValueError, TypeError)):
            method.load_state_dict({**state, name: value})
    with pytest.raises(KeyError):
        method.load_state_dict({})
    assert method.state_dict()["epoch"] is None
