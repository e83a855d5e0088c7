"""Every row of the table of losses against a naive loop over samples, in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from balanceopt.functional import as_loss, centred_predictions, likelihood_score
from tests.reference import losses as naive
from tests.reference.ogm import softmax

M, B, C = 3, 7, 4
SPATIAL = [(), (5,), (2, 3)]


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def expect(found, sample_losses, scale=1.0, rel=1e-10):
    """Compare scores (M, B) with naive losses, lists of M lists of B."""
    expected = [[naive.score(x, scale) for x in row] for row in sample_losses]
    assert [x for row in found.tolist() for x in row] == pytest.approx(
        [x for r in expected for x in r], rel=rel
    )


def by_sample(predictions, target, of):
    return [[of(f, y) for f, y in zip(p, target.tolist(), strict=True)] for p in predictions.tolist()]


def labels_with_gaps(shape, ignore_index=-100):
    target = torch.randint(C, shape)
    target[torch.rand(shape) < 0.3] = ignore_index
    target[0] = ignore_index  # a sample without any label
    return target


@pytest.mark.parametrize("spatial", SPATIAL)
@pytest.mark.parametrize("ignore_index", [-100, 2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy(spatial, ignore_index, weighted, smoothing):
    predictions, target = randn(M, B, C, *spatial), labels_with_gaps((B, *spatial), ignore_index)
    weight = torch.tensor([1.0, 0.5, 3.0, 0.0], dtype=torch.float64) if weighted else None
    loss = nn.CrossEntropyLoss(weight, ignore_index=ignore_index, label_smoothing=smoothing)
    options = {
        "ignore_index": ignore_index,
        "weight": None if weight is None else weight.tolist(),
        "smoothing": smoothing,
    }
    found = likelihood_score(predictions, target, loss)
    # Smoothed labels are in float32, as soft labels are.
    rel = 1e-6 if smoothing else 1e-10
    expect(found, by_sample(predictions, target, lambda f, y: naive.cross_entropy(f, y, **options)), rel=rel)


@pytest.mark.parametrize("spatial", SPATIAL)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_soft_labels(spatial, weighted, smoothing):
    predictions, target = randn(M, B, C, *spatial), randn(B, C, *spatial).softmax(1)
    target[1] = 0  # does not count
    target[2] = F.one_hot(torch.tensor(1), C).view(C, *(1 for _ in spatial))
    weight = torch.tensor([1.0, 0.5, 3.0, 0.2], dtype=torch.float64) if weighted else None
    loss = nn.CrossEntropyLoss(weight, label_smoothing=smoothing)
    options = {"soft": True, "smoothing": smoothing, "weight": None if weight is None else weight.tolist()}
    expected = by_sample(predictions, target, lambda f, y: naive.cross_entropy(f, y, **options))
    for row in expected:
        row[1] = None
    expect(likelihood_score(predictions, target, loss), expected, rel=1e-6)


def test_class_indices_are_equation_8():
    predictions, target = randn(M, B, C), torch.randint(C, (B,))
    expected = [
        [softmax(f)[y] for f, y in zip(p, target.tolist(), strict=True)] for p in predictions.tolist()
    ]
    for loss in (None, F.cross_entropy, nn.CrossEntropyLoss(reduction="sum")):
        found = likelihood_score(predictions, target, loss)
        assert [x for r in found.tolist() for x in r] == pytest.approx(
            [x for r in expected for x in r], rel=1e-12
        )


@pytest.mark.parametrize("weight", [None, [1.0, 0.0, 2.0, 0.5]])
@pytest.mark.parametrize("pos_weight", [None, [3.0, 1.0, 0.2, 10.0]])
@pytest.mark.parametrize("soft", [False, True])
def test_multi_label(weight, pos_weight, soft):
    predictions, target = randn(M, B, C), torch.rand(B, C, dtype=torch.float64)
    target = target if soft else target.round()
    given = [None if w is None else torch.tensor(w, dtype=torch.float64) for w in (weight, pos_weight)]
    loss = nn.BCEWithLogitsLoss(given[0], pos_weight=given[1])
    expect(
        likelihood_score(predictions, target, loss),
        by_sample(predictions, target, lambda f, y: naive.binary_cross_entropy(f, y, weight, pos_weight)),
    )


@pytest.mark.parametrize("shape", [(B,), (B, 1)])
@pytest.mark.parametrize("pos_weight", [None, torch.tensor([7.0])])
def test_one_logit_is_the_sigmoid_of_the_true_side(shape, pos_weight):
    predictions, target = randn(M, *shape), torch.randint(2, shape)
    found = likelihood_score(predictions, target, nn.BCEWithLogitsLoss(pos_weight=pos_weight))
    for scores, logits in zip(found.tolist(), predictions.flatten(1).tolist(), strict=True):
        sides = [z if y else -z for z, y in zip(logits, target.flatten().tolist(), strict=True)]
        assert scores == pytest.approx([1 / (1 + math.exp(-z)) for z in sides], rel=1e-12)


REGRESSIONS = [
    (nn.MSELoss(), naive.square),
    (nn.L1Loss(), naive.distance),
    (nn.SmoothL1Loss(beta=0.7), naive.smooth(0.7)),
    (nn.SmoothL1Loss(beta=0.0), naive.smooth(0.0)),
    (nn.HuberLoss(delta=0.4), naive.huber(0.4)),
    (F.mse_loss, naive.square),
    (F.l1_loss, naive.distance),
    (F.smooth_l1_loss, naive.smooth(1.0)),
    (F.huber_loss, naive.huber(1.0)),
]


@pytest.mark.parametrize(("loss", "of"), REGRESSIONS)
@pytest.mark.parametrize("shape", [(), (1,), (4,), (3, 5), (2, 3, 2)])
@pytest.mark.parametrize("samples", [6, 7])
def test_regression(loss, of, shape, samples):
    predictions, target = randn(M, samples, *shape), randn(samples, *shape) + 3
    scale = naive.regression_baseline(target.tolist(), of)
    expect(
        likelihood_score(predictions, target, loss),
        by_sample(predictions, target, lambda f, y: naive.regression(f, y, of)),
        scale,
    )
    expect(
        likelihood_score(predictions, target, loss, baseline=0.37),
        by_sample(predictions, target, lambda f, y: naive.regression(f, y, of)),
        0.37,
    )


@pytest.mark.parametrize(("loss", "of"), REGRESSIONS)
@pytest.mark.parametrize("shape", [(1,), (4,), (3, 5)])
def test_numbers_that_are_missing_do_not_count(loss, of, shape):
    predictions, target = randn(M, B, *shape), randn(B, *shape) + 3
    target[torch.rand(B, *shape) < 0.4] = torch.nan
    target[0], target[1], target[2] = torch.nan, 2.0, 5.0  # a sample without any, and two that are whole
    predictions[:, target.isnan()] = torch.inf
    scale = naive.regression_baseline(target.tolist(), of)
    expect(
        likelihood_score(predictions, target, loss),
        by_sample(predictions, target, lambda f, y: naive.regression(f, y, of)),
        scale,
    )


@pytest.mark.parametrize("pos_weight", [None, [3.0, 1.0, 0.2, 10.0]])
def test_labels_that_are_missing_do_not_count(pos_weight):
    predictions, target = randn(M, B, C), torch.rand(B, C, dtype=torch.float64).round()
    target[torch.rand(B, C) < 0.4] = torch.nan
    target[0] = torch.nan
    predictions[:, target.isnan()] = torch.nan
    loss = nn.BCEWithLogitsLoss(pos_weight=None if pos_weight is None else torch.tensor(pos_weight))
    expect(
        likelihood_score(predictions, target, loss),
        by_sample(predictions, target, lambda f, y: naive.binary_cross_entropy(f, y, None, pos_weight)),
        rel=1e-6,
    )


@pytest.mark.parametrize("shape", [(B,), (B, 5)])
def test_function(shape):
    predictions, target = randn(M, *shape), randn(*shape)
    expected = by_sample(
        predictions, target, lambda f, y: naive.regression(f, y, lambda a, b: abs(a - b) ** 3)
    )
    scale = sum(x for row in expected for x in row) / (M * B)
    expect(likelihood_score(predictions, target, lambda f, y: (f - y).abs() ** 3), expected, scale)
    expect(likelihood_score(predictions, target, lambda f, y: (f - y).abs() ** 3, 2.0), expected, 2.0)


def test_another_module_is_called_without_its_reduction():
    predictions, target = randn(M, B, C), torch.randint(C, (B,))
    values = torch.stack([F.multi_margin_loss(f, target, reduction="none") for f in predictions])
    found = likelihood_score(predictions, target, nn.MultiMarginLoss())
    torch.testing.assert_close(found, torch.exp(-values / values.mean()))


@pytest.mark.parametrize("spatial", SPATIAL)
def test_baseline_of_cross_entropy(spatial):
    """The entropy of the mean label; each sample's labels count 1 together."""
    target = labels_with_gaps((B, *spatial))
    shares = [0.0] * C
    for sample in target.tolist():
        labels = [int(y) for y in naive.leaves(sample) if y != -100]
        for y in labels:
            shares[y] += 1 / len(labels)
    loss = as_loss(None)
    found = loss.baseline(loss.measure(randn(M, B, C, *spatial), target).parts)
    assert found.item() == pytest.approx(naive.entropy([s / sum(shares) for s in shares]), rel=1e-6)


def test_baseline_of_multi_label():
    target = torch.randint(2, (B, C))
    frequencies = [sum(row[c] for row in target.tolist()) / B for c in range(C)]
    loss = as_loss(nn.BCEWithLogitsLoss())
    found = loss.baseline(loss.measure(randn(M, B, C), target).parts)
    expected = sum(naive.entropy([p, 1 - p]) for p in frequencies) / C
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_centred_predictions_are_those_with_the_other_modalities_at_their_mean():
    features, weights, bias = [randn(B, d) for d in (3, 2)], [randn(C, d) for d in (3, 2)], randn(C)
    parts = torch.stack([z @ w.T + bias / 2 for z, w in zip(features, weights, strict=True)])
    found = centred_predictions(parts, parts.sum(0))
    for m in range(2):
        own, other = features[m], features[1 - m]
        for i in range(B):
            for c in range(C):
                expected = (
                    float(bias[c]) + float(own[i] @ weights[m][c]) + float(other.mean(0) @ weights[1 - m][c])
                )
                assert found[m, i, c].item() == pytest.approx(expected, rel=1e-12)
