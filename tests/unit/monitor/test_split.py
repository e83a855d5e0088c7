"""scores="split": exact Eq. 8 for a linear head over concatenated features, the slices found by themselves."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import balanceopt as bo
from tests.models import (
    WRAPPINGS,
    Concat,
    ConcatOfWrapped,
    Signal,
    Tokens,
    batch,
    columns_of,
    linear,
    train_step,
    watch,
)
from tests.unit.monitor.helpers import Spy, columns_by_hand, eq8, score, step, sums_of, unimodal_of


def test_exact_additive_and_scored_as_by_hand():
    model = Concat(3, width=(4, 3, 5))
    inputs, labels = batch(8, 3)
    with watch(model) as monitor:
        spy = Spy(monitor)
        sums = step(monitor, model, inputs, labels)
        assert columns_of(monitor) == columns_by_hand(model)
    features = model.encode(*inputs)
    for i, (name, columns) in enumerate(columns_by_hand(model).items()):
        expected = eq8(model, name, features[i], columns)
        torch.testing.assert_close(spy.unimodal[0][name], expected)
        assert sums is not None
        assert sums.score[i].item() == pytest.approx(score(expected, labels), rel=1e-5)
    joint = torch.stack(list(spy.unimodal[0].values())).sum(0)
    torch.testing.assert_close(joint, model(*inputs).detach())


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_any_order_of_concatenation(order):
    model = Concat(3, order=order, width=(2, 3, 4))
    inputs, labels = batch(8, 3)
    with watch(model) as monitor:
        step(monitor, model, inputs, labels)
        assert columns_of(monitor) == columns_by_hand(model)


def test_order_of_the_encoders_given_does_not_matter():
    model = Concat(3)
    inputs, labels = batch(8, 3)
    plain = sums_of(model, inputs, labels)
    encoders = {name: model.encoders[name] for name in reversed(model.names)}
    with bo.ModalityMonitor(model, encoders, model.head) as monitor:
        turned = step(monitor, model, inputs, labels)
        assert monitor.modalities == tuple(reversed(model.names))
    assert plain is not None
    assert turned is not None
    torch.testing.assert_close(turned.score.flip(0), plain.score)


@pytest.mark.parametrize("modalities", [2, 4, 6])
@pytest.mark.parametrize("bias", [True, False])
def test_additive_for_any_number_of_modalities(modalities, bias):
    model = Concat(modalities, bias=bias)
    inputs, labels = batch(4, modalities)
    logits = unimodal_of(model, inputs, labels)
    assert len(logits) == modalities
    torch.testing.assert_close(torch.stack(list(logits.values())).sum(0), model(*inputs).detach())


BETWEEN: dict[str, tuple[Any, Any, int]] = {
    "flatten": (Signal, lambda z: z.flatten(1), 16),
    "mean": (Signal, lambda z: z.mean(2), 4),
    "adaptive pooling": (Signal, lambda z: nn.AdaptiveAvgPool1d(1)(z).flatten(1), 4),
    "max": (Signal, lambda z: z.amax(2), 4),
    "relu and mean": (Signal, lambda z: z.relu().mean(2), 4),
    "mean and relu": (Signal, lambda z: z.mean(2).relu(), 4),
    "relu": (linear, torch.relu, 4),
    "inplace relu": (linear, nn.ReLU(inplace=True), 4),
    "first token": (Tokens, lambda z: z[:, 0], 4),
    "last token": (Tokens, lambda z: z[:, -1], 4),
    "mean token": (Tokens, lambda z: z.mean(1), 4),
    "max token": (Tokens, lambda z: z.amax(1), 4),
}


def between(name, modalities=2, **options):
    encoder, function, width = BETWEEN[name]
    model = Concat(
        modalities,
        encoder=encoder,
        between=function,
        joint_width=modalities * width,
        order=range(modalities)[::-1],
        **options,
    )
    return model, width


@pytest.mark.parametrize("name", BETWEEN)
def test_pooling_and_the_like_between_encoder_and_head(name):
    model, width = between(name)
    inputs, labels = batch(8)
    with watch(model) as monitor:
        spy = Spy(monitor)
        step(monitor, model, inputs, labels)
        assert columns_of(monitor) == {"audio": slice(width, 2 * width), "visual": slice(0, width)}
        assert monitor.stats()["scores"] == "split"
    assert model.between is not None
    for encoded, (modality, columns) in zip(model.encode(*inputs), columns_of(monitor).items(), strict=True):
        expected = eq8(model, modality, model.between(encoded), columns)
        torch.testing.assert_close(spy.unimodal[0][modality], expected)


@pytest.mark.parametrize("name", BETWEEN)
def test_clean_logits_where_features_are_dropped_on_their_way(name):
    """OPM's own scores are those of the features before its drop."""
    model, _ = between(name)
    inputs, labels = batch(8)
    clean = unimodal_of(model, inputs, labels)
    with watch(model) as monitor:
        spy = Spy(monitor)
        monitor.hooks.transforms.add(
            lambda modality, current, z: z * (torch.arange(8) % 2).view(8, *[1] * (z.dim() - 1))
        )
        train_step(model, inputs, labels)
    for modality, logits in spy.unimodal[0].items():
        torch.testing.assert_close(logits, clean[modality])


def test_dropout_between_is_recognised():
    model = Concat(width=(8, 6), between=nn.Dropout(0.5))
    inputs, labels = batch(8)
    with watch(model) as monitor:
        spy = Spy(monitor)
        logits = train_step(model, inputs, labels)
        assert columns_of(monitor) == columns_by_hand(model)
    torch.testing.assert_close(torch.stack(list(spy.unimodal[0].values())).sum(0), logits)


def test_features_in_image_form():
    class Image(nn.Module):
        def __init__(self, inputs, width):
            super().__init__()
            self.project = nn.Linear(inputs, width * 6)

        def forward(self, x):
            return self.project(x).unflatten(1, (-1, 2, 3))

    model = Concat(encoder=Image, between=lambda z: F.adaptive_avg_pool2d(z, 1).flatten(1))
    assert sums_of(model, *batch(8), scores="split") is not None


def test_a_row_of_logits_for_each_position():
    model = Concat(encoder=Tokens)
    inputs, _ = batch(4)
    labels = torch.randint(5, (4, 3))
    with watch(model) as monitor:
        scores, spy = monitor.scores(), Spy(monitor)
        logits = model(*inputs)
        F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        sums = scores.take()
    assert sums is not None
    assert sums.count.tolist() == [4, 4]
    torch.testing.assert_close(
        torch.stack(list(spy.unimodal[0].values())).sum(0), logits.detach().flatten(0, 1)
    )
    alone = spy.unimodal[0]["audio"].log_softmax(1).gather(1, labels.flatten()[:, None])
    expected = alone.view(4, 3).mean(1).exp().sum()  # a sample counts once
    assert sums.score[0].item() == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_encoders_that_return_more_than_a_tensor(wrapping):
    model = ConcatOfWrapped(wrapping)
    inputs, labels = batch(8)
    with watch(model) as monitor:
        assert step(monitor, model, inputs, labels) is not None
        assert monitor.stats()["scores"] == "split"
        assert columns_of(monitor) == columns_by_hand(model)


def test_select_names_the_feature_where_the_batch_is_not_first():
    class Recurrent(nn.Module):
        def __init__(self, inputs, width):
            super().__init__()
            self.rnn = nn.GRU(inputs, width)

        def forward(self, x):
            return self.rnn(torch.stack([x, x / 2, x / 4]))

    model = Concat(encoder=Recurrent, between=lambda output: output[0][-1])
    select = {name: (lambda output: output[0][-1]) for name in model.names}
    inputs, labels = batch(8)
    with watch(model, select=select) as monitor:
        step(monitor, model, inputs, labels)
        assert columns_of(monitor) == columns_by_hand(model)
        assert monitor.stats()["scores"] == "split"


def test_columns_that_no_encoder_made_are_nobodys():
    class WithMetadata(Concat):
        def fuse(self, features):
            return self.head(torch.cat([features[0], torch.full((8, 2), 0.5), features[1]], 1))

    model = WithMetadata(joint_width=10)
    inputs, labels = batch(8)
    with watch(model) as monitor:
        assert step(monitor, model, inputs, labels) is not None
        assert columns_of(monitor) == {"audio": slice(0, 4), "visual": slice(6, 10)}


# Ambiguity and slices=


class Twice(Concat):
    """The first modality stands in the head's input twice."""

    def fuse(self, features):
        return self.head(torch.cat([features[0], features[1], features[0]], 1))


@pytest.mark.parametrize("scores", ["auto", "split"])
def test_two_places_are_an_error_that_asks_for_slices(scores):
    model = Twice(joint_width=12)
    with pytest.raises(ValueError, match=r"'audio' stands at columns \[0, 8\].*slices="):
        sums_of(model, *batch(8), scores=scores)


def test_slices_given_by_the_user():
    model = Twice(joint_width=12)
    columns = {"audio": slice(8, 12), "visual": slice(4, 8)}
    inputs, labels = batch(8)
    logits = unimodal_of(model, inputs, labels, slices=columns)
    for features, (name, own) in zip(model.encode(*inputs), columns.items(), strict=True):
        torch.testing.assert_close(logits[name], eq8(model, name, features, own))


def test_slices_through_an_unknown_layer():
    """Nothing can be matched through LayerNorm; the user says where each modality stands."""
    model = Concat(between=nn.LayerNorm(4))
    columns = {"audio": slice(0, 4), "visual": slice(4, 8)}
    inputs, labels = batch(8)
    with watch(model, slices=columns) as monitor:
        assert monitor.stats()["scores"] == "split"
        spy = Spy(monitor)
        logits = train_step(model, inputs, labels)
    torch.testing.assert_close(torch.stack(list(spy.unimodal[0].values())).sum(0), logits)


def test_slices_for_some_modalities_only():
    model = Concat(3)
    with watch(model, slices={"visual": slice(4, 8)}) as monitor:
        assert step(monitor, model, *batch(8, 3)) is not None
        assert columns_of(monitor) == {"audio": slice(0, 4), "visual": slice(4, 8), "text": slice(8, 12)}


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ({"audio": slice(0, 5), "visual": slice(4, 8)}, "should not overlap"),
        ({"audio": slice(8, 12)}, "should hold columns of the head's 8"),
        ({"smell": slice(0, 4)}, r"Found also \['smell'\]"),
    ],
)
def test_slices_that_do_not_fit(slices, message):
    with pytest.raises(ValueError, match=message):
        watch(Concat(), slices=slices)


def test_no_match_under_split_is_an_error():
    with pytest.raises(ValueError, match=r"stands nowhere in the head's input.*slices="):
        sums_of(Concat(between=nn.LayerNorm(4)), *batch(8), scores="split")


def test_no_match_under_auto_takes_zero_out():
    with watch(model := Concat(between=nn.LayerNorm(4))) as monitor:
        assert step(monitor, model, *batch(8)) is not None
        assert monitor.stats()["scores"] == "zero-out"


# What could be mistaken for Eq. 8


def test_an_encoder_called_twice_in_one_pass_is_not_split():
    """Two views through one encoder: its last output is only a part of what is its own in the head's input."""

    class TwoViews(Concat):
        def forward(self, *inputs):
            x, y = inputs
            a, b = self.encoders.values()
            return self.head(torch.cat([a(x), a(x.flip(0)), b(y)], 1))

    model = TwoViews(joint_width=12)
    inputs, labels = batch(8)
    with watch(model) as monitor:
        step(monitor, model, inputs, labels)
        assert monitor.stats()["scores"] == "zero-out"
    with pytest.raises(ValueError, match="'audio' ran 2 times"):
        sums_of(model, inputs, labels, scores="split")


class Cosine(nn.Linear):
    def forward(self, x):
        return F.linear(F.normalize(x), F.normalize(self.weight))


@pytest.mark.parametrize("head", [Cosine(8, 5), "hook"])
def test_a_linear_head_that_does_something_else_is_not_split(head):
    model = Concat()
    if head == "hook":
        model.head.register_forward_hook(lambda module, args, output: output.tanh())
    else:
        model.head = head
    with watch(model) as monitor:
        step(monitor, model, *batch(8))
        assert monitor.stats()["scores"] == "zero-out"
    with pytest.raises(ValueError, match="weight and bias do not make its output"):
        sums_of(model, *batch(8), scores="split")


def test_modalities_that_overlap_were_added_and_are_not_split():
    """A first batch with one modality, a second with the other: each alone looks like all of the head's input."""

    class Added(Concat):
        def forward(self, *inputs):
            encoders = self.encoders.values()
            return self.head(sum(e(x) for e, x in zip(encoders, inputs, strict=True) if x is not None))

    model = Added(joint_width=4)
    (x, y), labels = batch(8)
    with watch(model) as monitor:
        step(monitor, model, [x, None], labels)  # type: ignore[list-item]
        step(monitor, model, [None, y], labels)  # type: ignore[list-item]
        assert monitor.stats()["scores"] == "zero-out"


def test_a_parametrized_head_keeps_its_state():
    model = Concat()
    nn.utils.parametrizations.spectral_norm(model.head)
    inputs, labels = batch(8)
    train_step(model, inputs, labels)
    buffers = {name: b.clone() for name, b in model.head.named_buffers()}
    train_step(model, inputs, labels)
    expected = {name: b.clone() for name, b in model.head.named_buffers()}
    for name, buffer in model.head.named_buffers():
        buffer.copy_(buffers[name])
    with watch(model) as monitor:
        spy = Spy(monitor)
        logits = train_step(model, inputs, labels)
        assert monitor.stats()["scores"] == "split"
    for name, buffer in model.head.named_buffers():
        assert torch.equal(buffer, expected[name])
    torch.testing.assert_close(torch.stack(list(spy.unimodal[0].values())).sum(0), logits)


# First batches that show nothing


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_first_batch_that_is_not_finite_shows_nothing(bad):
    model = Concat(encoder=linear)
    inputs, labels = batch(8)
    broken = [inputs[0].clone(), inputs[1]]
    broken[0][0, 0] = bad
    with watch(model) as monitor:
        scores = monitor.scores()
        F.cross_entropy(model(*broken), labels).backward()
        sums = scores.take()
        assert sums is None or (sums.count == 0).any()
        after = step(monitor, model, inputs, labels)
        assert columns_of(monitor) == columns_by_hand(model)
    assert after is not None
    assert (after.count == 8).all()


def test_a_first_batch_of_zero_features_shows_nothing():
    """Both modalities' features are zero: they could stand anywhere."""
    model = Concat(encoder=lambda n, d: nn.Linear(n, d, bias=False))
    inputs, labels = batch(8)
    with watch(model) as monitor:
        step(monitor, model, [torch.zeros_like(x) for x in inputs], labels)
        step(monitor, model, inputs, labels)
        assert columns_of(monitor) == columns_by_hand(model)


def test_a_first_batch_of_one_sample():
    model = Concat()
    with watch(model) as monitor:
        step(monitor, model, *batch(1))
        assert columns_of(monitor) == columns_by_hand(model)


def test_an_empty_first_batch():
    model = Concat()
    with watch(model) as monitor:
        assert step(monitor, model, *batch(0)) is None
        assert monitor.stats()["passes_without_scores"] == 1
        assert step(monitor, model, *batch(8)) is not None
        assert columns_of(monitor) == columns_by_hand(model)
