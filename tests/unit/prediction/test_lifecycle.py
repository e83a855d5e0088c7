"""Options, hooks that come and go, copies, records, and what is said when nothing can be done."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F

import balanceopt as bo
from tests.dropping import dropping, fused, kept, step, warm
from tests.models import watch
from tests.training import backward, class_zero, small_model

Q = 0.5 * (1 + 0.5 * math.tanh(4 - 1))


def backward_often(model, times):
    for number in range(times):
        backward(model, class_zero(model, number))


def test_remove_leaves_nothing_behind():
    model = small_model()
    monitor = watch(model)
    hooks = {name: len(m._forward_hooks) for name, m in model.named_modules()}
    parameter = next(model.parameters())
    with pytest.raises(KeyError), bo.OPM(monitor) as modulator:
        raise KeyError
    modulator.remove()
    assert {name: len(m._forward_hooks) for name, m in model.named_modules()} == hooks
    assert not parameter._post_accumulate_grad_hooks
    assert not monitor.hooks.transforms
    assert not monitor._scorer.buffers


def test_one_that_is_garbage_collected_leaves_nothing_behind():
    model, modulator = warm(q_base=1)
    monitor, parameter = modulator.monitor, next(model.parameters())
    gone = weakref.ref(modulator)
    del modulator
    assert gone() is None
    assert kept(fused(model)).all()
    assert not monitor.hooks.transforms
    assert not monitor._scorer.buffers
    bo.OPM(monitor)
    assert not parameter._post_accumulate_grad_hooks


def test_one_that_its_model_holds_is_garbage_with_the_model():
    model, modulator = warm()
    model.modulator = modulator
    gone = weakref.ref(modulator)
    del model, modulator
    gc.collect()
    assert gone() is None


def test_a_warning_that_is_an_error_leaves_nothing_behind():
    model = small_model(1)
    monitor = watch(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="nothing to balance"):
            bo.OPM(monitor)
    assert not monitor.hooks.transforms
    assert not monitor._scorer.buffers
    assert not next(model.parameters())._post_accumulate_grad_hooks


def test_labels_observed_after_it_was_removed_are_for_the_next_pass():
    model, modulator = warm()
    modulator.remove()
    modulator.monitor.observe(class_zero(model)[1])
    fused(model)
    assert modulator.monitor.hooks.latest is not None
    assert modulator.monitor.hooks.latest.label_source == "observe"


def test_a_second_modulator_on_one_monitor_is_refused():
    _, modulator = dropping()
    with pytest.raises(ValueError, match="dropped by another method already: OPM"):
        bo.OPM(modulator.monitor)
    modulator.remove()
    bo.OPM(modulator.monitor)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"q_base": 1.1}, r"`q_base` should be a finite number from 0 to 1"),
        ({"q_base": float("nan")}, "`q_base` should be a finite number from 0 to 1"),
        ({"p_exe": -0.1}, "`p_exe` should be a finite number from 0 to 1"),
        ({"lam": -1}, "`lam` should be a finite number of at least 0"),
        ({"lam": math.inf}, "`lam` should be a finite number of at least 0"),
        ({"rescale": "half"}, "`rescale` should be one of"),
        ({"ratio": "max"}, "`ratio` should be one of"),
        ({"start": -1}, "`start` should be a whole number of at least 0"),
        ({"start": 3, "end": 2}, "`end` should not be less than `start`"),
    ],
    ids=str,
)
def test_options_are_checked_before_anything_is_hooked(options, message):
    monitor = watch(small_model())
    with pytest.raises(ValueError, match=message):
        bo.OPM(monitor, **options)
    assert not monitor._scorer.buffers
    assert not monitor.hooks.transforms


def test_what_is_no_monitor_or_has_no_head_is_refused():
    model = small_model()
    with pytest.raises(TypeError, match="`monitor` should be a ModalityMonitor"):
        bo.OPM(model)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="OPM needs uni-modal scores"):
        bo.OPM(watch(model, head=None))


def test_one_modality_is_left_alone_with_a_warning():
    model = small_model(1)
    with pytest.warns(UserWarning, match="there is nothing to balance"):
        modulator = bo.OPM(watch(model), q_base=1)
    backward_often(model, 3)
    assert kept(fused(model)).all()
    assert modulator.stats()["forwards"] == 0


def test_repr_shows_the_options():
    _, modulator = dropping(q_base=0.4, rescale="official")
    text = repr(modulator)
    assert text.startswith("OPM(q_base=0.4, lam=0.5, p_exe=1.0, rescale='official'")
    assert text.endswith("seed=3)")


def test_a_recorder_hears_ratio_and_drop_probability():
    model, modulator = dropping(start=2)
    with bo.Recorder(modulator) as recorder:
        for number in range(4):
            step(model, number)
    steps, ratios = recorder.series("ratio")["audio"]
    assert steps == [0, 1, 2]
    assert ratios == pytest.approx([4.0] * 3)
    steps, probabilities = recorder.series("drop_probability")["audio"]
    assert steps == [0, 1, 2, 3]
    assert probabilities == pytest.approx([0, 0, Q, Q])


def test_a_copy_of_the_model_is_not_dropped_from():
    model, modulator = warm(q_base=1)
    twin = copy.deepcopy(model)
    assert kept(fused(twin)).all()
    assert not kept(fused(model)).all()
    assert modulator.stats()["forwards"] == 2


def through_pickle(value):
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
def test_a_copy_drops_nothing_and_says_what_to_do(copied):
    model = small_model()
    modulator = bo.OPM(watch(model), q_base=1, seed=3)
    backward_often(model, 2)
    with pytest.warns(UserWarning, match=r"a copy of OPM drops nothing.*this one's state_dict\(\)"):
        twin, copies = copied((model, modulator))
    assert torch.equal(copies.q, modulator.q)
    assert kept(fused(twin)).all()
    copies.remove()
    resumed = bo.OPM(watch(twin), q_base=1)
    resumed.load_state_dict(modulator.state_dict())
    assert torch.equal(kept(fused(twin, 2)), kept(fused(model, 2)))


def test_parts_called_one_by_one_are_dropped_too():
    model, modulator = dropping()
    for number in range(2):
        inputs, labels = class_zero(model, number)
        features = model.encode(*inputs)
        F.cross_entropy(model.fuse(features), labels).backward()
    assert modulator.stats()["dropping"] == 1
    assert not kept(torch.cat(features, 1)).all()


def test_no_scores_is_said_once():
    model = small_model()
    modulator = bo.OPM(watch(model, labels="observe"), seed=0)
    with pytest.warns(UserWarning, match=r"no scores in 10 training forwards.*monitor\.observe"):
        backward_often(model, 11)
    backward_often(model, 1)
    assert not modulator.q.any()


def test_forwards_that_no_hook_sees_are_said():
    model, _ = dropping()
    model.eval()  # fine-tuning in eval mode, and the monitor was not told
    with pytest.warns(UserWarning, match=r"10 backwards without a training forward.*train_only=False"):
        backward_often(model, 10)
    assert not next(model.parameters())._post_accumulate_grad_hooks


def test_an_encoder_that_never_ran_is_said():
    model, _ = warm(q_base=1)
    inputs = class_zero(model)[0]
    audio = model.encoders["audio"]
    assert not kept(audio(inputs[0])).any()
    with pytest.warns(UserWarning, match="encoder of 'visual' was not called"):
        audio(inputs[0])


def test_where_its_absence_was_told_nothing_is_lost():
    model, modulator = warm(q_base=1)
    fused(model)
    inputs, labels = class_zero(model)
    assert modulator.monitor.hooks.latest is not None
    modulator.monitor.hooks.latest.closed = True  # as a step of an optimizer does
    modulator.monitor.observe(labels, present={"visual": torch.zeros(8, dtype=torch.bool)})
    audio = model.encoders["audio"]
    assert all(kept(audio(inputs[0])).all() for _ in range(2))
