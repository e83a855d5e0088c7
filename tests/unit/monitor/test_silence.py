"""Why no score came, in words: never silent."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import balanceopt as bo
from tests.models import Concat, batch, train_step, watch
from tests.unit.monitor.helpers import step


def silence_after(model, run=train_step, steps=1, **options):
    with watch(model, **options) as monitor:
        scores = monitor.scores()
        for _ in range(steps):
            run(model, *batch())
            assert scores.take() is None
        return monitor.silence()


def test_nothing_called_yet():
    with watch(Concat()) as monitor:
        assert "no forward of the model in training mode was seen" in monitor.silence()


def test_fine_tuning_in_eval_mode():
    assert "fine-tuning in eval mode: train_only=False" in silence_after(Concat().eval())


def test_a_head_replaced_after_the_monitor_was_built():
    model = Concat()
    with watch(model) as monitor:
        model.head = nn.Linear(8, 5)
        assert step(monitor, model, *batch()) is None
        assert "the head's hook did not fire: the head was replaced" in monitor.silence()


def test_a_head_used_functionally():
    class Functional(Concat):
        def fuse(self, features):
            return F.linear(torch.cat(features, 1), self.head.weight, self.head.bias)

    assert "or only its weights are used" in silence_after(Functional())


def test_a_head_replaced_amid_training():
    """Scores came until then: the message must still tell."""
    model = Concat()
    with watch(model) as monitor:
        assert step(monitor, model, *batch()) is not None
        model.head = nn.Linear(8, 5)
        for _ in range(2):
            assert step(monitor, model, *batch()) is None
        assert "the head's hook did not fire: the head was replaced" in monitor.silence()


def test_everything_frozen():
    model = Concat().requires_grad_(False)

    def run(model, inputs, labels):
        F.cross_entropy(model(*inputs), labels)

    assert "no backward reached the head's output (frozen model" in silence_after(model, run)


def test_a_loss_on_something_else():
    def run(model, inputs, labels):
        torch.cat(model.encode(*inputs), 1).square().mean().backward()
        model(*inputs)

    assert "no backward reached the head's output" in silence_after(Concat(), run)


def test_no_labels():
    assert "call monitor.observe(labels)" in silence_after(Concat(), labels="observe")


def test_a_loss_that_tells_no_labels():
    model = Concat()
    with watch(model) as monitor:
        scores = monitor.scores()
        model(*batch()[0]).sum().backward()
        with pytest.warns(UserWarning, match=r"only 0 of 8 rows at the logits tell a label.*monitor.observe"):
            sums = scores.take()
        assert sums is not None
        assert not sums.present.any()
    with watch(model, strict=True) as monitor:
        scores = monitor.scores()
        model(*batch()[0]).sum().backward()
        with pytest.raises(RuntimeError, match="tell a label: the loss is not cross-entropy"):
            scores.take()


def test_removed():
    monitor = watch(Concat())
    monitor.remove()
    assert monitor.silence() == "the monitor's hooks were removed"


def test_every_message_ends_with_the_known_causes():
    message = silence_after(Concat(), labels="observe")
    for cause in ("compiled before the monitor", "replaced head", "used functionally", "frozen model"):
        assert cause in message


def test_the_optimizer_says_it_and_raises_after_ten_steps():
    model = Concat()
    optimizer = bo.ModulatedOptimizer(
        torch.optim.SGD(model.parameters(), 0.1), watch(model), bo.OGM(noise=False)
    )
    model.head = nn.Linear(8, 5)

    def run():
        optimizer.zero_grad()
        train_step(model, *batch())
        optimizer.step()

    with pytest.warns(UserWarning, match=r"no scores since the last step.*the head was replaced"):
        run()
    for _ in range(8):
        run()
    with pytest.raises(RuntimeError, match=r"no scores in 10 steps in a row.*the head was replaced"):
        run()


def test_an_encoder_that_is_never_called_is_named():
    class Idle(Concat):
        def encode(self, *inputs):
            return [self.encoders["audio"](inputs[0]), torch.zeros(len(inputs[1]), 4)]

    model = Idle()
    inputs, labels = batch(8)
    with watch(model) as monitor:
        scores = monitor.scores()
        for _ in range(9):
            F.cross_entropy(model(*inputs), labels).backward()
        with pytest.warns(UserWarning, match="encoder of 'visual' was not called in 10 training forwards"):
            model(*inputs)
        scores.remove()
        model(*inputs)
        assert "the encoder of 'visual' was never called" in monitor.silence()
