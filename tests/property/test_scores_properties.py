"""What must hold for any scores: bounds, permutations, scales, the published facts about ratios."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from balanceopt.functional import (
    discrepancy_ratio,
    drop_probability,
    linear_logits,
    modulation_coefficient,
    true_class_score,
)

REDUCTIONS = st.sampled_from(["mean_of_ratios", "ratio_of_means"])
FORMS = st.sampled_from(["cvpr", "cvpr_v0", "tpami"])


def tensors(low, high, *, min_size=2, max_size=6):
    numbers = st.floats(low, high, allow_nan=False)
    return st.lists(numbers, min_size=min_size, max_size=max_size).map(
        lambda x: torch.tensor(x, dtype=torch.float64)
    )


scores = tensors(1e-6, 1e4)


@given(scores, REDUCTIONS, st.randoms(use_true_random=False))
def test_permuting_modalities_permutes_ratios(s, reduction, random):
    order = random.sample(range(len(s)), len(s))
    torch.testing.assert_close(discrepancy_ratio(s[order], reduction), discrepancy_ratio(s, reduction)[order])


@given(scores, REDUCTIONS, st.floats(1.0, 1e3))
def test_a_common_factor_changes_no_ratio(s, reduction, factor):
    torch.testing.assert_close(discrepancy_ratio(s * factor, reduction), discrepancy_ratio(s, reduction))


@given(scores)
def test_the_ratios_add_up_to_at_least_the_number_of_modalities(s):
    assert discrepancy_ratio(s).sum() >= len(s) - 1e-9


@given(scores, REDUCTIONS)
def test_the_weakest_modality_never_dominates(s, reduction):
    assert discrepancy_ratio(s, reduction)[s.argmin()] <= 1 + 1e-9


@given(scores, REDUCTIONS)
def test_the_order_of_ratios_is_that_of_scores(s, reduction):
    ratio = discrepancy_ratio(s, reduction)
    assert (ratio[s.argsort()].diff() >= -1e-9 * ratio.max()).all()


@given(tensors(1e-6, 1e4, max_size=2), REDUCTIONS)
def test_two_modalities_are_reciprocal(s, reduction):
    ratio = discrepancy_ratio(s, reduction)
    torch.testing.assert_close(ratio.prod(), torch.ones((), dtype=torch.float64))


@given(scores, REDUCTIONS, st.data())
def test_leaving_a_modality_out_is_as_if_it_were_not_there(s, reduction, data):
    out = data.draw(st.integers(0, len(s) - 1))
    present = torch.arange(len(s)) != out
    ratio = discrepancy_ratio(s, reduction, present)
    torch.testing.assert_close(ratio[present], discrepancy_ratio(s[present], reduction))
    assert ratio[out] == 1


@given(tensors(0, 1e30), REDUCTIONS)
def test_any_scores_give_finite_ratios(s, reduction):
    assert torch.isfinite(discrepancy_ratio(s, reduction)).all()


@given(tensors(0, 1e9), st.floats(0, 100), FORMS)
def test_coefficients_lie_between_zero_and_one_and_fall_with_the_ratio(ratio, alpha, form):
    k = modulation_coefficient(ratio, alpha, form)
    assert ((k >= 0) & (k <= 1)).all()
    assert (k[ratio <= 1] == 1).all()
    assert (k[ratio.argsort()].diff() <= 0).all()


@given(scores, st.floats(0.01, 1), FORMS)
def test_the_dominant_modality_has_the_smallest_coefficient(s, alpha, form):
    k = modulation_coefficient(discrepancy_ratio(s), alpha, form)
    # Equal scores sum the same M ratios in another order: a relative rounding of M eps in the ratio, of which at most
    # 5/4 comes through (x / cosh(x - 1)^2 of the form "tpami"), beside a rounding of k itself.
    assert k[s.argmax()] <= k.min() + (1.25 * len(s) + 1) * torch.finfo(k.dtype).eps


@given(tensors(0, 1e9), st.floats(0, 1), st.floats(0, 10))
def test_drop_probabilities_lie_between_zero_and_one_and_grow_with_the_ratio(ratio, q_base, lam):
    q = drop_probability(ratio, q_base, lam)
    assert ((q >= 0) & (q <= 1)).all()
    assert (q[ratio <= 1] == 0).all()
    assert (q[ratio.argsort()].diff() >= 0).all()


@st.composite
def heads(draw):
    widths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))
    rows, classes = draw(st.integers(0, 6)), draw(st.integers(1, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    features = [torch.randn(rows, d, generator=generator, dtype=torch.float64) for d in widths]
    weight = torch.randn(classes, sum(widths), generator=generator, dtype=torch.float64)
    bias = torch.randn(classes, generator=generator, dtype=torch.float64) if draw(st.booleans()) else None
    return features, weight, bias


@given(heads())
def test_uni_modal_logits_add_up_to_the_joint_ones(head):
    features, weight, bias = head
    joint = torch.nn.functional.linear(torch.cat(features, 1), weight, bias)
    torch.testing.assert_close(linear_logits(*head).sum(0), joint)


@given(heads(), st.data())
def test_scores_lie_between_zero_and_the_number_of_valid_rows(head, data):
    logits = linear_logits(*head)
    _, rows, classes = logits.shape
    labels = torch.tensor(
        data.draw(st.lists(st.sampled_from([-100, *range(classes)]), min_size=rows, max_size=rows)),
        dtype=torch.long,
    )
    score = true_class_score(logits, labels)
    assert ((score >= 0) & (score <= (labels != -100).sum() + 1e-9)).all()
    one_hot = torch.eye(classes)[labels.clamp(min=0)] * (labels != -100).unsqueeze(1)
    torch.testing.assert_close(true_class_score(logits, one_hot), score, check_dtype=False)


@given(heads(), st.integers(0, 10**6), st.data())
def test_scores_add_up_over_micro_batches_and_do_not_depend_on_the_order_of_rows(head, seed, data):
    logits = linear_logits(*head)
    _, rows, classes = logits.shape
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=generator)
    cut, order = data.draw(st.integers(0, rows)), torch.randperm(rows, generator=generator)
    whole = true_class_score(logits, labels)
    parts = true_class_score(logits[:, :cut], labels[:cut]) + true_class_score(logits[:, cut:], labels[cut:])
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(true_class_score(logits[:, order], labels[order]), whole)
