"""load_state_dict of every class: a state that is refused changes nothing, whatever entry of it is spoilt."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import balanceopt as bo
from balanceopt.integrations._callback import Beside
from tests.blending import Run
from tests.models import CLASSES, Concat, Gated, watch
from tests.training import backward, batches, groups_of, sgd, small_model

SPOILT: list[Any] = [
    None,
    "x",
    1.5,
    math.nan,
    -1,
    True,
    [],
    {},
    torch.ones(3, 3, 3),
    torch.ones(2, dtype=torch.int64),
]

Loaded = tuple[Callable[[], Any], Callable[[Any], Any]]


def copied(value: Any) -> Any:
    """The same structure with copies of tensors."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, (list, tuple)) else value


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or a != a)


def paths(state: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a nested state."""
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    for key, item in items:
        yield (*before, key)
        yield from paths(item, (*before, key))


def spoilt_states(state: Any) -> Iterator[Any]:
    """The state with one entry missing, or of another kind or shape."""
    yield from (value for value in SPOILT if not isinstance(value, dict))
    for path in paths(state):
        for spoil in (None, *([value] for value in SPOILT)):
            other = copied(state)
            holder = other
            for key in path[:-1]:
                holder = holder[key]
            if spoil is None:
                del holder[path[-1]]
            else:
                (holder[path[-1]],) = spoil
            yield other


def trained(steps: int, make: Callable[[Concat], Any]) -> Any:
    """What `make` builds on a small model, after some steps."""
    model = small_model()
    built = make(model)
    optimizer = built if isinstance(built, torch.optim.Optimizer) else sgd(model.parameters())
    for one in batches(model, steps):
        optimizer.zero_grad()
        backward(model, one)
        optimizer.step()
    return built


def of_wrapper(steps: int) -> Loaded:
    wrapper = trained(
        steps,
        lambda model: bo.ModulatedOptimizer(sgd(groups_of(model), momentum=0.9), watch(model), seed=steps),
    )
    return lambda: [wrapper.state_dict(), wrapper.optimizer.param_groups[0]["lr"]], wrapper.load_state_dict


def of_masked_sgd(steps: int) -> Loaded:
    optimizer = trained(
        steps,
        lambda model: bo.MaskedSubnetworkSGD(
            groups_of(model), watch(model), lr=0.1, momentum=0.9, seed=steps
        ),
    )
    return lambda: [optimizer.state_dict()], optimizer.load_state_dict


def of_attached(steps: int) -> Loaded:
    held = []

    def make(model: Any) -> torch.optim.Optimizer:
        optimizer = sgd(groups_of(model), momentum=0.9)
        held.append(bo.attach(optimizer, watch(model), seed=steps))
        return optimizer

    optimizer = trained(steps, make)
    return lambda: [optimizer.state_dict(), len(held)], optimizer.load_state_dict


def of_opm(steps: int) -> Loaded:
    opm = trained(steps, lambda model: bo.OPM(watch(model), seed=steps))
    return lambda: [opm.state_dict(), opm._unimodal.layout()], opm.load_state_dict


def of_opm_by_zero_out(steps: int) -> Loaded:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = Gated()
    opm = bo.OPM(watch(model), seed=steps)
    for one in batches(model, steps):
        backward(model, one)
    return lambda: [opm.state_dict(), opm._unimodal.layout()], opm.load_state_dict


def of_scheduler(steps: int) -> Loaded:
    model = small_model()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(steps)
    scheduler = bo.ReLearnScheduler(sgd(model.parameters()), watch(model), [], [], seed=steps, epochs=99)
    for _ in range(steps):
        scheduler.step()
    return lambda: [scheduler.state_dict()], scheduler.load_state_dict


def of_blending(steps: int) -> Loaded:
    run = Run(every=1)
    for epoch in range(steps // 2):
        run.epoch(epoch)
    scheduler = run.scheduler
    return lambda: [scheduler.state_dict(), dict(run.objective.weight)], scheduler.load_state_dict


def of_objective(steps: int) -> Loaded:
    model = small_model()
    objective = bo.UnimodalObjective(watch(model), CLASSES, seed=steps)
    inputs, labels = batches(model, 1)[0]
    model(*inputs)
    objective(labels)
    return lambda: [objective.state_dict()], objective.load_state_dict


def of_fresh_objective(steps: int) -> Loaded:
    if steps > 3:
        return of_objective(steps)
    objective = bo.UnimodalObjective(watch(small_model()), CLASSES, seed=steps)
    return lambda: [[nn.parameter.is_lazy(p) for p in objective.parameters()]], objective.load_state_dict


def of_competition(steps: int) -> Loaded:
    model = small_model()
    competition = bo.CompetitionObjective(watch(model), seed=steps)
    model(*batches(model, 1)[0][0])
    competition()
    return lambda: [competition.state_dict()], competition.load_state_dict


def of_callback(steps: int) -> Loaded:
    """A framework's optimizer, whose checkpoints carry OPM and re-learning."""
    model = small_model()
    monitor = watch(model)
    optimizer = sgd(groups_of(model), momentum=0.9)
    handle = bo.attach(optimizer, monitor, seed=steps)
    beside = Beside(
        lambda monitor: bo.OPM(monitor, seed=steps),
        lambda optimizer, monitor: bo.ReLearnScheduler(optimizer, monitor, [], [], seed=steps, epochs=99),
    )
    beside.start(monitor, optimizer, lambda *_: None, resumed=False)
    for one in batches(model, steps):
        optimizer.zero_grad()
        backward(model, one)
        optimizer.step()
    return lambda: [optimizer.state_dict(), bool(handle.optimizer)], optimizer.load_state_dict


@pytest.mark.filterwarnings("ignore:the checkpoint holds")
@pytest.mark.parametrize(
    "make",
    [
        of_wrapper,
        of_masked_sgd,
        of_attached,
        of_opm,
        of_opm_by_zero_out,
        of_scheduler,
        of_blending,
        of_objective,
        of_fresh_objective,
        of_competition,
        of_callback,
    ],
)
def test_a_refused_state_changes_nothing(make: Callable[[int], Loaded]):
    state = copied(make(5)[0]()[0])
    whole, load = make(3)
    good = copied(whole()[0])
    before = copied(whole())
    refused = 0
    for spoilt in spoilt_states(state):
        if is_refused(load, spoilt):
            refused += 1
            assert same(copied(whole()), before)
        elif is_refused(load, copied(good)):  # what was taken is taken back
            whole, load = make(3)
        else:
            before = copied(whole())
    assert refused > 10


def is_refused(load: Callable[[Any], Any], state: Any) -> bool:
    try:
        load(state)
    except Exception:
        return True
    return False


@pytest.mark.parametrize("key", ["balanceopt_step", "balanceopt_seed", "balanceopt_epoch"])
@pytest.mark.parametrize("value", [None, "3", 3.0, math.nan, True, -1, [3], torch.tensor(3)], ids=repr)
@pytest.mark.parametrize("make", [of_wrapper, of_attached])
def test_a_counter_that_is_none_is_refused_at_load(make: Callable[[int], Loaded], key: str, value: Any):
    if key == "balanceopt_epoch" and value is None:
        return
    whole, load = make(3)
    before, state = copied(whole()), copied(whole()[0])
    for group in state["param_groups"]:
        group[key] = value
    with pytest.raises(ValueError, match=f"`{key}` should be a whole number"):
        load(state)
    for group in state["param_groups"]:
        del group[key]
    with pytest.raises(KeyError, match=f"Missing: .*{key}"):
        load(state)
    assert same(copied(whole()), before)


def test_a_warning_that_is_an_error_undoes_the_load():
    model = small_model()
    wrapper = bo.ModulatedOptimizer(sgd(groups_of(model)), watch(model), seed=1)
    before = copied(wrapper.state_dict())
    bare = copy.deepcopy(sgd(groups_of(small_model()), lr=0.7).state_dict())
    with pytest.raises(UserWarning, match="a bare optimizer's state"):
        wrapper.load_state_dict(bare)
    assert same(copied(wrapper.state_dict()), before)
