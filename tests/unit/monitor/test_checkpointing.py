"""Activation checkpointing of encoders in both modes, of the head and the whole model without reentry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tests.models import Concat, Gated, SumHeads, batch, mlp, train_step, watch, with_dropout
from tests.unit.monitor.helpers import Spy, added, flat, sums_of

BOTH = pytest.mark.parametrize("reentrant", [False, True])
MODELS = pytest.mark.parametrize("make", [Concat, SumHeads, Gated])


def checkpointed(make: Any, *, reentrant, encoders=False, heads=False, encoder=mlp):
    """A model whose encoders' or heads' calls are checkpointed."""

    class Checkpointed(make):
        def encode(self, *inputs):
            if not encoders:
                return super().encode(*inputs)
            return [
                checkpoint(e, x, use_reentrant=reentrant)
                for e, x in zip(self.encoders.values(), inputs, strict=True)
            ]

        def fuse(self, features):
            if not heads:
                return super().fuse(features)
            return checkpoint(
                lambda *z: super(Checkpointed, self).fuse(list(z)), *features, use_reentrant=reentrant
            )

    return Checkpointed(encoder=encoder)


def leaves(inputs):
    """Reentrant checkpoints need inputs with gradients."""
    return [x.clone().requires_grad_() for x in inputs]


def assert_same(found, expected):
    assert found is not None
    assert expected is not None
    torch.testing.assert_close(flat(found), flat(expected))


@MODELS
@pytest.mark.parametrize(
    "parts",
    [
        {"encoders": True, "reentrant": True},
        {"encoders": True, "reentrant": False},
        {"heads": True, "reentrant": False},
        {"encoders": True, "heads": True, "reentrant": False},
    ],
    ids=str,
)
def test_one_record_with_the_right_labels(make, parts):
    model = checkpointed(make, **parts)
    plain = make()
    plain.load_state_dict(model.state_dict())
    inputs, labels = batch()
    expected = sums_of(plain, inputs, labels)
    with watch(model) as monitor:
        scores, spy = monitor.scores(), Spy(monitor)
        for _ in range(2):
            train_step(model, leaves(inputs), labels)
            assert_same(scores.take(), expected)
    assert len(spy.passes) == 2
    assert monitor.stats()["passes"] == 2


@BOTH
@MODELS
def test_two_forwards_before_the_backwards(make, reentrant):
    model = checkpointed(make, reentrant=reentrant, encoders=True, heads=not reentrant)
    plain = make()
    plain.load_state_dict(model.state_dict())
    batches = [batch(4), batch(6)]
    a, b = (sums_of(plain, *one) for one in batches)
    assert a is not None
    assert b is not None
    with watch(model) as monitor:
        scores = monitor.scores()
        losses = [F.cross_entropy(model(*leaves(inputs)), labels) for inputs, labels in batches]
        torch.stack(losses).sum().backward()
        assert_same(scores.take(), added(a, b))
        losses = [F.cross_entropy(model(*leaves(inputs)), labels) for inputs, labels in batches]
        losses[1].backward()
        assert_same(scores.take(), b)
        losses[0].backward()
        assert_same(scores.take(), a)


@BOTH
def test_gradients_and_the_random_stream_are_as_without_a_monitor(reentrant):
    def gradients(*, watched):
        torch.manual_seed(2)
        model = checkpointed(
            Gated, reentrant=reentrant, encoders=True, heads=not reentrant, encoder=with_dropout
        )
        monitor = watch(model) if watched else None
        scores = monitor.scores() if monitor else None
        inputs, labels = batch()
        train_step(model, leaves(inputs), labels)
        assert scores is None or scores.take() is not None
        return [p.grad for p in model.parameters()], torch.get_rng_state()

    (plain, stream), (watched, watched_stream) = gradients(watched=False), gradients(watched=True)
    assert all(map(torch.equal, plain, watched))
    assert torch.equal(stream, watched_stream)


@BOTH
def test_transforms_are_called_again_with_the_same_pass(reentrant):
    """As a drop mask must be: the second run of an encoder is given what the first one was."""
    model = checkpointed(Concat, reentrant=reentrant, encoders=True)
    inputs, labels = batch()
    calls = []

    def transform(name, current, z):
        calls.append((name, id(current)))
        mask = current.notes.setdefault(name, torch.rand(8, 1) > 0.5)
        return z * mask

    with watch(model) as monitor:
        monitor.hooks.transforms.add(transform)
        losses = [F.cross_entropy(model(*leaves(inputs)), labels) for _ in range(2)]
        first = list(calls)
        torch.stack(losses).sum().backward()
    assert len(set(first)) == 4
    assert sorted(calls[4:]) == sorted(first if not reentrant else calls[4:])
    assert set(calls) == set(first)


@MODELS
def test_a_head_checkpointed_with_reentry_is_refused(make):
    model = checkpointed(make, reentrant=True, encoders=True, heads=True)
    inputs, labels = batch()
    with watch(model), pytest.raises(NotImplementedError, match="Pass use_reentrant=False"):
        train_step(model, leaves(inputs), labels)


def test_the_whole_model_checkpointed_without_reentry():
    model = Concat()
    inputs, labels = batch()
    expected = sums_of(model, inputs, labels)
    with watch(model) as monitor:
        scores = monitor.scores()
        logits = checkpoint(model, *inputs, use_reentrant=False)
        assert logits is not None
        F.cross_entropy(logits, labels).backward()
        assert_same(scores.take(), expected)


def test_the_whole_model_checkpointed_with_reentry_is_not_silent():
    """Its only forward with gradients is within backward; the step without scores says so."""
    model = Concat()
    inputs, labels = batch()
    with watch(model) as monitor:
        scores = monitor.scores()
        F.cross_entropy(checkpoint(model, *leaves(inputs), use_reentrant=True), labels).backward()
        assert scores.take() is None
        assert "the whole model is inside reentrant activation checkpointing" in monitor.silence()
        assert "use_reentrant=False" in monitor.silence()
