"""What is left when balancing ends: by `remove`, by dropping the wrapper, by a constructor that raises."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch_optimizer
from torch import nn

import balanceopt as bo
from tests.models import watch
from tests.training import backward, batch, batches, groups_of, modulated, same_bits, sgd, small_model, train
from tests.unit.optim.test_attach import traces

FORMS: dict[str, Callable[..., Any]] = {"wrapper": bo.ModulatedOptimizer, "hooks": bo.attach}
both_forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def scores_of(model: Any, monitor: bo.ModalityMonitor) -> int:
    """How many of one more training pass the monitor scores: none where nobody asks for it."""
    before = sum(monitor.stats()["labels"].values())
    backward(model, batch(99, model))
    backward(model, batch(98, model))  # a pass is scored when the next one comes
    return sum(monitor.stats()["labels"].values()) - before


@pytest.fixture
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


# -- remove ------------------------------------------------------------------------------------------------------


@both_forms
def test_remove_returns_the_base_as_it_was(form: Any):
    model = small_model()
    base, monitor = sgd(groups_of(model), momentum=0.9), watch(model)
    before = traces(base)
    balancing = form(base, monitor)
    train(model, base if form is bo.attach else balancing, batches(model, 2))
    assert balancing.remove() is base
    assert balancing.remove() is base
    assert traces(base) == before
    assert scores_of(model, monitor) == 0
    model.zero_grad()
    twin = small_model()
    twin.load_state_dict(model.state_dict())
    plain = sgd(groups_of(twin), momentum=0.9)
    plain.load_state_dict(copy.deepcopy(base.state_dict()))
    train(model, base, batches(model, 3))
    train(twin, plain, batches(twin, 3))
    assert same_bits(model, twin)


@both_forms
def test_the_counters_stay_if_they_are_to(form: Any):
    model = small_model()
    base, monitor = sgd(groups_of(model)), watch(model)
    balancing = form(base, monitor, seed=5)
    train(model, base if form is bo.attach else balancing, batches(model, 2))
    balancing.remove(keep_state=True)
    balancing.remove()  # the second time nothing happens
    assert all((g["balanceopt_step"], g["balanceopt_seed"]) == (2, 5) for g in base.param_groups)
    again = form(base, monitor)
    train(model, base if form is bo.attach else again, batches(model, 2))
    assert base.param_groups[0]["balanceopt_step"] == 4


def test_a_removed_wrapper_does_not_step_and_says_what_does():
    model, optimizer = modulated()
    train(model, optimizer, batches(model, 2))
    base = optimizer.remove()
    message = r"balancing was removed from this SGD\. Use the base optimizer, which remove\(\) returned"
    before = copy.deepcopy(model.state_dict())
    backward(model, batch(2, model))
    for use in (optimizer.step, lambda: optimizer.step(lambda: 0.0), lambda: optimizer.set_epoch(1)):
        with pytest.raises(RuntimeError, match=message):
            use()
    assert all(torch.equal(x, y) for x, y in zip(model.state_dict().values(), before.values(), strict=True))
    assert optimizer.stats()["modulated"] == 2
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert len(base.param_groups) == 4
    assert not any(key.startswith("balanceopt_") for group in base.param_groups for key in group)


@both_forms
def test_a_base_that_was_given_back_may_be_balanced_again(form: Any):
    model = small_model()
    base, monitor = sgd(groups_of(model)), watch(model)
    for _ in range(2):
        balancing = form(base, monitor)
        train(model, base if form is bo.attach else balancing, batches(model, 2))
        assert balancing.stats()["modulated"] == 2
        balancing.remove()


def test_masked_sgd_gives_its_sgd_back():
    model = small_model()
    monitor = watch(model)
    optimizer = bo.MaskedSubnetworkSGD(groups_of(model), monitor, lr=0.1, momentum=0.9)
    train(model, optimizer, batches(model, 2))
    base = optimizer.remove()
    assert type(base) is torch.optim.SGD
    assert set(traces(base)[2][0]) == set(traces(sgd(groups_of(model)))[2][0])
    with pytest.raises(RuntimeError, match="balancing was removed from this SGD"):
        optimizer.step()
    assert scores_of(model, monitor) == 0


# -- dropped -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_no_collector")
@pytest.mark.parametrize("method", [bo.OGM, bo.AMSS, lambda: bo.OGM(apply_to="update")])
def test_a_dropped_wrapper_is_gone_at_once_and_nothing_is_scored_for_it(method: Any):
    model = small_model()
    base, monitor = sgd(groups_of(model)), watch(model)
    optimizer = bo.ModulatedOptimizer(base, monitor, method())
    train(model, optimizer, batches(model, 3))
    gone = weakref.ref(optimizer)
    assert scores_of(model, monitor) > 0
    del optimizer
    assert gone() is None
    model.zero_grad()
    assert scores_of(model, monitor) == 0
    again = bo.ModulatedOptimizer(base, monitor, method())  # the base is free
    train(model, again, batches(model, 2))
    assert again.stats()["modulated"] == 2
    assert base.param_groups[0]["balanceopt_step"] == 5


@both_forms
def test_a_base_whose_wrapper_lives_is_not_wrapped_again(form: Any):
    model = small_model()
    base, monitor = sgd(groups_of(model)), watch(model)
    first = form(base, monitor)
    for other in FORMS.values():
        with pytest.raises(
            ValueError, match=r"this SGD is modulated already.*Call that one's remove\(\) first"
        ):
            other(base, monitor)
    train(model, base if form is bo.attach else first, batches(model, 1))
    assert first.stats()["modulated"] == 1


def test_hooks_stay_while_the_optimizer_does_and_go_with_it():
    model = small_model()
    base, monitor = sgd(groups_of(model)), watch(model)
    bo.attach(base, monitor)  # nobody holds the handle
    gc.collect()
    train(model, base, batches(model, 2))
    assert base.param_groups[0]["balanceopt_step"] == 2
    del base
    gc.collect()
    model.zero_grad()
    assert scores_of(model, monitor) == 0


# -- a constructor that raises -----------------------------------------------------------------------------------


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.audio, self.visual, self.head = nn.Linear(5, 4), nn.Conv2d(1, 4, 3), nn.Linear(8, 3)


def images() -> tuple[nn.Module, bo.ModalityMonitor]:
    model = Images()
    return model, bo.ModalityMonitor(model, {"audio": "audio", "visual": "visual"}, head="head")


def watched(modalities: int) -> tuple[nn.Module, bo.ModalityMonitor]:
    model = small_model(modalities)
    return model, watch(model)


WARNED: dict[str, tuple[Callable[[], Any], Callable[[Any], torch.optim.Optimizer], str]] = {
    "hint": (lambda: watched(2), torch.optim.Adam, "divides a constant gradient factor out"),
    "defect": (images, torch_optimizer.Adafactor, "can't step parameters of more than two dimensions"),
    "one modality": (lambda: watched(1), sgd, "there is nothing to balance"),
}


@pytest.mark.filterwarnings("error")
@both_forms
@pytest.mark.parametrize("name", WARNED)
def test_a_warning_that_is_an_error_leaves_nothing_behind(form: Any, name: str):
    build, make, message = WARNED[name]
    model, monitor = build()
    base = make(model.parameters())
    before = traces(base)
    modulation = bo.OGM(0.5 if name == "hint" else 0)
    with pytest.raises(UserWarning, match=message):
        form(base, monitor, modulation)
    assert traces(base) == before
    assert not list(monitor._scorer.buffers)
    with pytest.warns(UserWarning, match=message):
        form(base, monitor, modulation).remove()


# -- copies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, pickle.dumps])
def test_a_wrapper_is_not_copied_and_says_what_to_do(duplicate: Callable[[Any], Any]):
    model, optimizer = modulated()
    train(model, optimizer, batches(model, 1))
    with pytest.raises(
        TypeError, match=r"ModulatedOptimizer can't be copied or pickled.*Save its state_dict\(\)"
    ):
        duplicate(optimizer)
    train(model, optimizer, batches(model, 1))
    assert optimizer.stats()["modulated"] == 2


def test_a_copy_of_an_optimizer_with_hooks_is_a_plain_one():
    model = small_model()
    base = sgd(groups_of(model))
    bo.attach(base, watch(model))
    train(model, base, batches(model, 1))
    twin, plain = copy.deepcopy((model, base))
    other = copy.deepcopy(model)
    train(twin, plain, batches(twin, 2))
    train(other, sgd(groups_of(other)), batches(other, 2))
    assert same_bits(twin, other)
