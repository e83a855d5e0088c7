"""linear_logits, true_class_score, discrepancy_ratio, modal_significance."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from balanceopt.functional import (
    discrepancy_ratio,
    feature_entropy,
    linear_logits,
    modal_significance,
    significance_from_baseline,
    true_class_score,
)

# linear_logits


def a_head(widths=(4, 3, 1), classes=5, size=6, dtype=torch.float32):
    features = [torch.randn(size, d, dtype=dtype) for d in widths]
    return features, torch.randn(classes, sum(widths), dtype=dtype), torch.randn(classes, dtype=dtype)


@pytest.mark.parametrize("widths", [(4,), (4, 3), (4, 3, 1), (2, 2, 2, 2, 2, 2)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_logits_add_up_to_the_joint_logits(widths, with_bias):
    features, weight, bias = a_head(widths, dtype=torch.float64)
    bias = bias if with_bias else None
    logits = linear_logits(features, weight, bias)
    assert logits.shape == (len(widths), 6, 5)
    joint = F.linear(torch.cat(features, 1), weight, bias)
    torch.testing.assert_close(logits.sum(0), joint, rtol=1e-12, atol=1e-12)


def test_each_modality_has_its_own_columns_and_a_share_of_the_bias():
    features, weight, bias = a_head((4, 3))
    logits = linear_logits(features, weight, bias)
    torch.testing.assert_close(logits[0], features[0] @ weight[:, :4].T + bias / 2)
    torch.testing.assert_close(logits[1], features[1] @ weight[:, 4:].T + bias / 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_of_the_features_is_kept(dtype):
    features, weight, bias = a_head()
    logits = linear_logits([z.to(dtype) for z in features], weight, bias)
    assert logits.dtype == dtype


def test_nothing_records_gradients_and_nothing_is_changed():
    features, weight, bias = a_head()
    weight.requires_grad_()
    before = [z.clone() for z in features]
    assert not linear_logits(features, weight, bias).requires_grad
    assert all(map(torch.equal, features, before))


def test_empty_batch():
    assert linear_logits([torch.ones(0, 4), torch.ones(0, 3)], torch.ones(5, 7)).shape == (2, 0, 5)


def test_widths_that_do_not_add_up():
    with pytest.raises(ValueError, match=r"7 columns of `weight`. Found widths \[4, 4\]"):
        linear_logits([torch.ones(2, 4), torch.ones(2, 4)], torch.ones(5, 7))


def test_no_features():
    with pytest.raises(ValueError, match=r"one tensor per modality. Found none"):
        linear_logits([], torch.ones(5, 7))


# true_class_score


def test_score_is_the_summed_probability_of_the_labels():
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    assert true_class_score(logits, torch.tensor([1, 0])).item() == pytest.approx(0.75 + 0.5)


def test_leading_dimensions_are_kept():
    logits, labels = torch.randn(2, 3, 8, 5), torch.randint(5, (8,))
    score = true_class_score(logits, labels)
    assert score.shape == (2, 3)
    torch.testing.assert_close(score[1, 2], true_class_score(logits[1, 2], labels))


@pytest.mark.parametrize("ignore_index", [-100, -1, 3])
def test_ignored_rows_do_not_count(ignore_index):
    logits, labels = torch.randn(6, 5), torch.tensor([0, 1, 2, 4, 0, 1])
    expected = true_class_score(logits[:4], labels[:4])
    labels[4:] = ignore_index
    torch.testing.assert_close(true_class_score(logits, labels, ignore_index), expected)


def test_no_valid_row_and_no_row_score_zero():
    assert true_class_score(torch.randn(3, 4), torch.full((3,), -100)).item() == 0
    assert true_class_score(torch.randn(2, 0, 4), torch.empty(0, dtype=torch.long)).tolist() == [0, 0]


def test_soft_labels_weigh_the_probabilities():
    logits = torch.randn(4, 3)
    soft = torch.rand(4, 3).softmax(1)
    expected = (logits.softmax(1) * soft).sum()
    torch.testing.assert_close(true_class_score(logits, soft), expected)
    torch.testing.assert_close(
        true_class_score(logits, torch.eye(3)[torch.tensor([0, 2, 1, 1])]),
        true_class_score(logits, torch.tensor([0, 2, 1, 1])),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_score_keeps_the_dtype_and_reduces_in_a_wider_one(dtype):
    logits = torch.zeros(3000, 2, dtype=dtype)
    score = true_class_score(logits, torch.zeros(3000, dtype=torch.long))
    assert score.dtype == dtype
    assert score.item() == pytest.approx(1500, rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.uint8, torch.int64])
def test_integer_labels_of_any_width(dtype):
    logits = torch.randn(3, 4)
    labels = torch.tensor([3, 0, 1])
    torch.testing.assert_close(true_class_score(logits, labels.to(dtype)), true_class_score(logits, labels))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 4]), r"lie in \[0, 4\).*Found labels from 0 to 4"),
        (torch.tensor([0, -1]), "Found labels from -1 to 0"),
        (torch.tensor([0.0, 1.0]), "class indices of shape"),
        (torch.tensor([True, False]), "class indices of shape"),
        (torch.zeros(2, 3), "one column for each of the 4 classes"),
        (torch.zeros(2, 4, dtype=torch.long), "class indices of shape"),
        (torch.tensor([0, 1, 2]), r"shape \(..., B, C\)"),
    ],
)
def test_labels_that_do_not_fit(labels, message):
    with pytest.raises(ValueError, match=message):
        true_class_score(torch.randn(2, 4), labels)


def test_scores_that_are_not_finite_are_told_by_the_result():
    logits = torch.tensor([[0.0, float("nan")], [0.0, 0.0]])
    assert not torch.isfinite(true_class_score(logits, torch.tensor([0, 0])))


# discrepancy_ratio


def test_two_modalities_have_reciprocal_ratios():
    for reduction in ("mean_of_ratios", "ratio_of_means"):
        ratio = discrepancy_ratio(torch.tensor([3.0, 1.5]), reduction)
        torch.testing.assert_close(ratio, torch.tensor([2.0, 0.5]))


def test_three_modalities():
    scores = torch.tensor([4.0, 2.0, 1.0])
    torch.testing.assert_close(discrepancy_ratio(scores), torch.tensor([3.0, 1.25, 0.375]))
    torch.testing.assert_close(
        discrepancy_ratio(scores, "ratio_of_means"), torch.tensor([4 / 1.5, 2 / 2.5, 1 / 3])
    )


def test_equal_scores_dominate_nobody():
    ratio = discrepancy_ratio(torch.full((5,), 0.3))
    assert (ratio <= 1).all()
    torch.testing.assert_close(ratio, torch.ones(5))


def test_a_single_modality_has_ratio_one():
    assert discrepancy_ratio(torch.tensor([0.0])).tolist() == [1.0]


def test_a_zero_score_is_clamped():
    ratio = discrepancy_ratio(torch.tensor([1.0, 0.0]))
    assert torch.isfinite(ratio).all()
    assert ratio[0] > 1e7 > 1 > ratio[1] > 0


def test_absent_modalities_are_left_out():
    present = torch.tensor([True, False, True])
    for reduction in ("mean_of_ratios", "ratio_of_means"):
        ratio = discrepancy_ratio(torch.tensor([4.0, 99.0, 2.0]), reduction, present)
        assert ratio.tolist() == [2.0, 1.0, 0.5]
    nobody = torch.zeros(3, dtype=torch.bool)
    assert discrepancy_ratio(torch.ones(3), present=nobody).tolist() == [1, 1, 1]
    alone = torch.tensor([False, False, True])
    assert discrepancy_ratio(torch.ones(3), present=alone).tolist() == [1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_ratio_keeps_the_dtype(dtype):
    assert discrepancy_ratio(torch.tensor([2.0, 1.0], dtype=dtype)).dtype == dtype


def test_ratio_does_not_change_its_argument():
    scores = torch.tensor([0.0, 1.0, 2.0])
    discrepancy_ratio(scores)
    assert scores.tolist() == [0, 1, 2]


@pytest.mark.parametrize("scores", [torch.ones(2, 2), torch.tensor(1.0), torch.ones(0)])
def test_scores_of_another_shape(scores):
    with pytest.raises(ValueError, match=r"`scores` should be a dense real tensor of shape \(M,\)"):
        discrepancy_ratio(scores)


def test_unknown_reduction():
    with pytest.raises(ValueError, match="Found reduction = 'sum'"):
        discrepancy_ratio(torch.ones(2), "sum")  # type: ignore[arg-type]


# modal_significance


def significance_by_hand(logits, features, labels, offset):
    counts = torch.bincount(labels, minlength=logits.shape[-1]) / len(labels)
    h_y = -sum(float(p) * math.log(p) for p in counts if p > 0)
    result = []
    for modality_logits, z in zip(logits, features, strict=True):
        ce = torch.nn.functional.cross_entropy(modality_logits, labels).item()
        p = z.softmax(1)
        h_z = -(p * p.log()).sum(1).mean().item()
        result.append((h_y - ce + offset) / h_z)
    return torch.tensor(result)


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_significance_by_hand(offset):
    logits, labels = torch.randn(3, 8, 4), torch.randint(4, (8,))
    features = [torch.randn(8, d) for d in (2, 5, 9)]
    expected = significance_by_hand(logits, features, labels, offset)
    torch.testing.assert_close(modal_significance(logits, features, labels, offset), expected)


def test_significance_leaves_ignored_rows_out():
    logits, labels = torch.randn(2, 8, 4), torch.randint(4, (8,))
    features = [torch.randn(8, 3), torch.randn(8, 5)]
    expected = modal_significance(logits[:, :6], [z[:6] for z in features], labels[:6])
    labels[6:] = -100
    torch.testing.assert_close(modal_significance(logits, features, labels), expected)


def test_significance_adds_up_over_micro_batches():
    logits, labels = torch.randn(1, 8, 4), torch.randint(4, (8,))
    z = torch.randn(8, 3)
    sums = [
        (
            torch.nn.functional.cross_entropy(logits[0, part], labels[part], reduction="sum").view(1),
            feature_entropy(z[part]).sum().view(1),
            torch.tensor([4.0]),
        )
        for part in (slice(0, 4), slice(4, 8))
    ]
    losses, entropy, count = (a + b for a, b in zip(*sums, strict=True))
    baseline = torch.special.entr(torch.bincount(labels, minlength=4) / 8).sum()
    found = significance_from_baseline(losses, entropy, baseline, count)
    torch.testing.assert_close(found, modal_significance(logits, [z], labels))


def test_entropy_of_features():
    assert feature_entropy(torch.zeros(2, 4)).tolist() == pytest.approx([math.log(4)] * 2)
    torch.testing.assert_close(feature_entropy(torch.zeros(2, 2, 2)), feature_entropy(torch.zeros(2, 4)))
    assert feature_entropy(torch.zeros(3)).tolist() == [0, 0, 0]


def test_significance_of_misshapen_arguments():
    with pytest.raises(ValueError, match=r"\(M, B, C\) with M = 1 features"):
        modal_significance(torch.zeros(2, 3, 4), [torch.zeros(3, 2)], torch.zeros(3, dtype=torch.long))
