"""ModulatedOptimizer as an Optimizer: everything that users and frameworks ask of one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import balanceopt as bo
from tests.models import Concat, watch
from tests.training import backward, batch, batches, grad_of, groups_of, modulated, sgd, small_model, train


def test_it_is_an_optimizer_that_shows_its_base():
    _, optimizer = modulated(make=lambda groups: sgd(groups, momentum=0.9))
    assert isinstance(optimizer, Optimizer)
    assert optimizer.param_groups is optimizer.optimizer.param_groups
    assert optimizer.state is optimizer.optimizer.state
    assert optimizer.defaults is optimizer.optimizer.defaults
    assert repr(optimizer).startswith("ModulatedOptimizer(OGM(alpha=0.5")
    assert "SGD" in repr(optimizer)
    assert isinstance(optimizer.modulation, bo.OGM)
    assert isinstance(optimizer.monitor, bo.ModalityMonitor)


def test_groups_state_and_defaults_are_written_through():
    _, optimizer = modulated()
    base = optimizer.optimizer
    optimizer.param_groups = list(base.param_groups)
    optimizer.state = {}
    optimizer.defaults = {"lr": 1}
    assert (optimizer.param_groups, optimizer.state, optimizer.defaults) == (
        base.param_groups,
        base.state,
        base.defaults,
    )
    assert base.defaults == {"lr": 1}


def test_the_default_is_ogm_ge():
    model = small_model()
    optimizer = bo.ModulatedOptimizer(sgd(groups_of(model)), watch(model))
    assert isinstance(optimizer.modulation, bo.OGM)
    assert optimizer.modulation.noise
    assert optimizer.modulation.alpha == 0.1


def test_several_modulations_are_shown_as_a_list():
    _, optimizer = modulated([bo.OGM(0.1), bo.OGM(0.2)])
    assert isinstance(optimizer.modulation, list)
    assert [m.alpha for m in optimizer.modulation if isinstance(m, bo.OGM)] == [0.1, 0.2]


def test_the_base_keeps_no_state_of_ours():
    model, optimizer = modulated(make=lambda groups: sgd(groups, momentum=0.9))
    train(model, optimizer, batches(model, 2))
    assert all(set(own) == {"momentum_buffer"} for own in optimizer.optimizer.state.values())


# -- hooks -------------------------------------------------------------------------------------------------------


def test_step_hooks():
    model, optimizer = modulated()
    called: list[str] = []
    before = optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    train(model, optimizer, batches(model, 1))
    before.remove()
    train(model, optimizer, batches(model, 1))
    assert called == ["before", "after", "after"]


def test_hooks_on_all_optimizers_see_a_step_once():
    model, optimizer = modulated()
    called: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: called.append("before")),
        register_optimizer_step_post_hook(lambda *_: called.append("after")),
    ]
    try:
        train(model, optimizer, batches(model, 2))
    finally:
        for handle in handles:
            handle.remove()
    assert called == ["before", "after"] * 2


def test_a_step_hook_may_give_the_step_another_closure():
    model, optimizer = modulated()
    called: list[int] = []

    def closure() -> float:
        called.append(1)
        optimizer.zero_grad()
        return float(backward(model, batch(0, model)))

    optimizer.register_step_pre_hook(lambda self, args, kwargs: ((self, closure), kwargs))
    assert optimizer.step() is not None
    assert called == [1]


@pytest.mark.parametrize("kind", ["expanded", "shared", "overlapping", "unfolded"])
def test_gradients_without_memory_of_their_own_are_refused(kind: str):
    model, optimizer = modulated()
    backward(model, batch(0, model))
    first, second = (own for own in model.modalities["audio"].parameters() if own.dim() == 1)
    weight = next(model.modalities["audio"].parameters())
    if kind == "expanded":
        weight.grad = grad_of(weight).mean(-1, keepdim=True).expand_as(weight)
    elif kind == "unfolded":
        weight.grad = torch.randn(weight.numel()).as_strided(weight.shape, (1, 1))
    elif kind == "overlapping":
        buffer = torch.randn(len(first) + len(second))
        first.grad, second.grad = buffer[: len(first)], buffer[len(first) - 1 :][: len(second)]
    else:
        second.grad = grad_of(first)[: len(second)]
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"each should have memory of its own.*set it to a .clone\(\)"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_state_dict_hooks():
    _, optimizer = modulated()
    called: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda _: called.append("saving"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "more": 1})
    optimizer.register_load_state_dict_pre_hook(
        lambda _, state: {k: v for k, v in state.items() if k != "more"}
    )
    optimizer.register_load_state_dict_post_hook(lambda _: called.append("loaded"))
    state = optimizer.state_dict()
    assert state["more"] == 1
    optimizer.load_state_dict(state)
    assert called == ["saving", "loaded"]


def test_a_load_hook_may_change_the_state_without_changing_the_callers():
    _, optimizer = modulated()

    def empty(_: Optimizer, state: dict[str, Any]) -> None:
        state["state"] = {}

    optimizer.register_load_state_dict_pre_hook(empty)
    state = optimizer.state_dict()
    kept = state["state"]
    optimizer.load_state_dict(state)
    assert state["state"] is kept


def test_load_state_dict_by_keyword():
    _, optimizer = modulated()
    optimizer.load_state_dict(state_dict=optimizer.state_dict())


# -- bases that never called Optimizer.__init__ ------------------------------------------------------------------


def legacy(optimizer: Optimizer) -> Optimizer:
    """As torch-optimizer's Lookahead: wraps an optimizer, and never calls Optimizer.__init__."""

    # A class for each: torch marks the class once an instance is loaded, and then no other instance can step.
    class Legacy(Optimizer):
        def __init__(self) -> None:
            self.optimizer = optimizer
            self.param_groups = optimizer.param_groups
            self.state = optimizer.state
            self.defaults = optimizer.defaults

        def step(self, closure: Any = None) -> Any:
            return optimizer.step(closure)

        def zero_grad(self, set_to_none: bool = True) -> None:
            optimizer.zero_grad(set_to_none)

    return Legacy()


def test_legacy_bases_are_repaired():
    model, optimizer = modulated(make=lambda groups: legacy(sgd(groups)))
    train(model, optimizer, batches(model, 2))
    with pytest.warns(UserWarning, match="loading gave Legacy param groups of its own"):
        optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.stats()["modulated"] == 2


def test_attach_says_what_to_do_with_a_legacy_base():
    model = small_model()
    with pytest.raises(TypeError, match=r"Legacy has no step hooks.*`\.optimizer`"):
        bo.attach(legacy(sgd(groups_of(model))), watch(model), bo.OGM())


def test_an_optimizer_around_the_wrapper():
    model, inner = modulated()
    outer = legacy(inner)
    train(model, outer, batches(model, 2))
    assert inner.stats()["modulated"] == 2


# -- on the wrapper or on the base -------------------------------------------------------------------------------


def rates(model: Concat, optimizer: Optimizer, scheduler: Any) -> list[float]:
    found = []
    for one in batches(model, 4):
        train(model, optimizer, [one])
        scheduler.step()
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_a_scheduler_on_the_base_reaches_the_wrapper():
    model, optimizer = modulated()
    on_base = torch.optim.lr_scheduler.ExponentialLR(optimizer.optimizer, 0.5)
    assert rates(model, optimizer, on_base) == pytest.approx([0.05, 0.025, 0.0125, 0.00625])


def test_step_may_be_replaced_on_the_instance():
    # As Accelerate does under a GradScaler.
    model, optimizer = modulated()
    original = optimizer.step
    calls: list[int] = []

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    optimizer.step = counting  # type: ignore[method-assign]
    train(model, optimizer, batches(model, 2))
    assert len(calls) == 2
