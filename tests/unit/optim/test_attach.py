"""`attach` and what `remove` leaves behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import balanceopt as bo
from tests.models import watch
from tests.training import batches, groups_of, same_bits, sgd, small_model, train

HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


def traces(optimizer: torch.optim.Optimizer) -> Any:
    """All that could be left on an optimizer."""
    attributes = {k: v for k, v in vars(optimizer).items() if k not in ("param_groups", "state", *HOOKS)}
    return (
        attributes,
        [len(getattr(optimizer, name)) for name in HOOKS],
        [set(g) for g in optimizer.param_groups],
    )


def test_remove_leaves_nothing_behind():
    model = small_model()
    base = sgd(groups_of(model))
    before = traces(base)
    handle = bo.attach(base, watch(model), bo.OGM())
    assert traces(base) != before
    train(model, base, batches(model, 2))
    handle.remove()
    handle.remove()
    assert traces(base) == before
    twin = small_model()
    twin.load_state_dict(model.state_dict())
    train(model, base, batches(model, 12))  # twelve: no scores are missed either
    train(twin, sgd(groups_of(twin)), batches(twin, 12))
    assert same_bits(model, twin)


def test_as_a_context_manager_also_after_an_exception():
    model = small_model()
    base = sgd(groups_of(model))
    before = traces(base)
    with pytest.raises(ArithmeticError), bo.attach(base, watch(model), bo.OGM()):
        raise ArithmeticError("on purpose")
    assert traces(base) == before


def test_stats_and_listeners_can_be_read_after_remove():
    model = small_model()
    base = sgd(groups_of(model))
    handle = bo.attach(base, watch(model), bo.OGM())
    recorder = bo.Recorder(handle)
    train(model, base, batches(model, 2))
    handle.remove()
    recorder.remove()
    assert handle.stats()["modulated"] == 2
    assert handle.listeners == []
    with pytest.raises(RuntimeError, match="balancing was removed from this SGD"):
        handle.set_epoch(1)


def test_a_zero_grad_of_the_users_own_comes_back():
    model = small_model()
    base = sgd(groups_of(model))
    called: list[bool] = []
    original = base.zero_grad

    def own(set_to_none: bool = True) -> None:
        called.append(set_to_none)
        original(set_to_none)

    base.zero_grad = own  # type: ignore[method-assign]
    with bo.attach(base, watch(model), bo.OGM()):
        base.zero_grad(set_to_none=False)
    assert base.zero_grad is own
    assert called == [False]


def test_what_was_put_over_ours_stays():
    model = small_model()
    base = sgd(groups_of(model))
    handle = bo.attach(base, watch(model), bo.OGM())
    ours = base.zero_grad

    def later(set_to_none: bool = True) -> None:
        ours(set_to_none)

    base.zero_grad = later  # type: ignore[method-assign]
    handle.remove()
    assert base.zero_grad is later
    base.zero_grad()


def test_epochs():
    model = small_model()
    base = sgd(groups_of(model))
    handle = bo.attach(base, watch(model), bo.OGM(start=1, end=1, unit="epoch"))
    for epoch in range(3):
        handle.set_epoch(epoch)
        train(model, base, batches(model, 2))
    assert handle.stats()["modulated"] == 2
    assert handle.stats()["outside_window"] == 4


def test_seed():
    def run(seed: int) -> torch.nn.Module:
        model = small_model()
        base = sgd(groups_of(model))
        bo.attach(base, watch(model), bo.OGM(), seed=seed)
        train(model, base, batches(model, 2))
        return model

    assert same_bits(run(1), run(1))
    assert not same_bits(run(1), run(2))


def test_other_hooks_stay():
    model = small_model()
    base = sgd(groups_of(model))
    called: list[str] = []
    base.register_step_pre_hook(lambda *_: called.append("before"))
    handle = bo.attach(base, watch(model), bo.OGM())
    base.register_step_post_hook(lambda *_: called.append("after"))
    handle.remove()
    train(model, base, batches(model, 1))
    assert called == ["before", "after"]
