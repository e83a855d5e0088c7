"""Properties of the AMSS rules."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from balanceopt.functional import (
    inclusion_probabilities,
    inclusion_probabilities_padded,
    keep_ratio,
    kept_units,
    sample_units,
    sample_units_padded,
    systematic_sample,
    systematic_sample_padded,
    unit_importance,
)

# Ties, zeros and sixty orders of magnitude.
IMPORTANCE = st.one_of(
    st.sampled_from([0.0, 1.0, 2.0, 1e-30, 1e30]),
    st.floats(-30, 30).map(lambda x: 10.0**x),
)
UNITS = st.lists(IMPORTANCE, min_size=1, max_size=40)
TENSORS = st.lists(UNITS, min_size=1, max_size=6)
# No subnormal probabilities.
BUDGETS = st.just(0.0) | st.floats(1e-9, 45)
SEEDS = st.integers(0, 2**31)
FLOATS = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pad(rows: list[torch.Tensor], value: float = 0.0) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


@given(st.lists(st.floats(1e-3, 50), min_size=2, max_size=6), st.randoms(use_true_random=False))
def test_keep_ratio_follows_the_modalities_and_favours_the_less_significant(values, random):
    u = torch.tensor(values, dtype=torch.float64)
    order = list(range(len(values)))
    random.shuffle(order)
    ratio = keep_ratio(u)
    torch.testing.assert_close(keep_ratio(u[order]), ratio[order])
    assert bool(((ratio >= 0.1) & (ratio <= 0.9)).all())
    assert bool((ratio[u.argsort()].diff() <= 1e-12).all())
    if bool((ratio > 0.1).all() and (ratio < 0.9).all()):
        torch.testing.assert_close(ratio.sum(), torch.tensor(len(values) - 1.0, dtype=torch.float64))


@given(st.lists(st.floats(-1, 1) | st.just(float("nan")), min_size=2, max_size=5))
def test_keep_ratio_without_a_usable_significance_is_balanced(values):
    u = torch.tensor([0.0, *values])
    assert torch.equal(keep_ratio(u), torch.full((len(u),), (len(u) - 1) / len(u)))


@given(st.integers(1, 5000), st.floats(0, 1))
def test_kept_units_is_the_same_from_a_float_and_a_tensor(n, ratio):
    found = kept_units(n, ratio)
    assert 1 <= found <= n
    assert int(kept_units(n, torch.tensor(ratio, dtype=torch.float64))) == found
    assert kept_units(n, torch.tensor([ratio, 1.0], dtype=torch.float64)).tolist() == [found, n]


@given(SEEDS, FLOATS, st.lists(st.integers(1, 4), min_size=1, max_size=4), st.floats(-10, 10))
def test_unit_importance_is_quadratic_and_adds_up(seed, dtype, shape, exponent):
    grad = (torch.randn(shape, generator=generator(seed), dtype=torch.float64) * 2.0**exponent).to(dtype)
    before = grad.clone()
    for dim in range(grad.dim()):
        found = unit_importance(grad, dim)
        assert found.shape == (shape[dim],)
        torch.testing.assert_close(found.sum().double(), grad.double().square().sum(), rtol=1e-5, atol=1e-30)
        if dtype == torch.float64:
            torch.testing.assert_close(unit_importance(4 * grad, dim), 16 * found)
    assert torch.equal(grad, before)


@given(UNITS, st.integers(0, 50), SEEDS, FLOATS)
def test_sample_units_takes_exactly_k_and_zeros_last(values, k, seed, dtype):
    importance = torch.tensor(values, dtype=torch.float64).to(dtype).nan_to_num(posinf=6e4)
    before = importance.clone()
    mask = sample_units(importance, k, generator(seed))
    assert int(mask.sum()) == min(k, len(values))
    assert int((mask & (importance > 0)).sum()) == min(k, int((importance > 0).sum()))
    assert torch.equal(importance, before)
    strided = torch.stack([importance, importance], 1).flatten()[::2]
    assert torch.equal(sample_units(strided, k, generator(seed)), mask)


@given(UNITS, st.integers(1, 10), SEEDS, st.integers(-20, 20))
def test_sample_units_does_not_depend_on_the_scale(values, k, seed, exponent):
    importance = torch.tensor(values, dtype=torch.float64)
    mask = sample_units(importance, k, generator(seed))
    assert torch.equal(sample_units(importance * 2.0**exponent, k, generator(seed)), mask)


@given(UNITS, SEEDS)
def test_sample_units_grows_with_k(values, seed):
    importance = torch.tensor(values)
    masks = [sample_units(importance, k, generator(seed)) for k in range(len(values) + 1)]
    assert all(bool((small <= large).all()) for small, large in itertools.pairwise(masks))


@given(TENSORS, SEEDS, st.data())
def test_padded_samples_are_those_of_the_loop(tensors, seed, data):
    importance = [torch.tensor(values) for values in tensors]
    sizes = [len(values) for values in tensors]
    k = [data.draw(st.integers(0, n + 2)) for n in sizes]
    loop, shared = generator(seed), generator(seed)
    expected = [sample_units(row, count, loop) for row, count in zip(importance, k, strict=True)]
    uniforms = torch.rand(sum(sizes), dtype=torch.float64, generator=shared).split(sizes)
    found = sample_units_padded(
        pad(importance, value=7.0), torch.tensor(sizes), torch.tensor(k), pad(list(uniforms))
    )
    assert torch.equal(found, pad(expected, value=False))


@given(UNITS, BUDGETS)
def test_inclusion_probabilities_sum_to_the_budget(values, budget):
    importance = torch.tensor(values, dtype=torch.float64)
    before = importance.clone()
    pi = inclusion_probabilities(importance, budget)
    assert torch.equal(importance, before)
    assert bool(((pi >= 0) & (pi <= 1)).all())
    assert bool((pi[importance == 0] == 0).all())
    total = min(budget, int((importance > 0).sum()))
    torch.testing.assert_close(pi.sum(), torch.tensor(total, dtype=torch.float64), rtol=1e-12, atol=1e-300)
    # Proportional below the cap: the ratio of probability to importance is largest there, and the same for all.
    free = (pi > 0) & (pi < 1)
    if bool(free.any()):
        ratio = (pi / importance)[free]
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-9, atol=0)
        assert bool((importance[pi == 1] * ratio[0] >= 1 - 1e-9).all())


@given(UNITS, BUDGETS, st.randoms(use_true_random=False))
def test_inclusion_probabilities_follow_the_units(values, budget, random):
    importance = torch.tensor(values, dtype=torch.float64)
    order = list(range(len(values)))
    random.shuffle(order)
    pi = inclusion_probabilities(importance, budget)
    torch.testing.assert_close(
        inclusion_probabilities(importance[order], budget), pi[order], rtol=1e-12, atol=0
    )
    torch.testing.assert_close(inclusion_probabilities(importance * 8, budget), pi, rtol=1e-12, atol=0)


@given(TENSORS, st.data())
def test_padded_probabilities_are_those_of_the_loop(tensors, data):
    importance = [torch.tensor(values, dtype=torch.float64) for values in tensors]
    budgets = [data.draw(st.floats(0, len(values) + 1)) for values in tensors]
    expected = [inclusion_probabilities(row, b) for row, b in zip(importance, budgets, strict=True)]
    found = inclusion_probabilities_padded(pad(importance), torch.tensor(budgets, dtype=torch.float64))
    assert torch.equal(found, pad(expected))


@given(UNITS, st.integers(0, 45), SEEDS, st.sampled_from([torch.float32, torch.float64]))
def test_systematic_sample_has_the_size_of_an_integer_budget(values, budget, seed, dtype):
    importance = torch.tensor(values, dtype=dtype)
    pi = inclusion_probabilities(importance, budget)
    before = pi.clone()
    mask = systematic_sample(pi, generator(seed))
    assert int(mask.sum()) == min(budget, int((importance > 0).sum()))
    assert not bool(mask[pi == 0].any())
    assert bool(mask[pi >= 1].all())
    assert torch.equal(pi, before)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), SEEDS)
def test_systematic_sample_rounds_the_sum(values, seed):
    pi = torch.tensor(values, dtype=torch.float64)
    size, total = int(systematic_sample(pi, generator(seed)).sum()), float(pi.sum())
    # The line has 2^40 steps per unit.
    assert total - 1 - 1e-5 < size < total + 1 + 1e-5
    if abs(total - round(total)) < 0.99e-5:
        assert size == round(total)


@given(TENSORS, SEEDS, st.data())
def test_padded_systematic_samples_are_those_of_the_loop(tensors, seed, data):
    rows = [inclusion_probabilities(torch.tensor(v), data.draw(st.floats(0, len(v)))) for v in tensors]
    loop, shared = generator(seed), generator(seed)
    expected = [systematic_sample(row, loop) for row in rows]
    sizes = [len(row) + 1 for row in rows]
    draws = torch.rand(sum(sizes), dtype=torch.float64, generator=shared).split(sizes)
    found = systematic_sample_padded(
        pad(rows), torch.stack([d[0] for d in draws]), pad([d[1:] for d in draws], value=0.5)
    )
    assert torch.equal(found, pad(expected, value=False))
