"""The pure rules and the monitor against the papers' formulas, written naively."""

from __future__ import annotations

import pytest
import torch

from balanceopt.functional import discrepancy_ratio, linear_logits, modulation_coefficient, true_class_score
from tests.models import Concat, batch, train_step, watch
from tests.reference import ogm


def example(widths, classes=4, size=7):
    features = [torch.randn(size, d, dtype=torch.float64) for d in widths]
    weight = torch.randn(classes, sum(widths), dtype=torch.float64)
    return features, weight, torch.randn(classes, dtype=torch.float64), torch.randint(classes, (size,))


@pytest.mark.parametrize("widths", [(3, 2), (3, 2, 4), (1, 1, 1, 1, 1, 1)])
def test_scores(widths):
    features, weight, bias, labels = example(widths)
    labels[2] = -100
    found = true_class_score(linear_logits(features, weight, bias), labels)
    blocks = weight.split(widths, 1)
    expected = [ogm.score_eq8(z, w, bias, len(widths), labels) for z, w in zip(features, blocks, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


def test_ratio_of_two():
    for scores in ([3.0, 1.5], [0.2, 7.1], [1.0, 1.0]):
        found = discrepancy_ratio(torch.tensor(scores, dtype=torch.float64))
        assert found.tolist() == pytest.approx(ogm.ratio_eq9(*scores), rel=1e-14)


@pytest.mark.parametrize("modalities", [2, 3, 6])
def test_ratio_of_many(modalities):
    scores = torch.rand(modalities, dtype=torch.float64) + 0.01
    assert discrepancy_ratio(scores).tolist() == pytest.approx(ogm.ratios_eq7(scores.tolist()), rel=1e-13)


@pytest.mark.parametrize(
    ("form", "naive"),
    [("cvpr", ogm.coefficient_a), ("cvpr_v0", ogm.coefficient_b), ("tpami", ogm.coefficient_c)],
)
def test_coefficients(form, naive):
    for alpha in (0.0, 0.1, 0.3, 0.8, 1.0):
        ratios = [0.0, 0.3, 1.0, 1.0 + 1e-9, 1.2, 2.0, 10.0]
        found = modulation_coefficient(torch.tensor(ratios, dtype=torch.float64), alpha, form)
        assert found.tolist() == pytest.approx([naive(r, alpha) for r in ratios], rel=1e-12, abs=1e-15)


def test_standard_deviation_of_the_noise():
    grad = torch.randn(5, 3, 2, dtype=torch.float64)
    assert grad.std(unbiased=False).item() == pytest.approx(ogm.noise_std(grad), rel=1e-12)


@pytest.mark.parametrize("modalities", [2, 3, 6])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_scores_of_the_monitor(modalities, bias):
    """From the hooks of an unchanged model and loop, labels read back from the gradient: max difference 1e-5."""
    model = Concat(modalities, order=range(modalities)[::-1], bias=bias)
    inputs, labels = batch(9, modalities)
    sums = watch_one_step(model, inputs, labels)
    features = model.encode(*inputs)
    blocks = dict(
        zip(model.order, model.head.weight.split([model.widths[i] for i in model.order], 1), strict=True)
    )
    expected = [
        ogm.score_eq8(z, blocks[i], model.head.bias, modalities, labels) for i, z in enumerate(features)
    ]
    assert sums.score.tolist() == pytest.approx(expected, rel=1e-5)
    assert sums.count.tolist() == [9] * modalities


def watch_one_step(model, inputs, labels):
    with watch(model) as monitor:
        scores = monitor.scores()
        with torch.enable_grad():
            train_step(model, inputs, labels)
        return scores.take()
