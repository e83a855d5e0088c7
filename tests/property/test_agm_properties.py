"""What must hold of AGM's rule for any cross-entropies."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import balanceopt as bo
from balanceopt.functional import adaptive_coefficient
from tests.models import watch
from tests.training import batches, modulated, same_bits, small_model, train

losses = st.floats(0.0, 8.0, width=32)
pairs = st.integers(2, 5).flatmap(lambda m: st.tuples(*[st.lists(losses, min_size=m, max_size=m)] * 2))
strengths = st.floats(0.0, 3.0)


def rule(now: list[float], running: list[float], alpha: float = 1.0, cap: float = 10.0) -> Tensor:
    return adaptive_coefficient(
        torch.tensor(now, dtype=torch.float64), torch.tensor(running, dtype=torch.float64), alpha, cap
    )


@given(pairs, strengths, st.floats(0.0, 10.0))
def test_bounds(values: tuple[list[float], list[float]], alpha: float, cap: float):
    k = rule(*values, alpha, cap)
    assert bool((k >= 0).all())
    assert bool((k <= math.exp(alpha * cap) * (1 + 1e-12)).all())


@given(pairs, strengths, st.randoms())
def test_order_of_modalities_does_not_matter(
    values: tuple[list[float], list[float]], alpha: float, random: object
):
    now, running = values
    order = list(range(len(now)))
    random.shuffle(order)  # type: ignore[attr-defined]
    moved = rule([now[i] for i in order], [running[i] for i in order], alpha)
    torch.testing.assert_close(rule(now, running, alpha)[torch.tensor(order)], moved, rtol=1e-9, atol=1e-12)


@given(pairs, st.floats(-4.0, 4.0))
def test_a_constant_on_all_losses_does_not_matter(values: tuple[list[float], list[float]], constant: float):
    now, running = values
    moved = rule([x + constant for x in now], running)
    torch.testing.assert_close(rule(now, running), moved, rtol=1e-6, atol=1e-9)


@given(pairs)
def test_at_alpha_zero_and_without_change_it_is_one(values: tuple[list[float], list[float]]):
    now, running = values
    assert bool((rule(now, running, 0.0) == 1).all())
    assert bool((rule(now, now) == 1).all())


@given(losses, losses, losses, losses)
def test_who_has_gained_a_lead_is_slowed_and_the_other_is_sped_up(a: float, b: float, c: float, d: float):
    assume(abs((a - b) - (c - d)) > 1e-3)
    k = rule([a, b], [c, d])
    ahead = 0 if a - b < c - d else 1  # further ahead than on average
    assert float(k[ahead]) < 1 < float(k[1 - ahead])


@given(pairs)
def test_arguments_stay_and_absent_modalities_are_left_alone(values: tuple[list[float], list[float]]):
    now, running = (torch.tensor(v, dtype=torch.float64) for v in values)
    before = now.clone(), running.clone()
    present = torch.ones(len(now), dtype=torch.bool)
    present[0] = False
    k = adaptive_coefficient(now, running, 1.0, 10.0, present)
    assert float(k[0]) == 1
    if len(now) > 2:
        torch.testing.assert_close(k[1:], adaptive_coefficient(now[1:], running[1:]))
    else:
        assert bool((k == 1).all())
    assert torch.equal(now, before[0])
    assert torch.equal(running, before[1])


def test_large_gaps_stay_finite():
    k = adaptive_coefficient(torch.tensor([0.0, 1e4]), torch.tensor([1e4, 0.0]))
    assert bool(k.isfinite().all())
    assert k.tolist() == [0.0, pytest.approx(math.exp(10.0), rel=1e-5)]
    strong = adaptive_coefficient(torch.tensor([0.0, 1e4]), torch.tensor([1e4, 0.0]), alpha=20.0)
    assert bool(strong.isfinite().all())  # one that is infinite would be left out, as a coefficient of 1
    assert float(strong[1]) > 1


def test_the_first_step_is_the_base_optimizer_s_bit_for_bit():
    model, optimizer = modulated(bo.AGM(3.0))
    twin = small_model()
    train(model, optimizer, batches(model, 1))
    train(twin, torch.optim.SGD(twin.parameters(), lr=0.1), batches(twin, 1))
    assert same_bits(model, twin)


@pytest.mark.parametrize("apply_to", ["grad", "update"])
def test_update_and_grad_agree_on_sgd_head_included(apply_to: str):
    def run(apply_to: str) -> list[Tensor]:
        model, optimizer = modulated(bo.AGM(2.0, apply_to=apply_to))  # type: ignore[arg-type]
        train(model, optimizer, batches(model, 4))
        return list(model.parameters())

    for p, q in zip(run("grad"), run(apply_to), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_the_head_is_scaled_once_where_two_optimizers_share_a_monitor():
    model, twin = small_model(), small_model()
    monitor = watch(model)
    audio = list(model.modalities["audio"].parameters())
    rest = [*model.modalities["visual"].parameters(), *model.head.parameters()]
    two = [
        bo.ModulatedOptimizer(torch.optim.SGD(params, lr=0.1), monitor, bo.AGM(2.0))
        for params in (audio, rest)
    ]
    one = bo.ModulatedOptimizer(torch.optim.SGD(twin.parameters(), lr=0.1), watch(twin), bo.AGM(2.0))

    class Both:
        def zero_grad(self) -> None:
            for optimizer in two:
                optimizer.zero_grad()

        def step(self) -> None:
            for optimizer in two:
                optimizer.step()

    train(model, Both(), batches(model, 3))  # type: ignore[arg-type]
    train(twin, one, batches(twin, 3))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_a_bad_batch_does_not_enter_the_running_means():
    model, optimizer = modulated(bo.AGM())
    agm = optimizer.modulation
    assert isinstance(agm, bo.AGM)
    train(model, optimizer, batches(model, 2))
    before = agm.state_dict()
    inputs, labels = batches(model, 1)[0]
    with pytest.warns(UserWarning, match="not finite"):
        train(model, optimizer, [([inputs[0] * math.nan, *inputs[1:]], labels)])
    after = agm.state_dict()
    assert torch.equal(before["total"], after["total"])
    assert torch.equal(before["steps"], after["steps"])
