"""Unusual ways through autograd: autograd.grad, penalties, two backwards, in-place changes, functional calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from tests.models import Concat, Gated, SumHeads, batch, train_step, watch
from tests.unit.monitor.helpers import Spy, flat, sums_of, unimodal_of


@pytest.fixture(params=[Concat, SumHeads, Gated])
def model(request):
    return request.param()


def assert_same(found, expected):
    assert found is not None
    assert expected is not None
    torch.testing.assert_close(flat(found), flat(expected))


def test_autograd_grad(model):
    inputs, labels = batch()
    expected = sums_of(model, inputs, labels)
    with watch(model) as monitor:
        scores = monitor.scores()
        torch.autograd.grad(F.cross_entropy(model(*inputs), labels), list(model.parameters()))
        assert_same(scores.take(), expected)


def test_autograd_grad_of_some_parameters_only(model):
    inputs, labels = batch()
    expected = sums_of(model, inputs, labels)
    with watch(model) as monitor:
        scores = monitor.scores()
        loss = F.cross_entropy(model(*inputs), labels)
        torch.autograd.grad(loss, list(model.encoders["audio"].parameters()))
        assert_same(scores.take(), expected)


@pytest.mark.parametrize("penalty_first", [False, True])
def test_a_penalty_on_the_inputs_gradient(model, penalty_first):
    inputs, labels = batch()
    expected = sums_of(model, inputs, labels)
    x = inputs[0].clone().requires_grad_()
    with watch(model) as monitor:
        scores = monitor.scores()
        logits = model(x, inputs[1])
        loss = F.cross_entropy(logits, labels)
        if penalty_first:
            (slope,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        else:
            (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + slope.square().sum()).backward()
        assert_same(scores.take(), expected)


def test_a_penalty_on_the_parameters_gradient(model):
    inputs, labels = batch()
    expected = sums_of(model, inputs, labels)
    with watch(model) as monitor:
        scores = monitor.scores()
        loss = F.cross_entropy(model(*inputs), labels)
        grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        (loss + sum(g.square().sum() for g in grads)).backward()
        assert_same(scores.take(), expected)


def test_backward_with_create_graph(model):
    inputs, labels = batch()
    expected = sums_of(model, inputs, labels)
    with watch(model) as monitor:
        scores = monitor.scores()
        loss = F.cross_entropy(model(*inputs), labels)
        gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        assert all(g.requires_grad or g.abs().sum() == 0 for g in gradients[:1])
        assert_same(scores.take(), expected)


@pytest.mark.parametrize(
    "change", [lambda z: z.mul_(0.5), lambda z: z.add_(1.0), lambda z: z.clamp_(-50, 50)]
)
def test_logits_changed_in_place(change):
    model = Concat()
    inputs, labels = batch()
    clean = unimodal_of(model, inputs, labels)
    with watch(model) as monitor:
        scores, spy = monitor.scores(), Spy(monitor)
        F.cross_entropy(change(model(*inputs)), labels).backward()
        sums = scores.take()
    assert sums is not None
    assert sums.label_counts.tolist() == torch.bincount(labels, minlength=5).tolist()
    torch.testing.assert_close(spy.unimodal, [clean])


def test_logits_changed_in_place_within_forward():
    class Scaled(Concat):
        def fuse(self, features):
            logits = super().fuse(features)
            logits /= 2
            return logits

    model = Scaled()
    inputs, labels = batch()
    with watch(model) as monitor:
        scores, spy = monitor.scores(), Spy(monitor)
        logits = model(*inputs)
        F.cross_entropy(logits, labels).backward()
        assert scores.take() is not None
        assert monitor.stats()["scores"] == "split"
    torch.testing.assert_close(torch.stack(list(spy.unimodal[0].values())).sum(0), 2 * logits.detach())


def test_functional_call(model):
    inputs, labels = batch()
    expected = sums_of(model, inputs, labels)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    with watch(model) as monitor:
        scores = monitor.scores()
        logits = torch.func.functional_call(model, parameters, tuple(inputs))
        F.cross_entropy(logits, labels).backward()
        assert_same(scores.take(), expected)


def by_transform(model, inputs, labels):
    """torch.func.grad of the loss in the parameters."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, x, y, label):
        return F.cross_entropy(torch.func.functional_call(model, parameters, (x, y)), label)

    gradient: Any = torch.func.grad(loss)
    return gradient(parameters, *inputs, labels)


def by_sample(model, inputs, labels):
    """vmap over torch.func.grad."""
    parts = [x.unsqueeze(1) for x in (*inputs, labels)]
    return torch.func.vmap(lambda x, y, label: by_transform(model, (x, y), label))(*parts)


def in_batches(model, inputs, labels):
    """Many backwards at once."""
    logits = model(*inputs)
    many = torch.eye(logits.numel()).view(-1, *logits.shape)
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(logits, parameters, many, is_grads_batched=True)
    return dict(zip(names, found, strict=True))


def exported(model, inputs, labels):
    """torch.export in training mode."""
    program = torch.export.export(model, tuple(inputs), strict=False)
    return {"logits": program.module()(*inputs)}


def traced(model, inputs, labels):
    """TorchScript's tracing in training mode."""
    return {"logits": torch.jit.trace(model, tuple(inputs))(*inputs)}


def as_graph(model, inputs, labels):
    """make_fx in training mode: hooks leave nothing in the graph."""
    program = make_fx(model)(*inputs)
    return {"logits": program(*inputs), "nodes": torch.tensor(len(program.graph.nodes))}


def without_numbers(model, inputs, labels):
    """Shapes alone, as for an estimate of memory."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        logits = model(*(mode.from_tensor(x) for x in inputs))
    return {"shape": torch.tensor(logits.shape)}


@pytest.mark.parametrize(
    "way", [by_transform, by_sample, in_batches, exported, traced, as_graph, without_numbers]
)
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # of vmap itself
def test_ways_that_show_no_numbers_are_no_training_pass(model, way):
    inputs, labels = batch()
    plain = way(model, inputs, labels)
    with watch(model) as monitor:
        scores = monitor.scores()
        found = way(model, inputs, labels)
        assert scores.take() is None
        assert monitor.stats()["passes"] == 0
        train_step(model, inputs, labels)
        assert scores.take() is not None
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_saved_tensors_on_cpu(model):
    inputs, labels = batch()
    expected = sums_of(model, inputs, labels)
    with watch(model) as monitor:
        scores = monitor.scores()
        with torch.autograd.graph.save_on_cpu():
            loss = F.cross_entropy(model(*inputs), labels)
        loss.backward()
        assert_same(scores.take(), expected)


def test_anomaly_detection(model):
    inputs, labels = batch()
    with watch(model) as monitor:
        scores = monitor.scores()
        with pytest.warns(UserWarning, match="Anomaly Detection"):
            mode = torch.autograd.detect_anomaly()
        with mode:
            train_step(model, inputs, labels)
        assert scores.take() is not None


def test_a_second_loss_on_the_same_logits_needs_observed_labels():
    model = Concat()
    inputs, labels = batch()
    with watch(model) as monitor:
        scores = monitor.scores()
        logits = model(*inputs)
        monitor.observe(labels)
        F.cross_entropy(logits, labels.flip(0)).backward(retain_graph=True)
        F.cross_entropy(logits, labels).backward()
        sums = scores.take()
    assert sums is not None
    assert sums.label_counts.tolist() == torch.bincount(labels, minlength=5).tolist()


def test_an_answer_on_the_side_without_gradients():
    class WithTeacher(Concat):
        def fuse(self, features):
            logits = super().fuse(features)
            with torch.no_grad():
                self.head(torch.zeros(3, 8))
            return logits

    model = WithTeacher()
    inputs, labels = batch()
    sums = sums_of(model, inputs, labels)
    assert sums is not None
    assert sums.count.tolist() == [8, 8]
    assert sums.label_counts.tolist() == torch.bincount(labels, minlength=5).tolist()


def test_double_precision_models():
    model = Concat().double()
    inputs, labels = batch()
    sums = sums_of(model, [x.double() for x in inputs], labels)
    assert sums is not None
    assert sums.score.dtype == torch.float32


def test_a_loss_by_sample_with_weights_in_the_loop():
    model = Concat()
    inputs, labels = batch()
    weights = torch.rand(8) + 0.1
    with watch(model) as monitor:
        scores = monitor.scores()
        (F.cross_entropy(model(*inputs), labels, reduction="none") * weights).mean().backward()
        sums = scores.take()
    assert sums is not None
    assert sums.label_counts.tolist() == torch.bincount(labels, minlength=5).tolist()


def test_hooks_of_the_users_on_the_logits():
    model = Concat()
    inputs, labels = batch()
    expected = sums_of(model, inputs, labels)
    with watch(model) as monitor:
        scores = monitor.scores()
        logits = model(*inputs)
        logits.register_hook(lambda gradient: gradient * 2)
        logits.retain_grad()
        F.cross_entropy(logits, labels).backward()
        assert_same(scores.take(), expected)


def test_a_loss_in_several_heads_modules():
    """Deep supervision: other heads' losses do not disturb."""
    model = Concat()
    extra = nn.Linear(4, 5)
    inputs, labels = batch()
    expected = sums_of(model, inputs, labels)
    with watch(model) as monitor:
        scores = monitor.scores()
        a, b = model.encode(*inputs)
        (F.cross_entropy(model.fuse([a, b]), labels) + F.cross_entropy(extra(a), labels.flip(0))).backward()
        assert_same(scores.take(), expected)
