"""What counts as a training pass, and what becomes of its scores."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import balanceopt as bo
from tests.models import (
    FUSIONS,
    Concat,
    Gated,
    MLPHead,
    SumHeads,
    batch,
    batch_norm,
    columns_of,
    train_step,
    watch,
)
from tests.unit.monitor.helpers import Spy, added, columns_by_hand, flat, step, sums_of


def loss_of(model, inputs, labels):
    return F.cross_entropy(model(*inputs), labels)


def assert_sums(found, expected):
    assert found is not None
    assert expected is not None
    torch.testing.assert_close(flat(found), flat(expected))


@pytest.fixture
def model():
    return Concat()


@pytest.fixture
def monitor(model):
    with watch(model) as monitor:
        yield monitor


# Passes that leave nothing


def test_forward_without_backward(model, monitor):
    scores = monitor.scores()
    model(*batch()[0])
    assert scores.take() is None
    assert monitor.stats()["passes"] == 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_grad(model, monitor, mode):
    scores = monitor.scores()
    with mode():
        model(*batch()[0])
    assert scores.take() is None
    assert monitor.hooks.latest is None


def test_eval_mode(model, monitor):
    scores = monitor.scores()
    model.eval()
    train_step(model, *batch())
    assert scores.take() is None


def test_eval_mode_counts_where_asked_for():
    model = Concat(encoder=batch_norm).eval()
    inputs, labels = batch()
    with watch(model, train_only=False) as monitor:
        spy = Spy(monitor)
        sums = step(monitor, model, inputs, labels)
        assert sums is not None
        assert sums.label_counts.tolist() == torch.bincount(labels, minlength=5).tolist()
        with torch.no_grad():
            model(*inputs)
    assert len(spy.passes) == 1


def test_the_mode_of_the_root_counts_not_that_of_an_encoder(model, monitor):
    model.encoders["audio"].eval()
    assert step(monitor, model, *batch()) is not None


def test_a_frozen_encoder_is_scored_too(model, monitor):
    model.encoders["audio"].requires_grad_(False)
    sums = step(monitor, model, *batch())
    assert sums is not None
    assert sums.count.tolist() == [8, 8]


# Several passes


def test_micro_batches_add_up(model, monitor):
    inputs, labels = batch(12)
    expected = sums_of(model, inputs, labels)
    scores = monitor.scores()
    for part in (slice(0, 5), slice(5, 6), slice(6, 12)):
        (loss_of(model, [x[part] for x in inputs], labels[part]) / 3).backward()
    assert_sums(scores.take(), expected)
    assert scores.take() is None


@pytest.mark.parametrize("fusion", FUSIONS)
def test_two_forwards_then_two_backwards(fusion):
    model = FUSIONS[fusion]().eval()
    first, second = batch(4), batch(6)
    expected = [sums_of(model, *b, train_only=False) for b in (first, second)]
    with watch(model, train_only=False) as monitor:
        scores = monitor.scores()
        losses = [loss_of(model, *b) for b in (first, second)]
        losses[0].backward()
        assert_sums(scores.take(), expected[0])
        losses[1].backward()
        assert_sums(scores.take(), expected[1])


@pytest.mark.parametrize("reverse", [False, True])
def test_two_forwards_in_one_loss(model, monitor, reverse):
    first, second = batch(4), batch(6)
    a, b = (sums_of(model, *b) for b in (first, second))
    assert a is not None
    assert b is not None
    scores = monitor.scores()
    losses = [loss_of(model, *b) for b in (first, second)]
    sum(reversed(losses) if reverse else losses).backward()
    assert_sums(scores.take(), added(a, b))


def test_one_of_two_forwards_goes_backward(model, monitor):
    first, second = batch(4), batch(6)
    expected = sums_of(model, *first)
    scores = monitor.scores()
    loss = loss_of(model, *first)
    model(*second[0])
    loss.backward()
    assert_sums(scores.take(), expected)


def test_an_eval_pass_between_forward_and_backward(model, monitor):
    inputs, labels = batch()
    expected = sums_of(model, inputs, labels)
    scores = monitor.scores()
    loss = loss_of(model, inputs, labels)
    model.eval()
    model(*batch(3)[0])
    with torch.no_grad():
        loss_of(model, *batch(2))
    model.train()
    loss.backward()
    assert_sums(scores.take(), expected)


def test_backward_twice_in_one_step_counts_once(model, monitor):
    inputs, labels = batch()
    expected = sums_of(model, inputs, labels)
    scores = monitor.scores()
    loss = loss_of(model, inputs, labels)
    loss.backward(retain_graph=True)
    loss.backward()
    assert_sums(scores.take(), expected)


def test_a_batch_of_one_and_an_empty_one(model, monitor):
    sums = step(monitor, model, *batch(1))
    assert sums is not None
    assert sums.count.tolist() == [1, 1]
    assert step(monitor, model, *batch(0)) is None


def test_an_exception_in_forward_leaves_the_next_pass_as_it_should_be():
    class Fragile(Concat):
        broken = False

        def fuse(self, features):
            if self.broken:
                raise ValueError("broken")
            return super().fuse(features)

    model = Fragile()
    inputs, labels = batch()
    with watch(model) as monitor:
        expected = step(monitor, model, inputs, labels)
        scores = monitor.scores()
        model.broken = True
        with pytest.raises(ValueError, match="broken"):
            model(*batch(3)[0])
        model.broken = False
        train_step(model, inputs, labels)
        assert_sums(scores.take(), expected)


@pytest.mark.parametrize("training", [True, False])
def test_an_exception_in_forward_and_then_a_loop_of_parts(training):
    """What broke off is not what goes on."""

    class Fragile(Concat):
        def forward(self, *inputs):
            self.encode(*inputs)
            raise ValueError("broken")

    model = Fragile()
    inputs, labels = batch()
    with watch(model) as monitor:
        scores = monitor.scores()
        model.train(training)
        with pytest.raises(ValueError, match="broken"):
            model(*batch(3)[0])
        model.train()
        for _ in range(2):
            F.cross_entropy(model.fuse(model.encode(*inputs)), labels).backward()
            sums = scores.take()
            assert sums is not None
            assert sums.count.tolist() == [8, 8]


def test_a_model_called_while_an_exception_is_handled(model, monitor):
    scores = monitor.scores()
    try:
        raise KeyError
    except KeyError:
        train_step(model, *batch())
    assert scores.take() is not None


# Loops that call the parts


def parts_loss(model, inputs, labels):
    return F.cross_entropy(model.fuse(model.encode(*inputs)), labels)


def test_a_loop_that_never_calls_the_model(model, monitor):
    inputs, labels = batch()
    expected = sums_of(model, inputs, labels)
    scores = monitor.scores()
    for _ in range(2):
        parts_loss(model, inputs, labels).backward()
        assert_sums(scores.take(), expected)


def test_parts_twice_forward_then_backward(model, monitor):
    first, second = batch(4), batch(6)
    expected = [sums_of(model, *b) for b in (first, second)]
    scores = monitor.scores()
    losses = [parts_loss(model, *b) for b in (first, second)]
    losses[0].backward()
    assert_sums(scores.take(), expected[0])
    losses[1].backward()
    assert_sums(scores.take(), expected[1])


def test_parts_with_the_head_called_for_each_modality_and_for_both(model, monitor):
    """As the papers' own scripts do."""
    inputs, labels = batch()
    expected = sums_of(model, inputs, labels)
    scores = monitor.scores()
    a, b = model.encode(*inputs)
    model.fuse([a, torch.zeros_like(b)])
    model.fuse([torch.zeros_like(a), b])
    F.cross_entropy(model.fuse([a, b]), labels).backward()
    assert_sums(scores.take(), expected)


def test_parts_in_eval_mode_or_without_gradients(model, monitor):
    scores = monitor.scores()
    with torch.no_grad():
        parts_loss(model, *batch())
    model.eval()
    parts_loss(model, *batch()).backward()
    assert scores.take() is None


def test_a_call_of_an_encoder_on_the_side(model, monitor):
    """A contrastive term, say: its labels are those of the model's own pass."""
    inputs, labels = batch()
    scores = monitor.scores()
    expected = sums_of(model, inputs, labels)
    scores.discard()

    monitor.observe(labels)
    side = model.encoders["audio"](inputs[0] + 1).square().mean()
    (loss_of(model, inputs, labels) + side).backward()
    assert_sums(scores.take(), expected)
    assert monitor.stats()["labels"] == {"observe": 1}

    loss = loss_of(model, inputs, labels)
    side = model.encoders["audio"](inputs[0] + 1).square().mean()
    monitor.observe(labels)
    (loss + side).backward()
    assert_sums(scores.take(), expected)
    assert monitor.stats()["labels"] == {"observe": 2}


# Consumers


def test_each_consumer_takes_for_itself(model, monitor):
    batches = [batch(4), batch(6)]
    a, b = (sums_of(model, *one) for one in batches)
    assert a is not None
    assert b is not None
    first, second = monitor.scores(), monitor.scores()
    train_step(model, *batches[0])
    assert_sums(first.take(), a)
    train_step(model, *batches[1])
    assert_sums(first.take(), b)
    assert_sums(second.take(), added(a, b))
    assert first.take() is second.take() is None


def test_a_pass_is_scored_once_for_all_consumers():
    calls = []

    def own(features):
        calls.append(1)
        return features

    with watch(gated := Gated(width=5), scores=own) as monitor:
        consumers = [monitor.scores() for _ in range(3)]
        train_step(gated, *batch())
        assert all(consumer.take() is not None for consumer in consumers)
    assert calls == [1]


@pytest.mark.parametrize("make", [Concat, Gated, SumHeads])
def test_scores_are_made_for_those_who_collect_them(make):
    """Of the user's own function, called once for each pass that somebody collects."""
    model, calls = make(), []

    def scores(features):
        calls.append(features)
        return {name: torch.zeros(8, 5) for name in features}

    with watch(model, scores=scores) as monitor:
        train_step(model, *batch())
        assert len(calls) == 0
        first, second = monitor.scores(), monitor.scores()
        train_step(model, *batch())
        assert len(calls) == 1
        first.remove()
        train_step(model, *batch())
        assert len(calls) == 2
        del second
        train_step(model, *batch())
        assert len(calls) == 2
        assert monitor.stats()["passes"] == 4


def test_an_optimizer_that_is_dropped_collects_no_scores():
    model, calls = Gated(), []
    forward = model.head.forward

    def counted(x):
        calls.append(x)
        return forward(x)

    vars(model.head)["forward"] = counted
    monitor = watch(model)
    optimizer = bo.ModulatedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), monitor)
    train_step(model, *batch())
    assert len(calls) == 3  # the pass itself, and one for each modality
    del optimizer
    gc.collect()
    train_step(model, *batch())
    assert len(calls) == 4


def test_the_columns_are_found_though_nobody_collects_scores():
    model, seen = Concat(), []
    with watch(model) as monitor:
        monitor.hooks.gradients.add(lambda current, gradient: seen.append(set(current.unimodal or {})))
        train_step(model, *batch())
        assert columns_of(monitor) == columns_by_hand(model)
        train_step(model, *batch())
    assert seen == [set(model.names), set()]


def test_a_consumer_that_left_is_not_fed(model, monitor):
    scores = monitor.scores()
    scores.remove()
    train_step(model, *batch())
    assert scores.take() is None


def test_discard_and_reset_forget_what_was_not_taken(model, monitor):
    scores, other = monitor.scores(), monitor.scores(steps=False)
    train_step(model, *batch())
    scores.discard()
    assert scores.take() is None
    train_step(model, *batch())
    monitor.reset()
    assert scores.take() is None
    assert other.take() is not None


def test_entropies_where_a_consumer_asks_for_them(model, monitor):
    inputs, labels = batch()
    scores = monitor.scores(needs_entropy=True)
    train_step(model, inputs, labels)
    sums = scores.take()
    assert sums is not None
    for i, z in enumerate(model.encode(*inputs)):
        p = z.detach().softmax(1)
        assert sums.feature_entropy[i].item() == pytest.approx(float(-(p * p.log()).sum()), rel=1e-5)
    scores.remove()
    plain = step(monitor, model, inputs, labels)
    assert plain is not None
    assert plain.feature_entropy.tolist() == [0, 0]


# Missing modalities


def test_samples_that_lack_a_modality(model, monitor):
    inputs, labels = batch()
    present = torch.tensor([True, False] * 4)
    scores, spy = monitor.scores(), Spy(monitor)
    loss = loss_of(model, inputs, labels)
    monitor.observe(labels, present={"audio": present})
    loss.backward()
    sums = scores.take()
    assert sums is not None
    assert sums.count.tolist() == [4, 8]
    p = spy.unimodal[0]["audio"].softmax(1)[torch.arange(8), labels]
    assert sums.score[0].item() == pytest.approx(float(p[present].sum()), rel=1e-5)
    assert sums.mean_score[0].item() == pytest.approx(float(p[present].mean()), rel=1e-5)


@pytest.mark.parametrize("kind", [list, lambda flags: torch.tensor(flags).int(), torch.tensor])
def test_present_as_flags_of_any_kind(model, monitor, kind):
    inputs, labels = batch(4)
    scores = monitor.scores()
    monitor.observe(labels, present={"visual": kind([True, False, False, True])})
    train_step(model, inputs, labels)
    sums = scores.take()
    assert sums is not None
    assert sums.count.tolist() == [4, 2]


@pytest.mark.parametrize("labels_from", ["gradient", "loss", "model", "auto"])
def test_present_counts_where_labels_come_from_elsewhere(model, labels_from):
    inputs, labels = batch(4)
    with watch(model, labels=labels_from) as monitor:
        criterion = nn.CrossEntropyLoss()
        monitor.watch_loss(criterion)
        scores = monitor.scores()
        monitor.observe(labels, present={"visual": torch.tensor([True, False, False, True])})
        criterion(model(*inputs), labels).backward()
        sums = scores.take()
        if labels_from == "model":
            assert sums is None
        else:
            assert sums is not None
            assert sums.count.tolist() == [4, 2]


def test_present_of_a_modality_that_no_sample_has(model, monitor):
    scores = monitor.scores()
    inputs, labels = batch(4)
    monitor.observe(labels, present={"audio": torch.zeros(4, dtype=torch.bool)})
    train_step(model, inputs, labels)
    sums = scores.take()
    assert sums is not None
    assert sums.count.tolist() == [0, 4]
    assert sums.present.tolist() == [False, True]
    assert sums.mean_score[0] == 0


def test_present_that_does_not_fit(model, monitor):
    _, labels = batch(4)
    with pytest.raises(KeyError, match=r"by modality \('audio', 'visual'\). Found \['smell'\]"):
        monitor.observe(labels, present={"smell": torch.ones(4)})
    with pytest.raises(ValueError, match=r"one flag for each of the 4 samples. Found shape \(3,\)"):
        monitor.observe(labels, present={"audio": torch.ones(3, dtype=torch.bool)})


# The model is left alone


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_model_and_its_gradients_are_bit_for_bit_the_same(fusion):
    def gradients(*, watched):
        torch.manual_seed(5)
        model = FUSIONS[fusion](3, encoder=batch_norm)
        inputs, labels = batch(8, 3)
        monitor = watch(model) if watched else None
        scores = monitor.scores() if monitor else None
        train_step(model, inputs, labels)
        assert scores is None or scores.take() is not None
        return [p.grad for p in model.parameters()], torch.get_rng_state()

    (plain, stream), (watched, watched_stream) = gradients(watched=False), gradients(watched=True)
    assert all(map(torch.equal, plain, watched))
    assert torch.equal(stream, watched_stream)


def test_what_was_seen_is_let_go():
    """No graph and no feature outlives the step."""
    import gc
    import weakref

    model = MLPHead()
    with watch(model) as monitor:
        scores = monitor.scores()
        inputs, labels = batch()
        logits = model(*inputs)
        kept = [weakref.ref(logits), weakref.ref(inputs[0])]
        F.cross_entropy(logits, labels).backward()
        scores.take()
        del logits, inputs
        gc.collect()
        assert [ref() for ref in kept] == [None, None]


def test_two_monitors_on_one_model(model):
    inputs, labels = batch()
    expected = [sums_of(model, inputs, labels, scores=scores) for scores in ("split", "zero-out")]
    with watch(model) as one, watch(model, scores="zero-out") as two:
        a, b = one.scores(), two.scores()
        train_step(model, inputs, labels)
        assert_sums(a.take(), expected[0])
        assert_sums(b.take(), expected[1])
