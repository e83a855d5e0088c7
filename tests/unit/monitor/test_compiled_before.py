"""Compiled code of a plain run is not run in place of a balanced model's hooks, or an error says what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector

import balanceopt as bo
from balanceopt._torch import holds_compiled_code
from tests.models import CLASSES, Concat, mlp, watch
from tests.training import backward, batches, sgd, small_model

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's own
RESET = r"torch\._dynamo\.reset\(\)"


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def train(method, part, modalities=2):
    """Weights after a run with a part of the model compiled after the method was built; None for a plain run."""
    model: Any = small_model(modalities)
    parameters = list(model.parameters())
    monitor: Any = None if method is None else watch(model)
    held: list[Any] = []
    if method in ("OPM", "both"):
        held.append(bo.OPM(monitor, q_base=0.9, seed=3))
    objective: Any = None
    if method in ("inject", "both", "objective"):
        objective = bo.UnimodalObjective(monitor, CLASSES, inject=method != "objective", seed=0)
        held.append(objective)
        parameters += objective.parameters()
    optimizer: Any = sgd(parameters)
    if method in ("OGM", "both"):
        optimizer = bo.ModulatedOptimizer(optimizer, monitor, bo.OGM(0.5), seed=1)
    run: Any = torch.compile(model, backend="eager") if part == "model" else model
    for name in {"encoder": ["audio"], "encoders": ["audio", "visual"]}.get(part, []):
        model.encoders[name] = torch.compile(model.encoders[name], backend="eager")
    if part == "head":
        model.head = torch.compile(model.head, backend="eager")
    for given in batches(model, 12):
        optimizer.zero_grad()
        loss = F.cross_entropy(run(*given[0]), given[1])
        (loss + objective(given[1]) if method == "objective" else loss).backward()
        optimizer.step()
    return parameters_to_vector(model.parameters())


def backward_often(model, count):
    for given in batches(model, count):
        backward(model, given)


@pytest.mark.filterwarnings("ignore:no scores since the last step")
@pytest.mark.filterwarnings("ignore:scores are not finite, all zero")
@pytest.mark.filterwarnings("ignore:the encoder of .audio. was not called in 10")
@pytest.mark.parametrize(
    ("method", "part"),
    [
        *((method, "model") for method in ("OGM", "OPM", "inject", "objective")),
        *(("both", part) for part in ("model", "encoder", "encoders", "head")),
        ("inject", "encoders"),
        ("objective", "head"),
    ],
)
def test_a_plain_run_before(method, part):
    expected = train(method, "nothing")
    train(None, part)
    try:
        result = train(method, part)
    except (RuntimeError, UserWarning) as told:  # whether torch runs the old code is its own affair
        assert "torch._dynamo.reset()" in str(told)  # noqa: PT017
    else:
        assert torch.equal(result, expected)
    torch._dynamo.reset()
    assert torch.equal(train(method, part), expected)


def test_one_encoder_of_three_is_told_in_the_first_step():
    model = small_model(3)
    optimizer = bo.ModulatedOptimizer(sgd(model.parameters()), watch(model), seed=1)
    model.encoders["audio"].forward(torch.zeros(1, 5))
    torch.compile(mlp(5, 4), backend="eager")(torch.zeros(1, 5))
    before = parameters_to_vector(model.parameters()).detach()
    given = batches(model, 1)[0]
    hooks, model.encoders["audio"]._forward_hooks = model.encoders["audio"]._forward_hooks, {}
    backward(model, given)  # as compiled code without hooks in it
    model.encoders["audio"]._forward_hooks = hooks
    with pytest.raises(RuntimeError, match=f"encoder of 'audio' has gradients.*{RESET}"):
        optimizer.step()
    assert torch.equal(parameters_to_vector(model.parameters()), before)


def test_a_modality_that_a_batch_lacks_is_no_fault_of_compiled_code():
    class Idle(Concat):
        def encode(self, *inputs):
            return [self.encoders["audio"](inputs[0]), torch.zeros(len(inputs[1]), 4)]

    torch.compile(mlp(5, 4), backend="eager")(torch.zeros(1, 5))
    model = Idle()
    optimizer = bo.ModulatedOptimizer(sgd(model.parameters()), watch(model), seed=1)

    def run():
        for given in batches(small_model(), 2):
            backward(model, given)
            optimizer.step()

    with pytest.warns(UserWarning, match="of fewer than two modalities"):
        run()


def test_only_code_that_was_not_reset_counts():
    assert not holds_compiled_code()
    torch.compile(mlp(5, 4), backend="eager")(torch.zeros(1, 5))
    assert holds_compiled_code()
    torch._dynamo.reset()
    assert not holds_compiled_code()


def test_injection_without_a_gradient_at_the_logits_is_said():
    model = small_model()
    objective = bo.UnimodalObjective(watch(model), CLASSES, inject=True)
    model.head = torch.nn.Linear(8, CLASSES)
    with pytest.warns(UserWarning, match=r"no uni-modal gradient is added.*the head was replaced") as told:
        backward_often(model, 12)
    assert len(told) == 1
    assert all(parameter.grad is None for parameter in objective.parameters())


def test_injection_that_sees_no_call_is_said():
    model = small_model()
    objective = bo.UnimodalObjective(watch(model), CLASSES, inject=True)
    model.eval()  # fine-tuning in eval mode, and the monitor was not told
    with pytest.warns(UserWarning, match=r"inject=True saw: no uni-modal.*train_only=False"):
        backward_often(model, 10)
    objective.remove()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_the_watch_goes_once_all_encoders_were_called():
    model = small_model()
    monitor = watch(model)
    methods = [bo.OPM(monitor, seed=0), bo.UnimodalObjective(monitor, CLASSES, inject=True)]
    assert any(p._post_accumulate_grad_hooks for p in model.parameters())
    backward(model, batches(model, 1)[0])
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert len(methods) == 2
