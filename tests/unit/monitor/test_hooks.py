"""No hook is left, copies are plain models, and users' own hooks go on working."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle
import sys
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

import balanceopt as bo
from tests.models import FUSIONS, Concat, Gated, SumHeads, batch, train_step, watch
from tests.unit.monitor.helpers import no_hooks, step


@pytest.mark.parametrize("fusion", FUSIONS)
def test_remove_leaves_no_hook(fusion):
    model = FUSIONS[fusion](3)
    criterion = nn.CrossEntropyLoss()
    monitor = watch(model, loss=criterion)
    assert monitor.hooks.active
    assert not no_hooks(model)
    inputs, labels = batch(8, 3)
    criterion(model(*inputs), labels).backward()
    for _ in range(2):
        monitor.remove()
        assert not monitor.hooks.active
        assert no_hooks(model)
        assert no_hooks(criterion)
    assert step(monitor, model, inputs, labels) is None
    assert "hooks were removed" in monitor.silence()


def test_with_leaves_no_hook_after_an_exception_in_forward():
    class Broken(Concat):
        def fuse(self, features):
            raise ValueError("broken")

    model = Broken()
    with pytest.raises(ValueError, match="broken"), watch(model):
        model(*batch()[0])
    assert no_hooks(model)


def test_with_leaves_no_hook_after_an_exception_of_the_monitor():
    model = Concat()
    with (
        pytest.raises(ValueError, match="`scores` should return"),
        watch(model, scores=lambda u: []) as monitor,
    ):
        step(monitor, model, *batch())
    assert no_hooks(model)


def test_a_module_that_takes_no_hooks_leaves_none_on_the_others():
    model = Concat()
    model.encoders["visual"] = torch.jit.script(model.encoders["visual"])
    with pytest.raises(RuntimeError, match="not supported on ScriptModules"):
        watch(model)
    assert no_hooks(model.encoders["audio"])
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_remove_between_forward_and_backward():
    model = Concat()
    monitor = watch(model)
    scores = monitor.scores()
    inputs, labels = batch()
    loss = F.cross_entropy(model(*inputs), labels)
    monitor.remove()
    loss.backward()
    assert scores.take() is None


def test_remove_forgets_scores():
    model = Concat()
    monitor = watch(model)
    scores, other = monitor.scores(), monitor.scores(steps=False)
    train_step(model, *batch())
    monitor.remove()
    assert scores.take() is other.take() is None


def test_users_hooks_stay_and_act():
    model = Concat()
    calls: Counter[str] = Counter()
    for module in model.modules():
        module.register_forward_hook(lambda module, args, output: calls.update([type(module).__name__]))
    with watch(model) as monitor:
        assert step(monitor, model, *batch()) is not None
    assert calls == {"Linear": 5, "Tanh": 2, "Sequential": 2, "Concat": 1}
    assert all(
        len(module._forward_hooks) == 1 for module in model.modules() if not isinstance(module, nn.ModuleDict)
    )


def test_a_users_hook_that_changes_an_encoders_output():
    model = Concat()
    model.encoders["audio"].register_forward_hook(lambda module, args, output: F.normalize(output))
    inputs, labels = batch()
    with watch(model) as monitor:
        sums = step(monitor, model, inputs, labels)
    assert sums is not None
    assert (sums.count == 8).all()


def test_building_a_monitor_draws_nothing_and_runs_nothing():
    model = Concat()
    model.forward = None  # type: ignore[assignment, method-assign]
    before = torch.get_rng_state()
    watch(model).remove()
    assert torch.equal(torch.get_rng_state(), before)


# Copies


def pickled(value):
    return pickle.loads(pickle.dumps(value))


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


MODELS = {"split": Concat, "per-head": SumHeads, "zero-out": Gated}
WAYS = pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])


@WAYS
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("trained", [False, True])
def test_a_copy_of_the_model_is_a_plain_model(kind, trained, copied):
    model, seen = MODELS[kind](), []
    inputs, labels = batch()
    with watch(model) as monitor:
        monitor.watch_loss(nn.CrossEntropyLoss())
        if trained:
            step(monitor, model, inputs, labels)
            model.zero_grad()
        scores = monitor.scores()
        monitor.hooks.outputs.add(lambda *given: seen.append(given))
        twin = copied(model)
        train_step(twin, inputs, labels)
        assert scores.take() is None
        assert seen == []
        assert not any(p.grad is not None for p in model.parameters())
        train_step(model, inputs, labels)
        assert scores.take() is not None
        assert len(seen) == len(model.names)
    assert all(
        torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), twin.parameters(), strict=True)
    )


@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_deepcopy_amid_a_step(when):
    model = Concat()
    inputs, labels = batch()
    with watch(model) as monitor:
        scores = monitor.scores()
        twin = copy.deepcopy((model, monitor)) if when == "before" else None
        loss = F.cross_entropy(model(*inputs), labels)
        twin = copy.deepcopy((model, monitor)) if when == "between" else twin
        loss.backward()
        twin = copy.deepcopy((model, monitor)) if when == "after" else twin
        assert scores.take() is not None
    assert twin is not None
    train_step(twin[0], inputs, labels)


def test_an_averaged_model_is_not_watched():
    model = Concat()
    inputs, labels = batch()
    with watch(model) as monitor:
        averaged = AveragedModel(model)
        scores = monitor.scores()
        train_step(model, inputs, labels)
        averaged.update_parameters(model)
        averaged(*inputs)
        sums = scores.take()
    assert sums is not None
    assert sums.count.tolist() == [8, 8]


# Owners that go


def test_a_monitor_that_is_dropped_leaves_no_hook():
    model, criterion = Concat(), nn.CrossEntropyLoss()
    monitor = watch(model, loss=criterion)
    assert not no_hooks(model)
    train_step(model, *batch())
    del monitor
    gc.collect()
    assert no_hooks(model)
    assert no_hooks(criterion)


def test_a_consumer_keeps_its_monitor():
    model = Concat()
    scores = watch(model).scores()
    gc.collect()
    train_step(model, *batch())
    assert scores.take() is not None
    del scores
    gc.collect()
    assert no_hooks(model)


def test_a_model_that_holds_its_monitor_goes_with_it():
    model: Any = Concat()
    model.monitor = watch(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_listener_that_is_dropped_is_not_called():
    class Listener:
        def tap(self, name, output, current):
            calls.append(name)

    calls: list[str] = []
    model = Concat()
    with watch(model) as monitor:
        listener = Listener()
        monitor.hooks.outputs.add(listener.tap)
        train_step(model, *batch())
        del listener
        gc.collect()
        train_step(model, *batch())
    assert calls == list(model.names)


# Interrupts


def lines_of(run):
    """How often a line of the package or of torch's registration of hooks begins while `run` runs."""
    lines = 0

    def count():
        nonlocal lines
        lines += 1

    tracing(run, count)
    return lines


def tracing(run, at_line):
    """Run with `at_line` called where a line begins."""

    def trace(frame, event, argument):
        name = frame.f_code.co_filename
        if "balanceopt/" not in name and "register_forward" not in frame.f_code.co_name:
            return None
        if event == "line":
            at_line()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)


def interrupted(run, line):
    """Run with an interrupt at the line of that number."""
    left = line

    def at_line():
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        tracing(run, at_line)


@pytest.mark.parametrize("make", [Concat, SumHeads])
def test_an_interrupt_while_a_monitor_is_built_leaves_no_hook(make):
    model, criterion = make(), nn.CrossEntropyLoss()
    built = []

    def build():
        built.append(watch(model, loss=criterion))

    lines = lines_of(build)
    built.pop().remove()
    for line in range(1, lines + 1):
        interrupted(build, line)
        assert not built
        assert no_hooks(model), line
        assert no_hooks(criterion), line


def test_an_interrupt_of_remove_leaves_no_hook_once_it_is_called_again():
    model = Concat()
    for line in range(1, lines_of(watch(model).remove) + 1):
        monitor = watch(model)
        interrupted(monitor.remove, line)
        monitor.remove()
        assert no_hooks(model), line


@WAYS
@pytest.mark.parametrize("kind", MODELS)
def test_a_copy_of_model_and_monitor_watches_nothing(kind, copied):
    model = MODELS[kind]()
    with watch(model) as monitor:
        train_step(model, *batch())
        twin, inert = copied((model, monitor))
        assert inert.model is twin
        assert inert.encoders == dict(twin.encoders.items())
        assert not inert.hooks.active
        assert step(inert, twin, *batch()) is None
        assert "hooks were removed" in inert.silence()
        assert inert.stats()["passes"] == 0
        inert.observe(batch()[1])
        inert.remove()
        assert monitor.hooks.active
        assert step(monitor, model, *batch()) is not None


def test_two_monitors_are_removed_each_for_itself():
    model = Concat()
    first, second = watch(model), watch(model)
    first.remove()
    assert step(second, model, *batch()) is not None
    second.remove()
    assert no_hooks(model)


def test_state_dict_is_the_models_own():
    model = Concat()
    names = list(model.state_dict())
    with watch(model) as monitor:
        step(monitor, model, *batch())
        assert list(model.state_dict()) == names
        model.load_state_dict(model.state_dict())


def test_exporting_the_model_in_eval_mode():
    model = Concat().eval()
    inputs, _ = batch()
    with watch(model):
        exported = torch.export.export(model, tuple(inputs), strict=False)
    torch.testing.assert_close(exported.module()(*inputs), model(*inputs))


def test_tracing_the_model_in_eval_mode():
    model = Concat().eval()
    inputs, _ = batch()
    with watch(model):
        traced = torch.jit.trace(model, tuple(inputs))
    torch.testing.assert_close(traced(*inputs), model(*inputs))


def test_type_of_the_public_names():
    from balanceopt.monitor import ModalityMonitor, ScoreBuffer, Scores

    assert ModalityMonitor is bo.ModalityMonitor
    with watch(model := Concat()) as monitor:
        assert isinstance(monitor.scores(), ScoreBuffer)
        assert isinstance(step(monitor, model, *batch()), Scores)
