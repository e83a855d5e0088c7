"""Which tensor of an encoder's output is the modality's features, and which of its rows are a sample's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import balanceopt as bo
from balanceopt.functional import feature_entropy
from tests.unit.monitor.helpers import Spy

B, C = 8, 3


class Two(nn.Module):
    """Two encoders, something on their outputs, and a linear head on the concatenation, unless it is another one."""

    def __init__(self, first, second, between, width=8, head=None):
        super().__init__()
        self.first, self.second = first, second
        self.between = between
        self.head = nn.Linear(width, C) if head is None else head

    def forward(self, a, b):
        return self.head(self.fuse(a, b))

    def fuse(self, a, b):
        return torch.cat(self.between(self.first(a), self.second(b)), 1)


class Tokens(nn.Module):
    """Token states and a pooler, as BERT returns them."""

    def __init__(self):
        super().__init__()
        self.states, self.pooler = nn.Linear(5, 4), nn.Linear(4, 4)

    def forward(self, x):
        states = self.states(x)
        return {"last_hidden_state": states, "pooler_output": self.pooler(states[:, 0]).tanh()}


def text(**options: Any) -> tuple[Two, tuple[Tensor, Tensor]]:
    model = Two(Tokens(), nn.Linear(6, 4), lambda a, b: [a["last_hidden_state"][:, 0], b], **options)
    return model, (torch.randn(B, 7, 5), torch.randn(B, 6))


def recurrent(kind, read, width=8, **options: Any) -> tuple[Two, tuple[Tensor, Tensor]]:
    model = Two(
        kind(5, 4, batch_first=True, **options), nn.Linear(6, 4), lambda a, b: [read(a), b], width=width
    )
    return model, (torch.randn(B, 7, 5), torch.randn(B, 6))


def watched(model, **options):
    options.setdefault("head", model.head)
    return bo.ModalityMonitor(model, {"a": model.first, "b": model.second}, **options)


def train(model, inputs, labels=None, objective=None):
    labels = torch.randint(C, (B,)) if labels is None else labels
    loss = F.cross_entropy(model(*inputs), labels)
    if objective is not None:
        loss = loss + objective(labels)
    loss.backward()
    return labels


ENCODERS = {
    "cls token": (text, lambda out: out["last_hidden_state"][:, 0]),
    "lstm state": (lambda: recurrent(nn.LSTM, lambda out: out[1][0][-1]), lambda out: out[1][0][-1]),
    "gru state": (lambda: recurrent(nn.GRU, lambda out: out[1][-1]), lambda out: out[1][-1]),
    "lstm output": (lambda: recurrent(nn.LSTM, lambda out: out[0][:, -1]), lambda out: out[0][:, -1]),
    "both directions": (
        lambda: recurrent(
            nn.LSTM,
            lambda out: torch.cat([out[1][0][-2], out[1][0][-1]], 1),
            width=12,
            bidirectional=True,
            num_layers=2,
        ),
        lambda out: torch.cat([out[1][0][-2], out[1][0][-1]], 1),
    ),
}


@pytest.fixture(params=ENCODERS)
def case(request):
    make, read = ENCODERS[request.param]
    model, inputs = make()
    return model, inputs, read


def test_the_tensor_that_reaches_the_head_is_matched_without_select(case):
    model, inputs, read = case
    with watched(model) as monitor:
        spy = Spy(monitor)
        train(model, inputs)
        assert monitor.stats()["scores"] == "split"
        z = read(model.first(inputs[0]))
        expected = F.linear(z, model.head.weight[:, : z.shape[1]], model.head.bias / 2)
        torch.testing.assert_close(spy.unimodal[0]["a"], expected)


@pytest.mark.parametrize("inject", [False, True])
@pytest.mark.parametrize("heads", ["own", "shared"])
def test_uni_modal_losses_train_the_tensor_that_reaches_the_head(case, inject, heads):
    model, inputs, read = case
    monitor = watched(model)
    objective = bo.UnimodalObjective(monitor, C, heads=heads, inject=inject, seed=0)
    labels = train(model, inputs, objective=None if inject else objective)
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    monitor.remove()
    objective.remove()

    model.zero_grad()
    z = {"a": read(model.first(inputs[0])), "b": model.second(inputs[1])}
    loss = F.cross_entropy(model(*inputs), labels)
    start = 0
    for name, features in z.items():
        stop = start + features.shape[1]
        if heads == "own":
            logits = objective.head_of(name)(features)
        else:
            logits = F.linear(features, model.head.weight[:, start:stop], model.head.bias / 2)
        loss, start = loss + F.cross_entropy(logits, labels), stop
    loss.backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(got[name], p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_entropy_is_of_the_features_that_enter_the_fusion(case, head):
    model, inputs, read = case
    if head == "mlp":
        model.head = nn.Sequential(nn.Linear(model.head.in_features, 5), nn.ReLU(), nn.Linear(5, C))
    with watched(model) as monitor:
        scores = monitor.scores(needs_entropy=True)
        train(model, inputs)
        expected = feature_entropy(read(model.first(inputs[0]))).sum()
        torch.testing.assert_close(scores.take().feature_entropy[0], expected, rtol=1e-4, atol=1e-5)


def test_a_diagnosis_takes_the_tensor_that_reaches_the_head(case):
    model, inputs, read = case
    monitor = watched(model)
    train(model, inputs)
    seen = {}

    def pool(z):
        seen[z.shape] = z
        return z.flatten(1) if len(z) == B else z

    loader = [(*inputs, torch.arange(B) % 2)]
    found = bo.diagnose(loader, loader, monitor=monitor, seed=0)
    assert not found.skipped
    collected = monitor.features.of("a", model.first(inputs[0]))
    project = monitor.features.projections.get("a")
    assert project is not None
    torch.testing.assert_close(project(collected, B), read(model.first(inputs[0])))


@pytest.mark.parametrize("head", ["head", None])
def test_a_diagnosis_before_any_training_pass_follows_the_graph_once(case, head):
    model, inputs, _ = case
    monitor = watched(model, head=head)
    passes = monitor.stats()["passes"], monitor.hooks.latest
    loader = [(*inputs, torch.arange(B) % 2)]
    assert not bo.diagnose(loader, loader, monitor=monitor).skipped
    assert (monitor.stats()["passes"], monitor.hooks.latest) == passes
    assert monitor.features.of("a", model.first(inputs[0])) is not None
    assert all(p.grad is None for p in model.parameters())


def test_several_tensors_and_nothing_that_tells_is_an_error_that_names_select():
    model, inputs = text()
    model.requires_grad_(False)
    loader = [(*inputs, torch.arange(B) % 2)]
    with pytest.raises(
        RuntimeError, match=r"encoder of 'a' returns several tensors \(last_hidden_state.*`select="
    ):
        bo.diagnose(loader, loader, monitor=watched(model, head=None))


def test_frozen_encoders_are_matched_by_their_numbers():
    model, inputs = text()
    model.first.requires_grad_(False)
    with watched(model) as monitor:
        scores = monitor.scores()
        train(model, inputs)
        assert scores.take() is not None
        assert monitor.stats()["scores"] == "split"


def test_features_that_reach_no_logits_are_an_error():
    model = Two(nn.Linear(5, 4), nn.Linear(6, 4), lambda a, b: [a.detach(), b])
    inputs = torch.randn(B, 5), torch.randn(B, 6)
    with watched(model), pytest.raises(ValueError, match=r"features of 'a' reach no logits.*`select="):
        model(*inputs)


def test_a_view_that_is_changed_in_place_reaches_the_logits():
    model = Two(
        nn.Sequential(nn.Linear(5, 4), nn.Flatten()), nn.Linear(6, 4), lambda a, b: [F.relu_(a.flatten(1)), b]
    )
    with watched(model) as monitor:
        scores = monitor.scores()
        train(model, (torch.randn(B, 5), torch.randn(B, 6)))
        assert scores.take() is not None


def test_both_tensors_in_the_fusion_are_scored_by_zero_out_and_ask_for_select_where_features_are_needed():
    model = Two(
        Tokens(),
        nn.Linear(6, 4),
        lambda a, b: [a["last_hidden_state"][:, 0], a["pooler_output"], b],
        width=12,
    )
    inputs = torch.randn(B, 7, 5), torch.randn(B, 6)
    with watched(model) as monitor:
        scores = monitor.scores()
        train(model, inputs)
        assert scores.take() is not None
        assert monitor.stats()["scores"] == "zero-out"
        monitor.scores(needs_entropy=True).remove()
        entropies = monitor.scores(needs_entropy=True)
        with pytest.raises(RuntimeError, match=r"'pooler_output'\] all reach the logits.*select="):
            model(*inputs)
        entropies.remove()


def test_an_encoder_that_works_on_another_one_is_refused():
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Linear(5, 4), nn.Linear(10, 4), nn.Linear(4, C)

        def forward(self, a, b):
            return self.head(self.second(torch.cat([self.first(a), b], 1)))

    model = Chain()
    with (
        watched(model),
        pytest.raises(ValueError, match=r"encoder of 'b' works on what the encoder of 'a' returns"),
    ):
        model(torch.randn(B, 5), torch.randn(B, 6))


# Frames of a clip as rows, and samples that lack a modality.


class Frames(nn.Module):
    """Frames go through a convolution as rows, and are pooled over time and space."""

    def __init__(self, fusion="concat", pool="mean"):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3), nn.Conv2d(1, 4, 3)
        self.fusion, self.pool = fusion, pool
        self.head = nn.Linear(8 if fusion == "concat" else 4, C)
        self.other = nn.Linear(4, C)
        self.gate = nn.Linear(4, 4)

    def vectors(self, v, a):
        z = self.first(v.flatten(0, 1)).unflatten(0, v.shape[:2]).transpose(1, 2).flatten(2)
        s = self.second(a).flatten(2)
        return (z.mean(2), s.mean(2)) if self.pool == "mean" else (z.amax(2), s.amax(2))

    def forward(self, v, a):
        v, a = self.vectors(v, a)
        if self.fusion == "concat":
            return self.head(torch.cat([v, a], 1))
        if self.fusion == "sum":
            return self.head(v) + self.other(a)
        return self.head(self.gate(v).sigmoid() * self.gate(a))


def clips(frames=3):
    return torch.randn(B, frames, 2, 6, 6), torch.randn(B, 1, 6, 6)


def watch_frames(model):
    head = {"a": model.head, "b": model.other} if model.fusion == "sum" else model.head
    return watched(model, head=head)


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_frames_are_split_exactly(pool):
    model, inputs = Frames(pool=pool), clips()
    with watch_frames(model) as monitor:
        spy = Spy(monitor)
        train(model, inputs)
        assert monitor.stats()["scores"] == "split"
        for name, z, columns in zip("ab", model.vectors(*inputs), (slice(0, 4), slice(4, 8)), strict=True):
            expected = F.linear(z, model.head.weight[:, columns], model.head.bias / 2)
            torch.testing.assert_close(spy.unimodal[0][name], expected)


@pytest.mark.parametrize("pool", ["mean", "max"])
@pytest.mark.parametrize("fusion", ["concat", "sum", "gated"])
def test_entropy_of_frames_is_that_of_the_pooled_features_in_every_mode(fusion, pool):
    model, inputs = Frames(fusion, pool), clips()
    with watch_frames(model) as monitor:
        scores = monitor.scores(needs_entropy=True)
        for frames in (3, 2):
            inputs = clips(frames)
            train(model, inputs)
            expected = torch.stack([feature_entropy(z).sum() for z in model.vectors(*inputs)])
            torch.testing.assert_close(scores.take().feature_entropy, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inject", [False, True])
@pytest.mark.parametrize("fusion", ["concat", "sum", "gated"])
def test_uni_modal_losses_pool_the_frames_of_a_sample(fusion, inject):
    model, inputs = Frames(fusion), clips()
    monitor = watch_frames(model)
    objective = bo.UnimodalObjective(monitor, C, inject=inject, seed=0)
    labels = train(model, inputs, objective=None if inject else objective)
    grad = model.first.weight.grad
    assert grad is not None
    got = grad.clone()
    monitor.remove()
    model.zero_grad()
    loss = F.cross_entropy(model(*inputs), labels)
    for name, z in zip("ab", model.vectors(*inputs), strict=True):
        loss = loss + F.cross_entropy(objective.head_of(name)(z), labels)
    loss.backward()
    torch.testing.assert_close(got, model.first.weight.grad, rtol=1e-4, atol=1e-6)


def test_frames_are_diagnosed_before_any_training_pass():
    model, inputs = Frames(), clips()
    loader = [(*inputs, torch.arange(B) % 2)]
    found = bo.diagnose(loader, loader, monitor=watch_frames(model), seed=0)
    assert found.train_count == {"a": B, "b": B}


def test_frames_that_are_no_whole_number_for_each_sample_are_an_error_that_names_select():
    class Odd(Frames):
        def vectors(self, v, a):
            z = self.first(v.flatten(0, 1)[:-1]).mean((2, 3))
            return z[: len(a)], self.second(a).mean((2, 3))

    model, inputs = Odd(), clips()
    with watch_frames(model) as monitor:
        scores = monitor.scores()
        train(model, inputs)
        with pytest.raises(ValueError, match=r"encoder of 'a' returned 23 rows for 8 samples.*`select="):
            scores.take()


class Lacking(nn.Module):
    """The first encoder runs on the samples alone that have its modality."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 4), nn.Linear(6, 4), nn.Linear(8, C)

    def forward(self, a, b, has):
        z = torch.zeros(len(b), 4)
        z[has] = self.first(a[has])
        return self.head(torch.cat([z, self.second(b)], 1))


HAS = torch.arange(B) % 2 == 0


def test_an_encoder_on_some_samples_is_an_error_without_present():
    model = Lacking()
    with watched(model) as monitor:
        scores = monitor.scores()
        train(model, (torch.randn(B, 5), torch.randn(B, 6), HAS))
        with pytest.raises(ValueError, match=r"encoder of 'a' returned 4 rows for 8 samples.*present="):
            scores.take()


@pytest.mark.parametrize("inject", [False, True])
def test_an_encoder_on_some_samples_is_right_with_present(inject):
    model = Lacking()
    a, b, labels = torch.randn(B, 5), torch.randn(B, 6), torch.randint(C, (B,))
    monitor = watched(model)
    objective = bo.UnimodalObjective(monitor, C, inject=inject, seed=0)
    scores = monitor.scores(needs_entropy=True)
    monitor.observe(labels, present={"a": HAS})
    loss = F.cross_entropy(model(a, b, HAS), labels)
    (loss if inject else loss + objective(labels)).backward()
    grad, sums = model.first.weight.grad, scores.take()
    assert grad is not None
    assert sums is not None
    got = grad.clone()
    assert sums.count.tolist() == [4, 8]
    torch.testing.assert_close(sums.feature_entropy[0], feature_entropy(model.first(a[HAS])).sum())
    monitor.remove()
    model.zero_grad()
    loss = F.cross_entropy(model(a, b, HAS), labels)
    loss = loss + F.cross_entropy(objective.head_of("a")(model.first(a[HAS])), labels[HAS])
    loss.backward()
    torch.testing.assert_close(got, model.first.weight.grad, rtol=1e-4, atol=1e-6)
