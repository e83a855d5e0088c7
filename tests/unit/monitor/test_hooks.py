"""No hook is left; copies and pickles carry a monitor of their own; users' own hooks go on working."""

from __future__ import annotations

import copy
import io
import pickle
from collections import Counter

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
    monitor = watch(model, labels=criterion)
    assert monitor.active
    assert not no_hooks(model)
    inputs, labels = batch(8, 3)
    criterion(model(*inputs), labels).backward()
    for _ in range(2):
        monitor.remove()
        assert not monitor.active
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
    with pytest.warns(DeprecationWarning, match="jit.script"):
        model.encoders["visual"] = torch.jit.script(model.encoders["visual"])
    with pytest.raises(RuntimeError, match="not supported on ScriptModules"):
        watch(model)
    assert no_hooks(model.encoders["audio"])
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_remove_between_forward_and_backward():
    model = Concat()
    monitor = watch(model)
    scores = monitor.accumulator()
    inputs, labels = batch()
    loss = F.cross_entropy(model(*inputs), labels)
    monitor.remove()
    loss.backward()
    assert scores.take() is None


def test_remove_forgets_scores():
    model = Concat()
    monitor = watch(model)
    scores, other = monitor.accumulator(), monitor.accumulator(steps=False)
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


def assert_independent(model, monitor, twin):
    """The twin's own monitor serves it, the original's does not notice."""
    inputs, labels = batch()
    scores = monitor.accumulator()
    train_step(twin, inputs, labels)
    assert scores.take() is None
    assert not {id(p) for p in model.parameters()} & {id(p) for p in twin.parameters()}
    assert not any(p.grad is not None for p in model.parameters())
    train_step(model, inputs, labels)
    assert scores.take() is not None


MODELS = {"split": Concat, "per-head": SumHeads, "zero-out": Gated}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("trained", [False, True])
def test_deepcopy_of_the_model(kind, trained):
    model = MODELS[kind]()
    with watch(model) as monitor:
        if trained:
            step(monitor, model, *batch())
            model.zero_grad()
        assert_independent(model, monitor, copy.deepcopy(model))


@pytest.mark.parametrize("kind", MODELS)
def test_deepcopy_of_model_and_monitor_together(kind):
    model = MODELS[kind]()
    with watch(model) as monitor:
        twin, twins_monitor = copy.deepcopy((model, monitor))
        assert twins_monitor.model is twin
        assert step(twins_monitor, twin, *batch()) is not None
        twins_monitor.remove()
        assert no_hooks(twin)
        assert monitor.active
        assert step(monitor, model, *batch()) is not None


@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_deepcopy_amid_a_step(when):
    model = Concat()
    inputs, labels = batch()
    with watch(model) as monitor:
        scores = monitor.accumulator()
        twin = copy.deepcopy(model) if when == "before" else None
        loss = F.cross_entropy(model(*inputs), labels)
        twin = copy.deepcopy(model) if when == "between" else twin
        loss.backward()
        twin = copy.deepcopy(model) if when == "after" else twin
        assert scores.take() is not None
    assert twin is not None
    train_step(twin, inputs, labels)


@pytest.mark.parametrize("kind", MODELS)
def test_pickle_of_model_and_monitor(kind):
    model = MODELS[kind]()
    with watch(model, labels=nn.CrossEntropyLoss()) as monitor:
        train_step(model, *batch())
        twin, twins_monitor = pickle.loads(pickle.dumps((model, monitor)))
        assert repr(twins_monitor) == repr(monitor)
        twins_monitor.observe(batch()[1])
        twins_monitor.remove()
        assert no_hooks(twin)


def test_torch_save_of_the_whole_model():
    model = Concat()
    with watch(model) as monitor:
        train_step(model, *batch())
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
        model.zero_grad()
        assert_independent(model, monitor, twin)


def test_an_averaged_model_carries_its_own():
    model = Concat()
    with watch(model) as monitor:
        averaged = AveragedModel(model)
        inputs, labels = batch()
        scores = monitor.accumulator()
        train_step(model, inputs, labels)
        averaged.update_parameters(model)
        averaged(*inputs)
        sums = scores.take()
    assert sums is not None
    assert sums.count.tolist() == [8, 8]


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
        exported = torch.export.export(model, tuple(inputs))
    torch.testing.assert_close(exported.module()(*inputs), model(*inputs))


def test_tracing_the_model_in_eval_mode():
    model = Concat().eval()
    inputs, _ = batch()
    with watch(model), pytest.warns(DeprecationWarning, match="jit.trace"):
        traced = torch.jit.trace(model, tuple(inputs))
    torch.testing.assert_close(traced(*inputs), model(*inputs))


def test_type_of_the_public_names():
    from balanceopt.monitor import Accumulator, ModalityMonitor, ModalitySums

    assert ModalityMonitor is bo.ModalityMonitor
    with watch(model := Concat()) as monitor:
        assert isinstance(monitor.accumulator(), Accumulator)
        assert isinstance(step(monitor, model, *batch()), ModalitySums)
