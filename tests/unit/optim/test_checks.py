"""What is refused, when, and with which words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_optimizer
from torch import nn

import balanceopt as bo
from tests.models import watch
from tests.training import backward, batch, batches, groups_of, modulated, sgd, small_model, train

Form = Any
both_forms = pytest.mark.parametrize(
    "form", [bo.ModulatedOptimizer, lambda o, m, modulation=None: bo.attach(o, m, modulation or bo.OGM())]
)


@both_forms
def test_wrong_kinds(form: Form):
    model = small_model()
    optimizer, monitor = sgd(groups_of(model)), watch(model)
    with pytest.raises(TypeError, match=r"`optimizer` should be a torch\.optim\.Optimizer. Found \["):
        form(groups_of(model), monitor)
    with pytest.raises(TypeError, match=r"`monitor` should be a ModalityMonitor. Found Concat"):
        form(optimizer, model)
    with pytest.raises(TypeError, match="`modulation` should be a Modulation"):
        form(optimizer, monitor, ["OGM"])


def test_no_modulation():
    model = small_model()
    with pytest.raises(TypeError, match=r"or several. Found none"):
        bo.ModulatedOptimizer(sgd(groups_of(model)), watch(model), [])


@both_forms
def test_a_monitor_without_a_head(form: Form):
    model = small_model()
    with pytest.raises(ValueError, match=r"OGM needs uni-modal scores. Build the monitor with `head=`"):
        form(sgd(groups_of(model)), watch(model, head=None))


@both_forms
def test_parameters_of_another_model(form: Form):
    with pytest.raises(ValueError, match="holds none of the monitor's model's parameters"):
        form(sgd(groups_of(small_model())), watch(small_model()))


@both_forms
def test_tags_that_the_monitor_does_not_have(form: Form):
    model = small_model()
    groups = bo.modality_groups(model, {"sound": "encoders.audio", "visual": "encoders.visual"})
    message = r"tagged with modality .sound., the monitor has \['audio', 'visual'\]"
    with pytest.raises(KeyError, match=message):
        form(sgd(groups), watch(model))


@both_forms
def test_differentiable(form: Form):
    model = small_model()
    with pytest.raises(NotImplementedError, match="differentiable=True is not supported"):
        form(sgd(groups_of(model), differentiable=True), watch(model))


@both_forms
def test_optimizer_in_backward(form: Form):
    from torch.distributed.optim import _apply_optimizer_in_backward  # type: ignore[attr-defined]

    model = small_model()
    _apply_optimizer_in_backward(torch.optim.SGD, model.head.parameters(), {"lr": 0.1})
    with pytest.raises(NotImplementedError, match="steps inside backward leaves no gradients"):
        form(sgd(groups_of(model)), watch(model))


@both_forms
def test_fsdp1(form: Form):
    model = small_model()
    model.head.weight._fsdp_flattened = True  # type: ignore[attr-defined]
    with pytest.raises(NotImplementedError, match=r"FSDP1.* is not supported.*fully_shard"):
        form(sgd(groups_of(model)), watch(model))


def test_a_group_that_becomes_differentiable_by_add_param_group():
    model = small_model()
    optimizer = bo.ModulatedOptimizer(sgd(model.encoders.parameters()), watch(model))
    with pytest.raises(NotImplementedError, match="differentiable"):
        optimizer.add_param_group({"params": list(model.head.parameters()), "differentiable": True})


# -- twice -------------------------------------------------------------------------------------------------------


class Around(torch.optim.Optimizer):
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        super().__init__(optimizer.param_groups, {})


@both_forms
def test_a_wrapped_optimizer_is_not_modulated_again(form: Form):
    _, optimizer = modulated()
    for twice in (optimizer, Around(optimizer)):
        with pytest.raises(ValueError, match=r"is modulated already, by a ModulatedOptimizer or by attach"):
            form(twice, optimizer.monitor)


@both_forms
def test_an_attached_optimizer_is_not_modulated_again(form: Form):
    model = small_model()
    base, monitor = sgd(groups_of(model)), watch(model)
    with bo.attach(base, monitor, bo.OGM()), pytest.raises(ValueError, match="is modulated already"):
        form(base, monitor)
    form(base, monitor)


def test_no_hooks_on_the_base_of_a_wrapper():
    model = small_model()
    base, monitor = sgd(groups_of(model)), watch(model)
    wrapper = bo.ModulatedOptimizer(base, monitor)
    with pytest.raises(ValueError, match=r"this SGD is modulated already.*Call that one's remove\(\) first"):
        bo.attach(base, monitor, bo.OGM())
    del wrapper
    bo.attach(base, monitor, bo.OGM()).remove()


@both_forms
def test_a_refusal_leaves_nothing_behind(form: Form):
    model = small_model()
    monitor = watch(model)
    base = sgd(bo.modality_groups(model, {"sound": "encoders.audio"}))
    keys = set(base.param_groups[0])
    with pytest.raises(KeyError):
        form(base, monitor)
    assert set(base.param_groups[0]) == keys
    assert not base._optimizer_step_pre_hooks
    monitor.observe(batch(0, model)[1])
    backward(model, batch(0, model))  # nobody takes these scores
    assert monitor.stats()["labels"] == {}


# -- silent failures that are said (ecosystem.md 4.4) ------------------------------------------------------------


def silent_step(model: nn.Module, optimizer: bo.ModulatedOptimizer, message: str) -> None:
    backward(model, batch(0, small_model()))
    with pytest.warns(UserWarning, match=message):
        optimizer.step()


def test_the_monitor_was_removed():
    model, optimizer = modulated()
    optimizer.monitor.remove()
    silent_step(model, optimizer, "the monitor's hooks were removed")


def test_the_head_was_replaced():
    model, optimizer = modulated()
    model.head = nn.Linear(8, 5)
    silent_step(model, optimizer, "the head's hook did not fire: the head was replaced")


class Functional(nn.Module):
    """Uses its head's weights, not its head."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_model()

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        z = torch.cat(self.inner.encode(*inputs), -1)
        return nn.functional.linear(z, self.inner.head.weight, self.inner.head.bias)


def test_the_head_is_used_functionally():
    model = Functional()
    monitor = bo.ModalityMonitor(model, model.inner.modalities, head=model.inner.head)
    optimizer = bo.ModulatedOptimizer(sgd(model.parameters()), monitor)
    silent_step(model, optimizer, "or only its weights are used")


def test_training_in_eval_mode():
    model, optimizer = modulated()
    silent_step(model.eval(), optimizer, "train_only=False")


def test_a_model_compiled_before_the_monitor():
    torch._dynamo.reset()
    model = small_model()
    model.compile(backend="eager")
    model(*batch(0, model)[0])
    optimizer = bo.ModulatedOptimizer(sgd(groups_of(model)), watch(model))
    silent_step(
        model, optimizer, "compiled, or another one of its class: build the monitor before the first call"
    )
    torch._dynamo.reset()


def test_labels_that_were_asked_for_and_never_came():
    model = small_model()
    optimizer = bo.ModulatedOptimizer(sgd(groups_of(model)), watch(model, labels="observe"))
    silent_step(model, optimizer, r"call monitor\.observe\(labels\)")


def test_every_warning_names_the_users_line(recwarn: pytest.WarningsRecorder):
    model, optimizer = modulated()
    train(model.eval(), optimizer, batches(model, 1))
    (warning,) = recwarn
    assert warning.filename == train.__code__.co_filename


# -- known defects of torch-optimizer ---------------------------------------------------------------------------------


class Images(nn.Module):
    """An encoder with a convolution beside one without."""

    def __init__(self) -> None:
        super().__init__()
        self.audio = nn.Linear(5, 4)
        self.visual = nn.Conv2d(1, 4, 3)
        self.head = nn.Linear(8, 3)


def test_an_optimizer_that_cannot_step_convolutions_is_named():
    model = Images()
    encoders = {"audio": model.audio, "visual": model.visual}
    monitor = bo.ModalityMonitor(model, encoders, head=model.head)
    with pytest.warns(UserWarning, match=r"Found one of shape \(4, 1, 3, 3\). Use torch\.optim\.Adafactor"):
        bo.ModulatedOptimizer(torch_optimizer.Adafactor(model.parameters()), monitor)
    bo.ModulatedOptimizer(torch.optim.Adafactor(model.parameters()), monitor)


def test_groups_that_loading_parts_from_those_inside_are_named():
    model = small_model()
    lookahead = torch_optimizer.Lookahead(sgd(groups_of(model)))
    optimizer = bo.ModulatedOptimizer(lookahead, watch(model))
    with pytest.warns(UserWarning, match="loading gave Lookahead param groups of its own"):
        optimizer.load_state_dict(optimizer.state_dict())
    assert lookahead.optimizer.param_groups is not lookahead.param_groups
