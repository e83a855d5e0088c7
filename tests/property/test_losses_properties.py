"""What must hold for the score of any loss: scales, permutations, splits of a step, what does not count, dtypes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from threading import Barrier, Thread

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from balanceopt.functional import (
    KeptPredictions,
    as_loss,
    centred_predictions,
    label_set_classes,
    likelihood_score,
    modal_significance,
    quantile_classes,
    row_scores,
    significance_from_baseline,
    true_class_score,
)
from balanceopt.functional import feature_entropy as entropy_of
from balanceopt.functional._targets import as_targets

C = 4


def function(f: Tensor, y: Tensor) -> Tensor:
    return (f - y).abs().sqrt()


@dataclass
class Example:
    predictions: Tensor
    target: Tensor


REGRESSIONS: dict[str, nn.Module] = {
    "mse": nn.MSELoss(),
    "l1": nn.L1Loss(),
    "smooth l1": nn.SmoothL1Loss(beta=0.3),
    "huber": nn.HuberLoss(delta=0.5),
}
LOSSES: dict[str, nn.Module | Callable[[Tensor, Tensor], Tensor]] = {
    "indices": nn.CrossEntropyLoss(),
    "weighted": nn.CrossEntropyLoss(torch.tensor([1.0, 0.5, 3.0, 2.0])),
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.1),
    "soft": nn.CrossEntropyLoss(),
    "dense": nn.CrossEntropyLoss(),
    "multi-label": nn.BCEWithLogitsLoss(),
    "multi-label weighted": nn.BCEWithLogitsLoss(
        torch.tensor([1.0, 0.5, 3.0, 2.0]), pos_weight=torch.tensor([2.0, 1.0, 0.1, 5.0])
    ),
    **REGRESSIONS,
    "function": function,
}
names, regressions = st.sampled_from(list(LOSSES)), st.sampled_from(list(REGRESSIONS))
seeds, sizes = st.integers(0, 2**31), st.integers(2, 9)


def example(name: str, seed: int, samples: int, modalities: int = 3) -> Example:
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    if name == "soft":
        return Example(randn(modalities, samples, C), randn(samples, C).softmax(1))
    if name == "dense":
        with_gaps = torch.randint(C, (samples, 3), generator=g)
        with_gaps[:, 1:][torch.rand(samples, 2, generator=g) < 0.3] = -100
        return Example(randn(modalities, samples, C, 3), with_gaps)
    if name.startswith("multi"):
        return Example(randn(modalities, samples, C), torch.randint(2, (samples, C), generator=g))
    if name in REGRESSIONS or name == "function":
        return Example(randn(modalities, samples, 2), randn(samples, 2))
    return Example(randn(modalities, samples, C), torch.randint(C, (samples,), generator=g))


@given(names, seeds, sizes)
def test_scores_lie_above_zero_and_up_to_one_and_inputs_stay(name, seed, samples):
    x = example(name, seed, samples)
    before = x.predictions.clone(), x.target.clone()
    score = likelihood_score(x.predictions, x.target, LOSSES[name])
    assert score.shape == x.predictions.shape[:2]
    assert ((score > 0) & (score <= 1)).all()
    assert torch.equal(before[0], x.predictions)
    assert torch.equal(before[1], x.target)


@given(names, seeds, sizes)
def test_permuting_samples_and_modalities_permutes_scores(name, seed, samples):
    x = example(name, seed, samples)
    g = torch.Generator().manual_seed(seed)
    rows, order = torch.randperm(samples, generator=g), torch.randperm(3, generator=g)
    score = likelihood_score(x.predictions, x.target, LOSSES[name])
    permuted = likelihood_score(x.predictions[order][:, rows], x.target[rows], LOSSES[name])
    torch.testing.assert_close(permuted, score[order][:, rows])


@given(regressions, seeds, sizes, st.floats(0.01, 100), st.booleans(), st.floats(-100, 100))
def test_the_unit_and_the_origin_of_numbers_change_no_score(name, seed, samples, a, flip, b):
    x, loss = example(name, seed, samples), REGRESSIONS[name]
    a = -a if flip else a
    score = likelihood_score(x.predictions, x.target, loss)
    if isinstance(loss, nn.SmoothL1Loss):  # the width of the parabola is a number in the target's unit
        loss = nn.SmoothL1Loss(beta=loss.beta * abs(a))
    elif isinstance(loss, nn.HuberLoss):
        loss = nn.HuberLoss(delta=loss.delta * abs(a))
    moved = likelihood_score(x.predictions * a + b, x.target * a + b, loss)
    torch.testing.assert_close(moved, score, rtol=1e-6, atol=1e-9)


@given(st.sampled_from(["mse", "l1"]), seeds, sizes)
def test_a_prediction_that_knows_nothing_scores_one_over_e_and_a_perfect_one_scores_one(name, seed, samples):
    x = example(name, seed, samples)
    y = x.target
    constant = y.mean(0) if name == "mse" else y.quantile(0.5, 0)
    loss = as_loss(REGRESSIONS[name])
    predictions = torch.stack([constant.expand_as(y), y])
    measured = loss.measure(predictions, y)
    baseline = loss.baseline(measured.parts)
    torch.testing.assert_close(measured.values[0].mean() / baseline, torch.ones_like(baseline))
    assert (likelihood_score(predictions, y, REGRESSIONS[name])[1] == 1).all()


@given(names, seeds, sizes)
def test_no_constant_prediction_has_a_smaller_loss_than_the_baseline(name, seed, samples):
    if name in ("smooth l1", "huber", "function"):
        return  # the median will do there; a function has no best constant
    loss, x = as_loss(LOSSES[name]), example(name, seed, samples)
    constants = x.predictions[:, :1].expand_as(x.predictions)
    if name == "dense":
        constants = constants[..., :1].expand_as(x.predictions)
    measured = loss.measure(constants, x.target)
    # The parts of a likelihood are float32.
    assert (measured.values.mean(1) >= loss.baseline(measured.parts) * (1 - 1e-5)).all()


@given(
    seeds,
    st.integers(0, 9),
    st.integers(1, 5),
    st.sampled_from([torch.float32, torch.float64, torch.float16]),
)
def test_hard_cross_entropy_is_equation_8_bit_for_bit(seed, samples, modalities, dtype):
    x = example("indices", seed, samples, modalities)
    predictions, target = x.predictions.to(dtype), x.target
    target[:2] = -100
    weighted = nn.CrossEntropyLoss(torch.tensor([0.3, 0.7, 3.0, 2.0]))
    for loss in (None, nn.CrossEntropyLoss(), weighted):
        expected, log_likelihood = row_scores(predictions, as_targets(target, C))
        assert torch.equal(likelihood_score(predictions, target, loss), expected.to(dtype))
        measured = as_loss(loss).measure(predictions, target)
        assert torch.equal(measured.values, -log_likelihood)
        assert torch.equal(measured.parts, as_targets(target, C).class_counts())
    if dtype != torch.float16:
        total = likelihood_score(predictions, target, None).sum(-1)
        assert torch.equal(total, true_class_score(predictions, target))


@given(seeds, sizes)
def test_one_logit_of_plain_cross_entropy_stands_for_two_classes(seed, samples):
    x = example("indices", seed, samples)
    logit, target = x.predictions[..., :1], x.target % 2
    pair = torch.cat([torch.zeros_like(logit), logit], -1)
    assert torch.equal(likelihood_score(logit, target, None), likelihood_score(pair, target, None))


@given(seeds, sizes, st.floats(0.01, 100))
def test_only_ratios_of_weights_matter(seed, samples, factor):
    dense, multi = example("dense", seed, samples), example("multi-label", seed, samples)
    weight = torch.tensor([1.0, 0.5, 3.0, 2.0], dtype=torch.float64)
    for x, kind in ((dense, nn.CrossEntropyLoss), (multi, nn.BCEWithLogitsLoss)):
        score = likelihood_score(x.predictions, x.target, kind(weight))
        torch.testing.assert_close(likelihood_score(x.predictions, x.target, kind(weight * factor)), score)


@given(seeds, sizes, st.floats(0.01, 100))
def test_a_weight_of_a_class_and_of_the_positive_side_are_one(seed, samples, weight):
    """Binary labels at several positions, as two classes and as one logit for each position."""
    x = example("multi-label", seed, samples)
    pairs = torch.stack([torch.zeros_like(x.predictions), x.predictions], 2)
    two = likelihood_score(
        pairs, x.target, nn.CrossEntropyLoss(torch.tensor([1.0, weight], dtype=torch.float64))
    )
    one = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([weight], dtype=torch.float64))
    torch.testing.assert_close(likelihood_score(x.predictions, x.target, one), two)


@given(seeds, sizes)
def test_what_does_not_count_never_matters(seed, samples):
    """Ignored positions, classes of weight 0, labels of weight 0: whatever stands there, NaN too."""
    x = example("dense", seed, samples)
    target = x.target.clone()
    target[:, 1], target[0] = -100, -100
    score = likelihood_score(x.predictions, target, nn.CrossEntropyLoss())
    shorter = likelihood_score(x.predictions[..., ::2], target[:, ::2], nn.CrossEntropyLoss())
    torch.testing.assert_close(score, shorter)
    assert (score[:, 0] == 0).all()
    noise = x.predictions.clone()
    noise[..., 1], noise[:, 0] = math.nan, math.inf
    assert torch.equal(likelihood_score(noise, target, nn.CrossEntropyLoss()), score)

    without = nn.CrossEntropyLoss(torch.tensor([1.0, 1.0, 1.0, 0.0]))
    dropped = torch.where(target == 3, -100, target)
    expected = likelihood_score(x.predictions, dropped, nn.CrossEntropyLoss())
    torch.testing.assert_close(likelihood_score(x.predictions, target, without), expected)

    y = example("multi-label", seed, samples)
    masked = nn.BCEWithLogitsLoss(torch.tensor([1.0, 0.0, 1.0, 1.0]))
    expected = likelihood_score(y.predictions[..., [0, 2, 3]], y.target[:, [0, 2, 3]], nn.BCEWithLogitsLoss())
    y.predictions[..., 1] = math.nan
    torch.testing.assert_close(likelihood_score(y.predictions, y.target, masked), expected)


@given(names, seeds, sizes)
def test_a_prediction_that_is_not_finite_spoils_its_own_score_alone(name, seed, samples):
    if name == "function":
        return  # its scale is a mean over all losses
    x = example(name, seed, samples)
    score = likelihood_score(x.predictions, x.target, LOSSES[name])
    x.predictions[1, 0] = math.nan
    spoilt = likelihood_score(x.predictions, x.target, LOSSES[name])
    other = torch.ones_like(score, dtype=torch.bool)
    other[1, 0] = False
    assert spoilt[1, 0].isnan()
    assert torch.equal(spoilt[other], score[other])


@given(names, seeds, sizes)
def test_any_leading_dimensions(name, seed, samples):
    x = example(name, seed, samples, 6)
    loss = LOSSES[name]
    score = likelihood_score(x.predictions, x.target, loss)
    folded = likelihood_score(x.predictions.unflatten(0, (2, 3)), x.target, loss)
    assert torch.equal(folded.flatten(0, 1), score)
    if name != "function":
        torch.testing.assert_close(likelihood_score(x.predictions[2], x.target, loss), score[2])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_is_the_predictions_and_the_arithmetic_float32_or_wider(name, dtype):
    x = example(name, 0, 9)
    half, wide = x.predictions.to(dtype), x.predictions.to(dtype).double()
    target = x.target.to(dtype) if name in REGRESSIONS else x.target
    score = likelihood_score(half, target, LOSSES[name])
    expected = likelihood_score(wide, target.double() if name in REGRESSIONS else target, LOSSES[name])
    assert score.dtype == dtype
    if name != "function":  # computes in the dtype that it is given
        torch.testing.assert_close(
            score.double(), expected, rtol=max(2 * torch.finfo(dtype).eps, 1e-5), atol=1e-7
        )


@pytest.mark.parametrize("name", ["mse", "l1", "smooth l1", "huber", "multi-label", "indices"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_integers_are_numbers(name, dtype):
    x = example(name, 0, 9)
    predictions = (x.predictions * 4).round().abs()
    target = x.target if name in ("multi-label", "indices") else (x.target * 3).round().abs()
    expected = likelihood_score(
        predictions.float(), target.float() if name != "indices" else target, LOSSES[name]
    )
    found = likelihood_score(predictions.to(dtype), target.to(dtype), LOSSES[name])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", LOSSES)
def test_empty_batches_and_gradients(name):
    x = example(name, 0, 5)
    empty = likelihood_score(x.predictions[:, :0], x.target[:0], LOSSES[name])
    assert empty.shape == (3, 0)
    assert not likelihood_score(x.predictions.requires_grad_(), x.target, LOSSES[name]).requires_grad


@pytest.mark.parametrize("name", REGRESSIONS)
@pytest.mark.parametrize("positions", [(), (5,)])
def test_one_sample_tells_no_scale(name, positions):
    predictions, target = torch.randn(3, 1, 2, *positions), torch.randn(1, 2, *positions)
    assert likelihood_score(predictions, target, REGRESSIONS[name]).isnan().all()
    assert likelihood_score(predictions, target, REGRESSIONS[name], baseline=1.0).isfinite().all()


@given(regressions, sizes, st.floats(-1e6, 1e6), st.sampled_from([torch.float32, torch.float64]))
def test_equal_targets_tell_no_scale(name, samples, value, dtype):
    target = torch.full((samples, 2), value, dtype=dtype)
    assert likelihood_score(target[None] + 1, target, REGRESSIONS[name]).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_variance_keeps_its_digits_far_from_the_origin(dtype):
    y = torch.randn(1000, dtype=dtype) + 1e4
    loss = as_loss(nn.MSELoss())
    parts = [loss.measure(x[None], x).parts for x in y.split(100)]
    expected = y.double().var(correction=0)
    torch.testing.assert_close(loss.baseline(loss.merge(parts)), expected, rtol=1e-6, atol=0)


@given(st.sampled_from(["multi-label", "multi-label weighted"]), seeds, sizes)
def test_the_baseline_of_labels_is_the_loss_of_their_frequencies(name, seed, samples):
    x, loss = example(name, seed, samples), as_loss(LOSSES[name])
    parts = loss.measure(x.predictions, x.target).parts
    positive, negative = parts.double().chunk(2)
    constant = torch.logit(positive / (positive + negative)).expand_as(x.predictions)
    measured = loss.measure(constant, x.target)
    torch.testing.assert_close(measured.values[0].mean(), loss.baseline(measured.parts))


@pytest.mark.parametrize("name", LOSSES)
def test_no_value_is_read_on_a_device(name):
    """A tensor on the meta device has no values: reading one, which would synchronise with another, fails there."""
    x = example(name, 0, 5)
    predictions, target = x.predictions.to("meta"), x.target.to("meta")
    loss = LOSSES[name]
    if isinstance(loss, nn.Module):
        loss = copy.deepcopy(loss).to("meta")
    assert likelihood_score(predictions, target, loss).shape == (3, 5)
    joint = None if name == "dense" else predictions.sum(0)
    step = (
        KeptPredictions.of(predictions, target, joint) + KeptPredictions.of(predictions, target, joint)
    ).losses(as_loss(loss))
    assert (step.score.shape, step.scale.shape) == ((3, 10), ())


# A step: micro-batches and ranks


@given(names, seeds, sizes, st.data())
def test_parts_of_the_baseline_are_those_of_one_batch_for_any_split(name, seed, samples, data):
    x, loss = example(name, seed, samples), as_loss(LOSSES[name])
    cuts = sorted(data.draw(st.lists(st.integers(0, samples), max_size=3)))
    pieces = zip(x.predictions.tensor_split(cuts, 1), x.target.tensor_split(cuts), strict=True)
    merged = loss.merge([loss.measure(f, y).parts for f, y in pieces])
    whole = loss.measure(x.predictions, x.target).parts
    torch.testing.assert_close(loss.baseline(merged), loss.baseline(whole), equal_nan=True)


def kept(x: Example, joint: Tensor, present: Tensor, cuts: list[int]) -> KeptPredictions:
    parts = [
        t.tensor_split(cuts, dim) for t, dim in ((x.predictions, 1), (x.target, 0), (joint, 0), (present, 1))
    ]
    batches = [KeptPredictions.of(f, y, j, p) for f, y, j, p in zip(*parts, strict=True)]
    total = batches[0]
    for batch in batches[1:]:
        total = total + batch
    return total


@given(st.sampled_from([*REGRESSIONS, "function"]), seeds, sizes, st.data())
def test_micro_batches_equal_one_batch(name, seed, samples, data):
    x, loss = example(name, seed, samples), as_loss(LOSSES[name])
    cuts = sorted(data.draw(st.lists(st.integers(0, samples), max_size=3)))
    present = torch.rand(3, samples, generator=torch.Generator().manual_seed(seed)) < 0.8
    joint = x.predictions.sum(0) + 2
    split, whole = (kept(x, joint, present, c).losses(loss) for c in (cuts, []))
    for field in ("losses", "counted", "baseline", "scale", "in_units", "score"):
        torch.testing.assert_close(getattr(split, field), getattr(whole, field), equal_nan=True)
    if present.all():
        centred = centred_predictions(x.predictions, joint)
        torch.testing.assert_close(whole.score, likelihood_score(centred, x.target, LOSSES[name]))


class Ranks:
    """Collectives among threads."""

    def __init__(self, size: int) -> None:
        self.barrier, self.given = Barrier(size), [torch.empty(0)] * size

    def gathered(self, rank: int, tensor: Tensor) -> list[Tensor]:
        self.given[rank] = tensor
        self.barrier.wait(60)
        result = list(self.given)
        self.barrier.wait(60)
        return result


@pytest.mark.parametrize("name", [*REGRESSIONS, "function"])
@pytest.mark.parametrize("cuts", [[3, 3, 7], [1, 8], [2, 4]])
def test_ranks_equal_one_batch(name, cuts):
    """Ranks of different sizes, one of them without a sample."""
    x, loss = example(name, 1, 8), as_loss(LOSSES[name])
    joint, present = x.predictions.sum(0) + 2, torch.rand(3, 8) < 0.8
    whole = kept(x, joint, present, []).losses(loss)
    parts = [
        t.tensor_split(cuts, dim) for t, dim in ((x.predictions, 1), (x.target, 0), (joint, 0), (present, 1))
    ]
    ranks, results = Ranks(len(cuts) + 1), {}

    def run(rank: int) -> None:
        results[rank] = KeptPredictions.of(*(p[rank] for p in parts)).losses(
            loss,
            lambda t: torch.stack(ranks.gathered(rank, t)).sum(0),
            lambda t: torch.cat(ranks.gathered(rank, t)),
        )

    threads = [Thread(target=run, args=(rank,)) for rank in range(len(cuts) + 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = torch.cat([results[rank].score for rank in range(len(cuts) + 1)], 1)
    torch.testing.assert_close(found, whole.score)
    assert all(torch.equal(r.scale, results[0].scale) for r in results.values())


@given(names, seeds, sizes)
def test_a_step_of_any_loss_has_the_scores_of_its_batch(name, seed, samples):
    x = example(name, seed, samples)
    if name == "dense":
        x.target[0] = -100
    step = KeptPredictions.of(x.predictions, x.target).losses(as_loss(LOSSES[name]))
    torch.testing.assert_close(step.score, likelihood_score(x.predictions, x.target, LOSSES[name]))
    assert torch.equal(step.counted, step.score > 0)


@pytest.mark.parametrize("name", ["mse", "l1"])
def test_samples_of_different_numbers_of_positions_count_once_each(name):
    """The targets of each sample average to its constant, so that the best constant is the middle of these."""
    loss, spread = as_loss(REGRESSIONS[name]), torch.tensor([-1.0, 1.0])
    targets = [(c + spread.repeat(n))[None, None] for c, n in ((0.0, 1), (0.0, 9))]
    parts = [loss.measure(torch.zeros(1, *y.shape), y).parts for y in targets]
    assert loss.baseline(loss.merge(parts)).item() == pytest.approx(1.0)
    far = [(c + spread.repeat(n))[None, None] for c, n in ((0.0, 9), (8.0, 1))]
    parts = [loss.measure(torch.zeros(1, *y.shape), y).parts for y in far]
    # MSE: the variance of 0 and 8, and of the spread. L1: the median is 1, of the first sample's positions.
    expected = 16 + 1 if name == "mse" else (1 + 7) / 2
    assert loss.baseline(loss.merge(parts)).item() == pytest.approx(expected)


@given(seeds, sizes)
def test_centres_are_those_of_the_samples_that_have_the_modality(seed, samples):
    x = example("mse", seed, samples)
    joint = x.predictions.sum(0)
    present = torch.rand(3, samples, generator=torch.Generator().manual_seed(seed)) < 0.6
    present[2] = False
    spoilt = torch.where(present.unsqueeze(2), x.predictions, torch.inf)
    centred = centred_predictions(spoilt, joint, present)
    for m in range(2):
        rows = present[m]
        if rows.any():
            expected = centred_predictions(x.predictions[:, rows], joint[rows])[m]
            torch.testing.assert_close(centred[m][rows], expected)
    assert torch.equal(centred_predictions(x.predictions, joint, present)[2], x.predictions[2])


@given(seeds, sizes, st.floats(-1e3, 1e3))
def test_centring_forgets_the_origin_of_each_part(seed, samples, shift):
    """The parts of a regression share its bias in a way that nothing tells: centred ones do not depend on it."""
    x = example("mse", seed, samples)
    joint = x.predictions.sum(0)
    moved = x.predictions + torch.tensor([shift, -shift, 0.0], dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(centred_predictions(moved, joint), centred_predictions(x.predictions, joint))
    torch.testing.assert_close(centred_predictions(moved, joint).mean(1), joint.mean(0).expand(3, 2))


@given(seeds, sizes)
def test_significance_of_cross_entropy_is_that_of_amss_bit_for_bit(seed, samples):
    x = example("indices", seed, samples)
    logits, features = x.predictions.float(), x.predictions.float().sin()
    measured = as_loss(None).measure(logits, x.target)
    found = significance_from_baseline(
        measured.values.sum(1),
        torch.stack([entropy_of(z) for z in features]).sum(1),
        as_loss(None).baseline(measured.parts),
        torch.full((3,), float(samples)),
    )
    assert torch.equal(found, modal_significance(logits, list(features), x.target))


# Classes of targets


@given(st.lists(st.integers(-50, 50), min_size=1, max_size=60), st.integers(2, 12), seeds)
def test_bins_do_not_depend_on_order_unit_or_origin_and_keep_the_order(values, bins, seed):
    y = torch.tensor(values)
    classes = quantile_classes(y, bins)
    index = classes(y)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(quantile_classes(y[order], bins)(y[order]), index[order])
    assert torch.equal(quantile_classes(y * 4 - 8, bins)(y * 4 - 8), index)  # exact in binary
    assert set(index.tolist()) == set(range(classes.num_classes))
    assert (index[y.argsort()].diff() >= 0).all()
    assert all(len(set(index[y == v].tolist())) == 1 for v in set(values))


@given(st.integers(1, 9), st.integers(2, 9), seeds)
def test_bins_of_different_numbers_have_equal_frequency(each, bins, seed):
    y = torch.randperm(each * bins, generator=torch.Generator().manual_seed(seed))
    assert quantile_classes(y, bins)(y).bincount().tolist() == [each] * bins


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=40), st.integers(1, 9))
def test_label_sets_are_the_most_frequent_ones(rows, most):
    labels = torch.tensor(rows)
    classes = label_set_classes(labels, most)
    index = classes(labels).tolist()
    counts = {row: [tuple(r) for r in rows].count(row) for row in {tuple(r) for r in rows}}
    own = {tuple(row): i for row, i in zip(rows, index, strict=True) if i < most and i < len(classes.sets)}
    assert len(own) == min(most, len(counts)) == len(set(own.values()))
    rest = [counts[row] for row in counts if row not in own]
    assert min(counts[row] for row in own) >= max(rest, default=0)
    ranked = sorted(own, key=own.__getitem__)
    assert [counts[row] for row in ranked] == sorted((counts[row] for row in own), reverse=True)
