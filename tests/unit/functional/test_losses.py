"""as_loss, likelihood_score, kept predictions, classes of targets: what is read when, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from balanceopt.functional import (
    KeptPredictions,
    as_loss,
    centred_predictions,
    label_set_classes,
    likelihood_score,
    quantile_classes,
    significance_from_baseline,
)

LOGITS, INDICES, NUMBERS = torch.randn(2, 5, 3), torch.tensor([0, 1, 2, 1, -100]), torch.randn(5, 3)


class ContrastiveLoss(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).sum()


class MyContrastive(ContrastiveLoss):
    pass


class Focal(nn.CrossEntropyLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input, target) ** 2


class Renamed(nn.MSELoss):
    pass


# What a loss is


@pytest.mark.parametrize(
    "criterion",
    [
        nn.TripletMarginLoss(),
        nn.TripletMarginWithDistanceLoss(),
        nn.CosineEmbeddingLoss(),
        nn.MarginRankingLoss(),
        nn.HingeEmbeddingLoss(),
        nn.CTCLoss(),
        ContrastiveLoss(),
        MyContrastive(),
        F.triplet_margin_loss,
        F.cosine_embedding_loss,
        F.margin_ranking_loss,
        F.ctc_loss,
    ],
)
def test_losses_without_a_prediction_of_a_target_are_refused_with_what_works(criterion):
    with pytest.raises(
        ValueError, match=r"has no uni-modal score.*re-learning.*fixed coefficients.*`scores=function`"
    ):
        as_loss(criterion)


@pytest.mark.parametrize(
    ("criterion", "cure"),
    [
        (nn.NLLLoss(), "CrossEntropyLoss"),
        (F.nll_loss, "CrossEntropyLoss"),
        (nn.BCELoss(), "BCEWithLogitsLoss"),
        (F.binary_cross_entropy, "BCEWithLogitsLoss"),
    ],
)
def test_losses_of_probabilities_name_the_one_of_logits(criterion, cure):
    with pytest.raises(ValueError, match=rf"should take logits.*pass nn\.{cure}\(\)"):
        as_loss(criterion)


@pytest.mark.parametrize("criterion", [nn.MSELoss, "mse", 3, torch.ones(2), [nn.MSELoss()]])
def test_what_is_no_loss_is_refused(criterion):
    with pytest.raises(ValueError, match=r"`loss` should be cross-entropy.*or None"):
        as_loss(criterion)


def test_a_forward_of_its_own_is_refused_and_options_alone_are_not():
    with pytest.raises(
        ValueError, match=r"Focal should compute what nn\.CrossEntropyLoss does, or be a function"
    ):
        as_loss(Focal())
    expected = likelihood_score(LOGITS, NUMBERS, nn.MSELoss())
    assert torch.equal(likelihood_score(LOGITS, NUMBERS, Renamed(reduction="sum")), expected)
    compiled = torch.compile(nn.MSELoss(), backend="eager")
    assert torch.equal(likelihood_score(LOGITS, NUMBERS, compiled), expected)


def test_a_user_function_of_any_name_is_taken():
    def contrastive(f: Tensor, y: Tensor) -> Tensor:
        return (f - y).abs()

    assert likelihood_score(LOGITS, NUMBERS, contrastive).isfinite().all()


def test_options_are_read_at_each_call():
    options: list[tuple[nn.Module, Tensor, dict[str, Any]]] = [
        (nn.CrossEntropyLoss(), INDICES, {"label_smoothing": 0.3}),
        (nn.CrossEntropyLoss(), INDICES, {"ignore_index": 1}),
        (nn.SmoothL1Loss(), NUMBERS, {"beta": 0.1}),
        (nn.HuberLoss(), NUMBERS, {"delta": 0.1}),
        (nn.BCEWithLogitsLoss(), NUMBERS.sigmoid(), {"pos_weight": torch.tensor([1.0, 9.0, 1.0])}),
        (nn.BCEWithLogitsLoss(), NUMBERS.sigmoid(), {"weight": torch.tensor([1.0, 9.0, 1.0])}),
    ]
    for module, target, changes in options:
        target = target.clamp(min=0) if "ignore_index" in changes else target
        loss = as_loss(module)
        before = loss.measure(LOGITS, target).values
        for name, value in changes.items():
            setattr(module, name, value)
        assert not torch.equal(loss.measure(LOGITS, target).values, before), changes
    plain = nn.CrossEntropyLoss(label_smoothing=0.3)
    expected = torch.stack(
        [F.cross_entropy(f, INDICES, label_smoothing=0.3, reduction="none") for f in LOGITS]
    )
    torch.testing.assert_close(as_loss(plain).measure(LOGITS, INDICES).values, expected)


def test_a_copy_without_reduction_leaves_the_module_and_its_hooks_alone():
    module, calls = nn.MultiLabelSoftMarginLoss(), []
    module.register_forward_hook(lambda *_: calls.append(1))
    target = (NUMBERS > 0).float()
    values = torch.stack([F.multilabel_soft_margin_loss(f, target, reduction="none") for f in LOGITS])
    torch.testing.assert_close(as_loss(module).measure(LOGITS, target).values, values)
    assert module.reduction == "mean"
    assert calls == []


@pytest.mark.parametrize(
    ("criterion", "target", "kind", "classes", "recovers", "scale_free", "adds", "centred"),
    [
        (None, INDICES, "class indices", True, True, False, True, False),
        (nn.CrossEntropyLoss(), NUMBERS.softmax(1), "probabilities", True, True, False, True, False),
        (nn.BCEWithLogitsLoss(), INDICES, "multi-hot", False, True, False, True, False),
        (nn.MSELoss(), NUMBERS, "numbers", False, False, True, True, True),
        (nn.L1Loss(), NUMBERS, "numbers", False, False, True, False, True),
        (nn.HuberLoss(), INDICES, "numbers", False, False, True, False, True),
        (lambda f, y: f, NUMBERS, "numbers", False, False, True, True, True),
        (lambda f, y: f, INDICES, "class indices", False, False, True, True, False),
    ],
)
def test_descriptions(criterion, target, kind, classes, recovers, scale_free, adds, centred):
    loss = as_loss(criterion)
    assert as_loss(loss) is loss
    described = (
        loss.kind(target),
        loss.has_classes,
        loss.recovers,
        loss.scale_free,
        loss.adds,
        loss.centred(target),
    )
    assert described == (kind, classes, recovers, scale_free, adds, centred)


# Targets that do not fit


@pytest.mark.parametrize(
    ("loss", "predictions", "target", "message"),
    [
        (None, LOGITS, torch.tensor([0, 1, 2, 3, 0]), r"should lie in \[0, 3\)"),
        (None, LOGITS, torch.zeros(4).long(), "`predictions` should have shape"),
        (None, LOGITS, NUMBERS, "should be probabilities"),
        (None, LOGITS, torch.zeros(5), "`predictions` should have shape"),
        (nn.CrossEntropyLoss(torch.ones(4)), LOGITS, INDICES, "one entry for each of the 3 classes"),
        (nn.BCEWithLogitsLoss(), LOGITS, NUMBERS * 9, r"should lie in \[0, 1\].*`weight` of 0"),
        (nn.BCEWithLogitsLoss(), LOGITS, NUMBERS.new_full((5, 3), torch.inf), r"should lie in \[0, 1\]"),
        (nn.BCEWithLogitsLoss(torch.ones(2)), LOGITS, torch.ones(5, 3), "`loss.weight` should have a shape"),
        (
            nn.BCEWithLogitsLoss(pos_weight=torch.ones(5, 1, 1)),
            LOGITS,
            torch.ones(5, 3),
            "`loss.pos_weight` should",
        ),
        (nn.MSELoss(), LOGITS, NUMBERS[:, :2], "in the shape of one prediction"),
        (nn.MSELoss(), LOGITS, torch.tensor(1.0), "in the shape of one prediction"),
        (
            lambda f, y: F.mse_loss(f, y),
            LOGITS,
            NUMBERS,
            r"one loss for each of the 5 samples.*reduction='none'",
        ),
        (lambda f, y: 3, LOGITS, NUMBERS, "one loss for each of the 5 samples"),
        (lambda f, y: -(f**2), LOGITS, NUMBERS, "losses of at least 0"),
        (lambda f, y: f, LOGITS, torch.tensor(1.0), "`predictions` should have shape"),
    ],
)
def test_targets_that_do_not_fit(loss, predictions, target, message):
    with pytest.raises(ValueError, match=message):
        likelihood_score(predictions, target, loss)


@pytest.mark.parametrize("baseline", [0, -1.0, float("nan"), "1", torch.tensor(0.0), torch.ones(2)])
def test_a_baseline_is_a_number_above_zero(baseline):
    with pytest.raises(ValueError, match="`baseline` should be"):
        likelihood_score(LOGITS, NUMBERS, nn.MSELoss(), baseline)


def test_a_baseline_does_not_change_a_likelihood():
    assert torch.equal(likelihood_score(LOGITS, INDICES, None, 3.0), likelihood_score(LOGITS, INDICES, None))


def test_a_target_may_lack_the_last_dimension_of_a_single_output():
    """Never broadcast against it, as torch's losses do."""
    predictions, target = torch.randn(2, 5, 1), torch.rand(5)
    for loss in (
        *(k() for k in (nn.MSELoss, nn.L1Loss, nn.HuberLoss, nn.BCEWithLogitsLoss)),
        F.smooth_l1_loss,
    ):
        expected = likelihood_score(predictions.squeeze(2), target, loss)
        assert torch.equal(likelihood_score(predictions, target, loss), expected)
        for form in (target.unsqueeze(1), target):
            values = as_loss(loss).measure(predictions, form).values
            assert torch.equal(as_loss(loss).measure(predictions.squeeze(2), form).values, values)


def test_a_weight_for_each_label_of_one_column_stays_a_weight_of_a_sample():
    """A weight (B, 1) with logits (B, 1), as the loop's own loss takes it."""
    loss = nn.BCEWithLogitsLoss(torch.tensor([[1.0], [0.0], [2.0]]))
    score = likelihood_score(torch.randn(2, 3, 1), torch.ones(3, 1), loss)
    assert (score[:, 1] == 0).all()
    assert (score[:, [0, 2]] > 0).all()


# A step


def test_micro_batches_with_other_outputs_are_refused():
    kept = KeptPredictions.of(LOGITS, NUMBERS) + KeptPredictions.of(LOGITS[..., :2], NUMBERS[:, :2])
    for loss in (nn.MSELoss(), nn.L1Loss()):
        with pytest.raises(ValueError, match="same number of outputs in all micro-batches"):
            kept.losses(as_loss(loss))


def test_micro_batches_are_all_centred_or_none():
    with pytest.raises(ValueError, match="all be centred, or none"):
        KeptPredictions.of(LOGITS, NUMBERS) + KeptPredictions.of(LOGITS, NUMBERS, LOGITS.sum(0))


def test_a_given_baseline_is_the_scale_of_a_step():
    kept = KeptPredictions.of(LOGITS, NUMBERS)
    expected = likelihood_score(LOGITS, NUMBERS, nn.MSELoss(), 0.5)
    torch.testing.assert_close(kept.losses(as_loss(nn.MSELoss()), baseline=torch.tensor(0.5)).score, expected)


def test_a_modality_that_no_sample_has():
    present = torch.tensor([True, False]).unsqueeze(1).expand(2, 5)
    predictions = LOGITS.clone()
    predictions[1] = torch.nan
    for criterion in (nn.MSELoss(), nn.L1Loss(), lambda f, y: (f - y).abs()):
        step = KeptPredictions.of(predictions, NUMBERS, LOGITS.sum(0), present).losses(as_loss(criterion))
        assert step.scale.isfinite()
        assert step.score[0].isfinite().all()
        assert (step.score[1] == 0).all()
        assert not step.counted[1].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((LOGITS, NUMBERS[:, :2]), "`unimodal` should have shape"),
        ((NUMBERS[0], NUMBERS[0]), "`unimodal` should have shape"),
        ((LOGITS, NUMBERS, torch.ones(5).bool()), "`present` should have shape"),
        ((LOGITS, NUMBERS, torch.ones(2, 5)), "`present` should be a dense bool tensor"),
    ],
)
def test_centred_predictions_of_other_shapes(arguments, message):
    with pytest.raises(ValueError, match=message):
        centred_predictions(*arguments)


@pytest.mark.parametrize("name", ["losses", "feature_entropy", "baseline", "count", "offset"])
def test_sums_of_other_shapes(name):
    good = dict.fromkeys(("losses", "feature_entropy", "count"), torch.ones(2)) | {
        "baseline": torch.tensor(1.0)
    }
    with pytest.raises(ValueError, match=name):
        significance_from_baseline(**(good | {name: torch.ones(3, 1)}))


# Classes of targets


@pytest.mark.parametrize(
    ("targets", "bins", "message"),
    [
        (torch.ones(4, 2), 10, "one number a sample"),
        (torch.ones(0), 10, "at least one number"),
        (torch.tensor([1.0, torch.nan]), 10, "should be finite"),
        (torch.ones(4), 1, "`bins` should be"),
    ],
)
def test_quantiles_refuse(targets, bins, message):
    with pytest.raises(ValueError, match=message):
        quantile_classes(targets, bins)


@pytest.mark.parametrize(
    ("labels", "most", "message"),
    [
        (torch.ones(4), 3, "`multi_hot` should be"),
        (torch.ones(0, 3), 3, "at least one"),
        (torch.ones(4, 2), 0, "most"),
    ],
)
def test_label_sets_refuse(labels, most, message):
    with pytest.raises(ValueError, match=message):
        label_set_classes(labels, most)
    with pytest.raises(ValueError, match="should have 2 labels"):
        label_set_classes(torch.ones(4, 2))(torch.ones(4, 3))


def test_equal_targets_share_a_bin_and_validation_gets_the_cuts_of_training():
    classes = quantile_classes(torch.tensor([0, 0, 0, 0, 0, 0, 1, 2, 3, 4]), 5)
    assert classes(torch.tensor([[-5.0], [0.0], [0.5], [4.0], [99.0]])).tolist() == [0, 0, 1, 2, 2]
    assert classes.num_classes == 3
