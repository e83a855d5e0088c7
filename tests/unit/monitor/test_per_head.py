"""scores="per-head": each modality's own head, with its own bias; and a function of the user's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import balanceopt as bo
from tests.models import Concat, Gated, SumHeads, Tokens, batch, compiled, train_step, watch
from tests.unit.monitor.helpers import Spy, score, step, sums_of, unimodal_of


@pytest.mark.parametrize("modalities", [2, 3, 6])
def test_each_head_answers_with_its_whole_bias(modalities):
    model = SumHeads(modalities)
    inputs, labels = batch(8, modalities)
    with watch(model) as monitor:
        spy = Spy(monitor)
        sums = step(monitor, model, inputs, labels)
        assert monitor.stats()["scores"] == "per-head"
    assert sums is not None
    for i, (name, z) in enumerate(zip(model.names, model.encode(*inputs), strict=True)):
        expected = model.own_heads[name](z).detach()
        torch.testing.assert_close(spy.unimodal[0][name], expected)
        assert sums.score[i].item() == pytest.approx(score(expected, labels), rel=1e-5)
    assert sums.label_counts.tolist() == torch.bincount(labels, minlength=5).tolist()


def test_heads_whose_logits_are_summed_in_place():
    class InPlace(SumHeads):
        def fuse(self, features):
            a, b = self.own_heads.values()
            logits = a(features[0])
            logits += b(features[1])
            return logits

    model = InPlace()
    inputs, labels = batch(8)
    for name, z in zip(model.names, model.encode(*inputs), strict=True):
        expected = model.own_heads[name](z).detach()
        torch.testing.assert_close(unimodal_of(model, inputs, labels)[name], expected)


def test_a_weighted_mean_of_the_heads():
    class Mean(SumHeads):
        def fuse(self, features):
            return super().fuse(features) / 3

    inputs, labels = batch(8)
    sums = sums_of(Mean(), inputs, labels)
    assert sums is not None
    assert sums.label_counts.tolist() == torch.bincount(labels, minlength=5).tolist()


def test_clean_logits_where_features_are_dropped():
    model = SumHeads()
    inputs, labels = batch(8)
    clean = unimodal_of(model, inputs, labels)
    with watch(model) as monitor:
        step(monitor, model, inputs, labels)
        spy = Spy(monitor)
        monitor.hooks.transforms.add(lambda name, current, z: z * 0)
        train_step(model, inputs, labels)
    torch.testing.assert_close(spy.unimodal, [clean])


def test_a_modality_that_the_batch_lacks():
    class Optional(SumHeads):
        def forward(self, *inputs):
            parts = zip(self.encoders.values(), self.own_heads.values(), inputs, strict=True)
            return sum(head(encoder(x)) for encoder, head, x in parts if x is not None)

    model = Optional()
    (x, y), labels = batch(8)
    with watch(model) as monitor:
        only_audio = step(monitor, model, [x, None], labels)  # type: ignore[list-item]
        only_visual = step(monitor, model, [None, y], labels)  # type: ignore[list-item]
    assert only_audio is not None
    assert only_visual is not None
    assert only_audio.count.tolist() == [8, 0]
    assert only_visual.count.tolist() == [0, 8]


def test_a_loop_that_calls_only_the_parts():
    model = SumHeads(3)
    inputs, labels = batch(8, 3)
    expected = sums_of(model, inputs, labels)
    assert expected is not None
    with watch(model) as monitor:
        scores = monitor.scores()
        for _ in range(2):
            logits = sum(
                model.own_heads[name](model.encoders[name](x))
                for name, x in zip(model.names, inputs, strict=True)
            )
            F.cross_entropy(logits, labels).backward()
            sums = scores.take()
            assert sums is not None
            torch.testing.assert_close(sums.score, expected.score)


def test_a_row_of_logits_for_each_position():
    model = SumHeads(encoder=Tokens)
    inputs, _ = batch(4)
    labels = torch.randint(5, (4, 3))
    with watch(model) as monitor:
        scores = monitor.scores()
        F.cross_entropy(model(*inputs).flatten(0, 1), labels.flatten()).backward()
        sums = scores.take()
    assert sums is not None
    assert sums.count.tolist() == [4, 4]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's own
def test_compiled_heads():
    model = SumHeads()
    inputs, labels = batch(8)
    expected = unimodal_of(model, inputs, labels)
    model.own_heads["audio"] = compiled(model.own_heads["audio"])
    torch.testing.assert_close(unimodal_of(model, inputs, labels), expected)
    torch._dynamo.reset()


def test_heads_for_other_modalities():
    model = SumHeads()
    with pytest.raises(ValueError, match=r"one head for each of \['audio', 'visual'\]. Found \['audio'\]"):
        bo.ModalityMonitor(model, model.modalities, {"audio": model.own_heads["audio"]})


@pytest.mark.parametrize("scores", ["split", "zero-out"])
def test_other_scores_with_own_heads(scores):
    with pytest.raises(ValueError, match=f"should be 'per-head'. Found '{scores}'"):
        watch(SumHeads(), scores=scores)


def test_per_head_needs_heads():
    with pytest.raises(ValueError, match=r"needs a mapping from modality to its own head. Found one head"):
        watch(Concat(), scores="per-head")


# A function


def test_a_function_gets_the_features_and_gives_logits():
    model = Gated()
    inputs, labels = batch(8)
    weight = torch.randn(5, 4)
    seen = []

    def own(features):
        seen.append({name: z.requires_grad for name, z in features.items()})
        return {name: z @ weight.T for name, z in features.items()}

    with watch(model, scores=own) as monitor:
        spy = Spy(monitor)
        sums = step(monitor, model, inputs, labels)
        assert monitor.stats()["scores"] == "function own"
        assert "function own" in repr(monitor)
    assert seen == [{"audio": False, "visual": False}]
    assert sums is not None
    for name, z in zip(model.names, model.encode(*inputs), strict=True):
        torch.testing.assert_close(spy.unimodal[0][name], (z @ weight.T).detach())


@pytest.mark.parametrize(
    "give", [lambda u: torch.stack(list(u.values())), lambda u: list(u.values()), lambda u: tuple(u.values())]
)
def test_a_function_may_give_a_sequence_or_a_tensor(give):
    model = Gated(width=5)
    inputs, labels = batch(8)
    expected = unimodal_of(model, inputs, labels, scores=lambda features: features)
    torch.testing.assert_close(unimodal_of(model, inputs, labels, scores=give), expected)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda u: [u["audio"]], ValueError, r"for each of \['audio', 'visual'\]. Found 1"),
        (lambda u: {"smell": u["audio"]}, KeyError, r"Found \['smell'\]"),
        (
            lambda u: {name: z[:, :3] for name, z in u.items()},
            ValueError,
            r"'audio' should have the shape \(8, 5\) of the joint ones. Found \(8, 3\)",
        ),
        (lambda u: {"audio": u["audio"], "visual": u["visual"][:2]}, ValueError, r"Found \(2, 5\)"),
    ],
)
def test_a_function_that_gives_something_else(function, error, message):
    with pytest.raises(error, match=message):
        sums_of(Gated(width=5), *batch(8), scores=function)


def test_a_function_needs_a_head_too():
    model = Gated()
    with pytest.raises(ValueError, match="needs `head=`, whose output tells that a pass counts"):
        bo.ModalityMonitor(model, model.modalities, scores=lambda features: features)
