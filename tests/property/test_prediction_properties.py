"""What must hold for OPM whatever the scores: bounds, who is dropped, who keeps what, at which rate."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

import balanceopt as bo
from balanceopt.functional import discrepancy_ratio, drop_probability
from balanceopt.prediction._drop import rescale_factors, sample_kept
from tests.models import Concat, watch

REDUCTIONS = st.sampled_from(["mean_of_ratios", "ratio_of_means"])
PROBABILITY = st.floats(0, 1, width=32)
SEEDS = st.integers(0, 2**32)


def vectors(low, high, min_size=2, max_size=6):
    numbers = st.floats(low, high, width=32)
    return st.lists(numbers, min_size=min_size, max_size=max_size).map(
        lambda x: torch.tensor(x, dtype=torch.float32)
    )


scores = vectors(0, 64)
qs = vectors(0, 1)


def followed(score, *, q_base=0.5, lam=0.5, ratio="mean_of_ratios", count=None):
    """The drop probabilities after these summed scores."""
    modulator = bo.OPM(watch(Concat(len(score))), q_base=q_base, lam=lam, ratio=ratio)
    count = torch.full_like(score, 64) if count is None else count
    state = modulator.state_dict()
    if (score > 0).any():
        modulator.load_state_dict({**state, "pending": torch.stack([score, count])})
    modulator.update()
    return modulator.q


@given(scores, PROBABILITY, st.floats(0, 100), REDUCTIONS)
def test_q_is_a_probability_and_never_that_of_the_weakest(score, q_base, lam, ratio):
    q = followed(score, q_base=q_base, lam=lam, ratio=ratio)
    assert ((q >= 0) & (q <= 1)).all()
    assert (q[score == score.min()] == 0).all()


@given(scores, REDUCTIONS)
def test_who_scores_more_is_dropped_no_less(score, ratio):
    q = followed(score, ratio=ratio)
    order = score.argsort()
    assert (q[order].diff() >= -1e-5).all()


@given(scores, REDUCTIONS, st.randoms(use_true_random=False))
def test_permuting_modalities_permutes_q(score, ratio, random):
    order = random.sample(range(len(score)), len(score))
    torch.testing.assert_close(followed(score[order], ratio=ratio), followed(score, ratio=ratio)[order])


@given(vectors(0.125, 64), st.lists(st.booleans(), min_size=6, max_size=6))
def test_modalities_that_nobody_has_are_left_out(score, here):
    present = torch.tensor(here[: len(score)])
    if present.sum() < 2:
        return
    q = followed(torch.where(present, score, 0), count=torch.where(present, 64.0, 0))
    alone = followed(score[present])
    torch.testing.assert_close(q[present], alone)
    assert (q[~present] == 0).all()


@given(scores, st.integers(1, 40), SEEDS, REDUCTIONS)
def test_no_sample_loses_all_and_the_weakest_loses_none(score, samples, seed, ratio):
    q = followed(score, q_base=1.0, lam=10.0, ratio=ratio)
    kept = sample_kept(q, samples, torch.Generator().manual_seed(seed))
    assert kept.any(0).all()
    assert kept[score == score.min()].all()


@given(qs, st.integers(0, 40), SEEDS, st.data())
def test_not_even_where_every_q_is_high_or_some_modalities_are_missing(q, samples, seed, data):
    here = data.draw(st.lists(st.booleans(), min_size=len(q) * samples, max_size=len(q) * samples))
    present = torch.tensor(here, dtype=torch.bool).view(len(q), samples)
    kept = sample_kept(q, samples, torch.Generator().manual_seed(seed), present)
    assert kept.shape == (len(q), samples)
    assert ((kept & present).any(0) == present.any(0)).all()


@given(qs, SEEDS)
def test_masks_are_a_function_of_the_generator(q, seed):
    first, second = (sample_kept(q, 20, torch.Generator().manual_seed(seed)) for _ in range(2))
    assert torch.equal(first, second)
    assert first[q == 0].all()


@given(PROBABILITY, st.integers(0, 50))
def test_the_rate_of_drops_is_q(rate, seed):
    q = torch.tensor([rate, 0.0, rate / 2])
    kept = sample_kept(q, 4000, torch.Generator().manual_seed(seed))
    # Four and a half standard deviations of a mean of 4000.
    assert ((~kept).float().mean(1) - q).abs().max() < 4.5 * 0.5 / 4000**0.5


@given(qs, vectors(1, 512, min_size=6, max_size=6))
def test_rescaling_keeps_the_mean(q, widths):
    d = widths[: len(q)]
    official = rescale_factors(q, "official", d)
    assert official is not None
    if (d * q).sum() < d.sum():
        theta = (d * q).sum() / d.sum()
        torch.testing.assert_close(official * (1 - theta), torch.ones(len(q)), rtol=1e-3, atol=1e-3)
    assert torch.isfinite(official).all()


@given(vectors(0.125, 64))
def test_q_is_the_published_rule_of_the_ratios(score):
    ratio = discrepancy_ratio(score / 64)
    expected = drop_probability(ratio).masked_fill(score == score.min(), 0)
    torch.testing.assert_close(followed(score), expected)


@given(st.integers(2, 6), st.integers(1, 12), SEEDS)
def test_in_a_model_every_sample_reaches_the_fusion(modalities, samples, seed):
    model = Concat(modalities)
    modulator = bo.OPM(watch(model), q_base=1.0, seed=seed)
    labels = torch.zeros(samples, dtype=torch.long)
    seen = []
    model.head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for _ in range(3):
        inputs = [torch.randn(samples, next(e.parameters()).shape[1]) for e in model.encoders.values()]
        torch.nn.functional.cross_entropy(model(*inputs), labels).backward()
    assert all((x != 0).any(1).all() for x in seen)
    assert ((modulator.q >= 0) & (modulator.q <= 1)).all()
