"""The published code's order: q from the clean features of the very batch that is dropped from."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import balanceopt as bo
from balanceopt.functional import discrepancy_ratio, drop_probability
from tests.dropping import kept
from tests.models import FUSIONS, Concat, HuggingFaceStyle, SumHeads, batch, watch
from tests.training import backward, class_zero, small_model


def modulator_on(model, **options):
    monitor = watch(model, **options.pop("monitor", {}))
    return bo.OPM(monitor, **{"same_batch": True, "seed": 1, **options})


def still(model):
    for part in model.modules():
        if isinstance(part, nn.BatchNorm1d):
            part.momentum = 0.0


@pytest.mark.parametrize("name", FUSIONS)
def test_q_is_that_of_the_batch_itself(name):
    model = FUSIONS[name]()
    still(model)
    inputs, labels = batch(16)
    watched = watch(model, labels="observe")
    sums = watched.accumulator()
    watched.observe(labels)
    backward(model, (inputs, labels))
    clean = sums.take()
    assert clean is not None
    watched.remove()

    modulator = modulator_on(model)
    for _ in range(2):  # the first pass shows where features go
        modulator.monitor.observe(labels)
        backward(model, (inputs, labels))
    torch.testing.assert_close(modulator.q, drop_probability(discrepancy_ratio(clean.mean_score)))
    assert modulator.q.any()


@pytest.mark.parametrize("dominant", [0, 1])
def test_the_first_encoder_is_dropped_as_well_as_the_last(dominant):
    certainty = [0.2, 0.2]
    certainty[dominant] = 0.8
    model = small_model()

    def scores(features):
        rows = [torch.tensor([p, 1 - p, 0.0, 0.0, 0.0]).log() for p in certainty]
        return [row.expand(8, -1) for row in rows]

    modulator = modulator_on(model, monitor={"scores": scores}, rescale="official", seed=2)
    inputs, labels = class_zero(model)
    with torch.no_grad():
        z = model.encode(*inputs)
    seen = []
    model.head.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    modulator.monitor.observe(labels)
    backward(model, (inputs, labels))
    mask = kept(seen[0])
    assert 0 < mask[dominant].sum() < 8
    assert mask[1 - dominant].all()
    expected = torch.cat(z, 1) / (1 - modulator.q.mean()) * mask.T.repeat_interleave(4, 1)
    torch.testing.assert_close(seen[0], expected)


def test_gradients_are_those_of_features_dropped_at_once():
    """Against the other order, with the same q and mask."""
    grads = []
    for same_batch in (False, True):
        model = small_model()
        monitor = watch(
            model, scores=lambda f: [torch.tensor([4.0 - 3 * i, 0, 0, 0, 0]).expand(8, -1) for i in (0, 1)]
        )
        modulator = bo.OPM(monitor, same_batch=same_batch, seed=1)
        for number in range(2):
            model.zero_grad()
            inputs, labels = class_zero(model, number)
            monitor.observe(labels)
            backward(model, (inputs, labels))
        grads.append([p.grad for p in model.parameters()])
        assert modulator.q[0] > 0.5
    torch.testing.assert_close(grads[0], grads[1])


def test_labels_may_come_as_a_keyword_of_the_model():
    model = HuggingFaceStyle()
    modulator = modulator_on(model)
    inputs, labels = batch()
    for _ in range(3):
        model(labels=labels, **dict(zip(model.names, inputs, strict=True))).loss.backward()
    assert modulator.stats() == {"forwards": 3, "dropping": 2, "updates": 2, "unusable_scores": 0}


def test_labels_that_come_later_are_refused():
    model = small_model()
    modulator = modulator_on(model)
    backward(model, class_zero(model))
    inputs, labels = class_zero(model)
    with pytest.raises(RuntimeError, match="needs the labels before the forward"):
        model(*inputs)
    modulator.monitor.observe(labels)
    backward(model, (inputs, labels))
    assert modulator.stats()["updates"] == 1


def test_each_zero_out_score_is_made_once(monkeypatch):
    from balanceopt.monitor._zero_out import ZeroOut

    calls, made = [], ZeroOut.__call__

    def counted(self, current):
        calls.append(current)
        return made(self, current)

    monkeypatch.setattr(ZeroOut, "__call__", counted)
    model = FUSIONS["gated"]()
    modulator = modulator_on(model)
    for _ in range(3):
        inputs, labels = batch()
        modulator.monitor.observe(labels)
        backward(model, (inputs, labels))
    # The first pass shows that nothing else is exact; after that once a pass.
    assert len(calls) == 3


def test_features_used_before_the_last_encoder_are_refused():
    class Early(Concat):
        def encode(self, *inputs):
            first = 2 * self.encoders["audio"](inputs[0])  # a copy of what was not dropped yet
            return [first, self.encoders["visual"](inputs[1])]

    model = Early()
    scores = [torch.tensor([4.0, 0, 0, 0, 0]), torch.zeros(5)]
    modulator = modulator_on(model, monitor={"scores": lambda f: [s.expand(8, -1) for s in scores]})
    inputs, labels = class_zero(model)
    modulator.monitor.observe(labels)
    loss = F.cross_entropy(model(*inputs), labels)
    with pytest.raises(RuntimeError, match="every encoder to run before the features of any is used"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_a_whole_encoder_is_refused(reentrant):
    class Again(Concat):
        def encode(self, *inputs):
            return [
                checkpoint(encoder, x, use_reentrant=reentrant)
                for encoder, x in zip(self.encoders.values(), inputs, strict=True)
            ]

    model = Again()
    modulator = modulator_on(model)

    def train():
        for number in range(2):
            inputs, labels = class_zero(model, number)
            modulator.monitor.observe(labels)
            backward(model, ([x.requires_grad_() for x in inputs], labels))

    with pytest.raises(NotImplementedError, match="activation checkpointing around a whole encoder"):
        train()


def test_a_pass_without_one_of_the_modalities_is_left_alone():
    model = small_model()
    modulator = modulator_on(model, monitor={"scores": lambda f: {m: torch.zeros(8, 5) for m in f}})
    inputs, labels = class_zero(model)
    modulator.monitor.observe(labels)
    assert torch.equal(model.encoders["audio"](inputs[0]), model.encoders["audio"](inputs[0]))
    assert modulator.stats()["dropping"] == 0


def test_outside_the_window_nothing_is_held():
    model = SumHeads()
    modulator = modulator_on(model, warmup=9)
    inputs, labels = batch()
    for _ in range(3):
        backward(model, (inputs, labels))  # no labels are asked for either
    assert modulator.stats() == {"forwards": 3, "dropping": 0, "updates": 0, "unusable_scores": 0}


def test_backward_hooks_of_the_user_see_the_same_features():
    model = small_model()
    for encoder in model.encoders.values():
        encoder.register_full_backward_hook(lambda module, grad_input, grad_output: None)
    modulator = modulator_on(model)
    inputs, labels = class_zero(model)
    seen = []
    model.head.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    for _ in range(2):
        modulator.monitor.observe(labels)
        fresh = [x.clone().requires_grad_() for x in inputs]
        backward(model, (fresh, labels))
    dominant = int(modulator.q.argmax())
    gradient = fresh[dominant].grad
    assert gradient is not None
    assert torch.equal(gradient.any(1), kept(seen[1])[dominant])
    assert not kept(seen[1])[dominant].all()
