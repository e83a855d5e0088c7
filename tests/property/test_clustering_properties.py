"""Properties of the re-learning rules."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from balanceopt.functional import kmeans, minmax_scale, purity, reinit_strength, soft_reinit_

SEEDS = st.integers(0, 2**31)
PAIRS = st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=1, max_size=60)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def features(draw) -> torch.Tensor:
    """Small features with ties: integers on a coarse grid, scaled."""
    rows, width = draw(st.integers(1, 25)), draw(st.integers(1, 4))
    grid = draw(st.sampled_from([1, 3, 1000]))
    x = torch.randint(-grid, grid + 1, (rows, width), generator=generator(draw(SEEDS)))
    return x.double() * draw(st.sampled_from([1e-6, 1.0, 1e6]))


@given(PAIRS)
def test_purity_is_bounded_and_counts_the_majorities(pairs):
    assignments, labels = torch.tensor(pairs).T
    found, n = float(purity(assignments, labels)), len(pairs)
    most_frequent = int(torch.bincount(labels + 5).max())
    clusters = len(assignments.unique())
    assert most_frequent / n - 1e-6 <= found <= 1
    assert found >= clusters / n - 1e-6
    assert purity(labels, labels) == 1


@given(PAIRS, st.permutations(range(11)), st.permutations(range(11)), st.integers(-(10**15), 10**15))
def test_purity_does_not_depend_on_names(pairs, clusters, classes, shift):
    assignments, labels = torch.tensor(pairs).T
    before = assignments.clone(), labels.clone()
    found = purity(assignments, labels)
    renamed = torch.tensor(clusters)[assignments + 5], torch.tensor(classes)[labels + 5]
    assert torch.equal(purity(*renamed), found)
    # Values so wide apart that no table holds them.
    assert torch.equal(purity(renamed[0] * 10**10 + shift, renamed[1] * 10**13 - shift), found)
    assert torch.equal(assignments, before[0])
    assert torch.equal(labels, before[1])


@given(PAIRS, st.randoms(use_true_random=False))
def test_purity_does_not_depend_on_the_order_and_grows_with_finer_clusters(pairs, random):
    assignments, labels = torch.tensor(pairs).T
    shuffled = list(pairs)
    random.shuffle(shuffled)
    assert torch.equal(purity(*torch.tensor(shuffled).T), purity(assignments, labels))
    finer = 2 * assignments + torch.arange(len(pairs)) % 2
    assert purity(finer, labels) >= purity(assignments, labels)


@given(features(), st.data(), SEEDS)
def test_kmeans_ends_where_no_row_would_move(x, data, seed):
    clusters = data.draw(st.integers(1, len(x)))
    before = x.clone()
    result = kmeans(x, clusters, generator=generator(seed), tolerance=0.0)
    assert torch.equal(x, before)
    assert result.iterations < 300
    assert bool(torch.isfinite(result.centroids).all())
    assert bool(((result.assignments >= 0) & (result.assignments < clusters)).all())
    # Every cluster that could be filled is.
    different = len(x.unique(dim=0))
    assert len(result.assignments.unique()) == min(clusters, different)
    unit = x.abs().max() if bool(x.any()) else torch.tensor(1.0)
    distances = torch.cdist(x / unit, result.centroids / unit).square()
    chosen = distances.gather(1, result.assignments[:, None])[:, 0]
    assert bool((chosen <= distances.amin(1) + 1e-9).all())
    torch.testing.assert_close(result.inertia / unit**2, chosen.sum(), rtol=1e-6, atol=1e-9)
    for cluster in result.assignments.unique():
        mean = x[result.assignments == cluster].mean(0)
        torch.testing.assert_close(result.centroids[cluster] / unit, mean / unit, rtol=1e-9, atol=1e-9)
    total = (x - x.mean(0)).square().sum() / unit**2
    assert result.inertia / unit**2 <= total + 1e-9


@given(
    st.integers(1, 12),
    st.integers(1, 70),
    st.integers(1, 40),
    st.sampled_from([1, 2, 5]),
    st.sampled_from([torch.float32, torch.float64]),
    st.data(),
)
def test_equal_rows_are_in_one_cluster(different, width, repeats, grid, dtype, data):
    draw = generator(data.draw(SEEDS))
    x = torch.randint(-grid, grid + 1, (different, width), generator=draw).to(dtype) / 3
    order = torch.randint(different, (different * repeats,), generator=draw)
    clusters = data.draw(st.integers(1, min(different, len(order))))
    found = kmeans(
        x[order], clusters, generator=draw, max_iterations=data.draw(st.integers(1, 20))
    ).assignments
    same = torch.unique(x[order], dim=0, return_inverse=True)[1]
    of_each = torch.empty(int(same.max()) + 1, dtype=torch.int64).index_copy_(0, same, found)
    assert torch.equal(of_each[same], found)


@given(features(), st.data(), SEEDS, st.integers(-40, 40))
def test_kmeans_does_not_depend_on_the_scale(x, data, seed, exponent):
    clusters = data.draw(st.integers(1, len(x)))
    first = kmeans(x, clusters, generator=generator(seed))
    second = kmeans(x * 2.0**exponent, clusters, generator=generator(seed))
    assert torch.equal(first.assignments, second.assignments)
    assert torch.equal(first.centroids * 2.0**exponent, second.centroids)


@given(features(), st.integers(-3, 3), st.floats(0.1, 10))
def test_minmax_scale_stays_within_and_forgets_scale_and_offset(x, shift, factor):
    found = minmax_scale(x)
    assert bool(((found >= -1) & (found <= 1 + 1e-12)).all())
    assert bool((found.amin(0) == -1).all())
    moved = minmax_scale(x * factor + shift * x.abs().max())
    torch.testing.assert_close(moved, found, rtol=0, atol=1e-9)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5), st.floats(0, 20))
def test_reinit_strength_grows_from_0_below_1(gaps, lam):
    gap = torch.tensor(sorted(gaps), dtype=torch.float64)
    found = reinit_strength(gap, lam)
    assert bool(((found >= 0) & (found <= 1)).all())
    assert bool((found.diff() >= 0).all())
    assert bool((reinit_strength(gap, lam + 1) >= found).all())


@given(SEEDS, st.floats(0, 1), st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
def test_soft_reinit_stays_between_and_can_be_split(seed, alpha, dtype):
    draw = generator(seed)
    current, initial = (torch.randn(20, generator=draw).to(dtype) for _ in range(2))
    found = current.clone()
    soft_reinit_([found], [initial], alpha)
    low, high = torch.minimum(current, initial), torch.maximum(current, initial)
    slack = 4 * torch.finfo(dtype).eps
    assert bool(((found >= low - slack) & (found <= high + slack)).all())
    if alpha in (0, 1):
        assert torch.equal(found, initial if alpha else current)
    # Twice half way is three quarters of the way.
    twice, once = current.double(), current.double()
    soft_reinit_([twice], [initial], 0.5)
    soft_reinit_([twice], [initial], 0.5)
    soft_reinit_([once], [initial], 0.75)
    torch.testing.assert_close(twice, once)
