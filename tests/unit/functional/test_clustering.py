"""kmeans, purity and minmax_scale."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits

from balanceopt.functional import (
    KMeansResult,
    _clustering,
    kmeans,
    minmax_scale,
    purity,
)

MFEAT = Path(__file__).parents[4] / "shared" / "data" / "mfeat.npz"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blobs(rows: int, clusters: int, width: int = 4, spread: float = 0.05, seed: int = 0):
    """Well separated clusters, their labels, none empty."""
    draw = generator(seed)
    centres = torch.randn(clusters, width, generator=draw) * 10
    labels = torch.arange(rows) % clusters
    return centres[labels] + spread * torch.randn(rows, width, generator=draw), labels


def same_partition(first: torch.Tensor, second: torch.Tensor) -> bool:
    return float(purity(first, second)) == 1 == float(purity(second, first))


def real_features() -> list[np.ndarray]:
    """Views of handwritten numerals where they are at hand, else scikit-learn's own digits."""
    if MFEAT.exists():
        with np.load(MFEAT) as views:
            return [views[name].astype(np.float32) for name in ("fou", "kar", "zer", "mor")]
    return [load_digits().data.astype(np.float32)]


class TestKMeans:
    @pytest.mark.parametrize("clusters", [2, 6, 31])
    @pytest.mark.parametrize("seed", range(5))
    def test_separable_features_are_separated(self, clusters, seed):
        # Greedy k-means++ may still miss one of many clusters: a few starts do not.
        x, labels = blobs(40 * clusters, clusters, width=16, seed=seed)
        result = kmeans(x, clusters, generator=generator(seed), n_init=3)
        assert same_partition(result.assignments, labels)
        assert float(purity(result.assignments, labels)) == 1

    def test_result_is_consistent(self):
        x = torch.randn(500, 7)
        result = kmeans(x, 9, generator=generator())
        assert isinstance(result, KMeansResult)
        assert result.assignments.dtype == torch.int64
        assert result.centroids.shape == (9, 7)
        distances = torch.cdist(x, result.centroids).square()
        chosen = distances.gather(1, result.assignments[:, None])[:, 0]
        torch.testing.assert_close(chosen, distances.amin(1), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(result.inertia, chosen.sum(), rtol=1e-4, atol=0)
        assert 1 <= result.iterations <= 300

    def test_inertia_is_that_of_scikit_learn_on_real_features(self):
        for features in real_features():
            scaled = minmax_scale(torch.from_numpy(features))
            theirs = [KMeans(10, n_init=1, random_state=s).fit(scaled.numpy()).inertia_ for s in range(12)]
            ours = [float(kmeans(scaled, 10, generator=generator(s)).inertia) for s in range(12)]
            assert np.mean(ours) == pytest.approx(np.mean(theirs), rel=0.02)
            assert min(ours) == pytest.approx(min(theirs), rel=0.02)

    def test_many_rows_start_from_a_subset(self, monkeypatch):
        x, labels = blobs(3000, 20, width=16)
        whole = kmeans(x, 20, generator=generator(), n_init=3)
        monkeypatch.setattr(_clustering, "START_ROWS", 300)
        monkeypatch.setattr(_clustering, "START_ROWS_PER_CLUSTER", 2)
        subset = kmeans(x, 20, generator=generator(), n_init=3)
        assert not torch.equal(whole.assignments, subset.assignments)
        assert float(purity(whole.assignments, labels)) > 0.95
        assert float(purity(subset.assignments, labels)) > 0.95

    def test_the_generator_decides_everything(self):
        x = torch.randn(300, 5)
        before = torch.get_rng_state()
        first, again = (kmeans(x, 8, generator=generator(4)) for _ in range(2))
        other = kmeans(x, 8, generator=generator(5))
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(first.assignments, again.assignments)
        assert torch.equal(first.centroids, again.centroids)
        assert torch.equal(first.inertia, again.inertia)
        assert not torch.equal(first.centroids, other.centroids)

    def test_without_a_generator_torchs_own_is_used(self):
        x = torch.randn(200, 5)
        torch.manual_seed(1)
        first = kmeans(x, 7)
        torch.manual_seed(1)
        assert torch.equal(kmeans(x, 7).centroids, first.centroids)

    @pytest.mark.parametrize("rows", [1, 7, 10_000])
    def test_blocks_change_nothing(self, rows, monkeypatch):
        x, _ = blobs(150, 5, spread=3.0)
        expected = kmeans(x, 5, generator=generator())
        monkeypatch.setattr(_clustering, "BLOCK_ENTRIES_CPU", 5 * rows)
        found = kmeans(x, 5, generator=generator())
        assert torch.equal(found.assignments, expected.assignments)
        torch.testing.assert_close(found.centroids, expected.centroids)
        torch.testing.assert_close(minmax_scale(x)[:3], minmax_scale(x)[:3])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_dtypes(self, dtype):
        x, labels = blobs(90, 3)
        result = kmeans(x.to(dtype), 3, generator=generator(), n_init=2)
        assert same_partition(result.assignments, labels)
        assert result.centroids.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)

    @pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
    def test_scale_changes_nothing(self, scale):
        x = torch.randn(200, 4, dtype=torch.float64)
        expected = kmeans(x.float(), 5, init=x[:5])
        found = kmeans((x * scale).float(), 5, init=x[:5] * scale)
        assert torch.equal(found.assignments, expected.assignments)
        torch.testing.assert_close(
            found.centroids.double() / scale, expected.centroids.double(), rtol=0, atol=2e-6
        )

    def test_a_large_offset_is_harmless(self):
        x, labels = blobs(90, 3)
        result = kmeans(x + 1e4, 3, generator=generator(), n_init=2)
        assert same_partition(result.assignments, labels)
        exact = kmeans(x.double(), 3, generator=generator(), n_init=2)
        assert float(result.inertia) == pytest.approx(float(exact.inertia), rel=0.05)

    def test_strided_and_graph_bound_features(self):
        x = torch.randn(60, 8)
        expected = kmeans(x[::2, ::2].clone(), 4, generator=generator())
        found = kmeans(x.requires_grad_()[::2, ::2], 4, generator=generator())
        assert torch.equal(found.assignments, expected.assignments)
        assert not found.centroids.requires_grad
        transposed = kmeans(x.detach()[::2, ::2].T.contiguous().T, 4, generator=generator())
        assert torch.equal(transposed.assignments, expected.assignments)

    def test_autocast_does_not_take_digits(self):
        x = torch.randn(300, 16) + 5
        expected = kmeans(x, 6, generator=generator())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = kmeans(x, 6, generator=generator())
        assert torch.equal(found.assignments, expected.assignments)
        assert torch.equal(found.centroids, expected.centroids)

    def test_one_cluster(self):
        x = torch.randn(50, 3)
        result = kmeans(x, 1, generator=generator())
        assert result.assignments.tolist() == [0] * 50
        torch.testing.assert_close(result.centroids[0], x.mean(0))
        torch.testing.assert_close(result.inertia, (x - x.mean(0)).square().sum())
        assert result.iterations <= 2

    @pytest.mark.parametrize("rows", [1, 2, 17, 150])
    def test_as_many_clusters_as_rows(self, rows):
        x = torch.randn(rows, 3)
        result = kmeans(x, rows, generator=generator())
        assert sorted(result.assignments.tolist()) == list(range(rows))
        assert float(result.inertia) == pytest.approx(0, abs=1e-9)

    def test_fewer_different_rows_than_clusters(self):
        x = torch.randn(3, 4).repeat(20, 1)
        result = kmeans(x, 7, generator=generator())
        assert same_partition(result.assignments, torch.arange(60) % 3)
        assert bool(torch.isfinite(result.centroids).all())
        assert float(result.inertia) == pytest.approx(0, abs=1e-9)
        assert result.iterations < 10

    @pytest.mark.parametrize("value", [0.0, 0.1, -1e30, 1e-40])
    def test_equal_rows(self, value):
        result = kmeans(torch.full((40, 3), value), 4, generator=generator())
        assert float(result.inertia) == pytest.approx(0)
        torch.testing.assert_close(result.centroids, torch.full((4, 3), value))
        assert result.iterations < 10

    def test_one_feature(self):
        x = torch.tensor([0.0, 0.1, 5.0, 5.1, 9.0])[:, None]
        result = kmeans(x, 3, generator=generator(), n_init=3)
        assert same_partition(result.assignments, torch.tensor([0, 0, 1, 1, 2]))

    def test_an_empty_cluster_is_seeded_at_the_farthest_row(self):
        x = torch.tensor([[0.0], [1.0], [2.0], [50.0]])
        result = kmeans(x, 3, init=torch.tensor([[0.0], [2.0], [1e6]]))
        assert len(result.assignments.unique()) == 3
        assert result.assignments[3] not in result.assignments[:3]

    def test_all_but_one_cluster_empty(self):
        x, _ = blobs(60, 4)
        far = torch.full((4, 4), 1e5)
        far[0] = x.mean(0)
        assert len(kmeans(x, 4, init=far).assignments.unique()) == 4

    def test_limits_of_the_iteration(self):
        x = torch.randn(400, 6)
        result = kmeans(x, 8, generator=generator(), max_iterations=1)
        assert result.iterations == 1
        nearest = torch.cdist(x, result.centroids).argmin(1)
        assert torch.equal(result.assignments, nearest)
        loose = kmeans(x, 8, generator=generator(), tolerance=0.1).iterations
        assert loose < kmeans(x, 8, generator=generator(), tolerance=0).iterations

    def test_more_starts_are_never_worse(self):
        x = torch.randn(200, 4)
        one, many = (
            torch.stack([kmeans(x, 20, generator=generator(s), n_init=n).inertia for s in range(5)])
            for n in (1, 8)
        )
        assert bool((many <= one).all())
        assert bool((many < one).any())

    def test_features_are_not_changed(self):
        x = torch.randn(50, 4)
        copy, start = x.clone(), x[:3].clone()
        kmeans(x, 3, init=start)
        minmax_scale(x)
        assert torch.equal(x, copy)
        assert torch.equal(start, copy[:3])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("width", [1, 5, 17, 300])
    @pytest.mark.parametrize("clusters", [3, 9, 20])
    def test_a_row_has_the_same_centroid_wherever_it_stands(self, width, clusters, dtype):
        # A row of one number is exactly as near to all orders of the same coordinates: rounding alone would decide.
        draw = generator()
        base = torch.rand(width, generator=draw, dtype=dtype)
        centroids = torch.stack([base[torch.randperm(width, generator=draw)] for _ in range(clusters)])
        different = torch.cat([torch.linspace(-1, 1, 7)[:, None].expand(-1, width), torch.rand(7, width)])
        nearest = torch.full((14,), -1)
        order = torch.randint(14, (1000,), generator=draw)
        for rows in (order, order[:1], order[:2], order[:3], order[:33], order.flip(0)):
            x = different.to(dtype)[rows]
            norms = torch.linalg.vector_norm(x, dim=1)
            points = _clustering._Points(x, norms, centroids[0].double(), 1.0, 1.0)
            found = _clustering._assign(points, centroids)
            nearest[rows] = torch.where(nearest[rows] < 0, found, nearest[rows])
            assert torch.equal(nearest[rows], found)
            distances = (x.double()[:, None] - centroids.double()).square().sum(2)
            chosen = distances.gather(1, found[:, None])[:, 0]
            torch.testing.assert_close(chosen, distances.amin(1), rtol=1e-12, atol=1e-12)

    def test_of_centroids_at_one_place_the_first_counts(self):
        x = torch.randn(50, 7)
        points = _clustering._Points(x, torch.linalg.vector_norm(x, dim=1), x[0].double(), 1.0, 1.0)
        one = torch.randn(1, 7)
        assert _clustering._assign(points, one.expand(5, -1).contiguous()).tolist() == [0] * 50

    def test_a_tight_clump_beside_a_far_row(self):
        # Products of float32 lose all digits of the clump; differences in float64 keep them.
        clump = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64) * 2.0**-24
        x = torch.cat([clump.repeat(10, 1), torch.tensor([[1.0, 1.0]], dtype=torch.float64)]).float()
        result = kmeans(x, 5, generator=generator(), tolerance=0.0)
        assert same_partition(result.assignments, torch.cat([torch.arange(4).repeat(10), torch.tensor([4])]))

    def test_the_user_s_precision_of_products_changes_nothing(self):
        x = torch.randn(300, 16) + 5
        expected = kmeans(x, 6, generator=generator())
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            found = kmeans(x, 6, generator=generator())
            assert torch.get_float32_matmul_precision() == "medium"
        finally:
            torch.set_float32_matmul_precision(before)
        assert torch.equal(found.assignments, expected.assignments)
        assert torch.equal(found.centroids, expected.centroids)

    def test_sums_by_sorting_are_those_of_index_add(self):
        rows, labels = torch.randn(100, 5, dtype=torch.float64), torch.randint(1, 9, (100,))
        expected = torch.zeros(12, 5, dtype=torch.float64).index_add_(0, labels, rows)
        torch.testing.assert_close(_clustering._sum_by_sorting(rows, labels, 12), expected)
        empty = _clustering._sum_by_sorting(rows[:0], labels[:0], 3)
        assert torch.equal(empty, torch.zeros(3, 5, dtype=torch.float64))

    @pytest.mark.parametrize(
        ("features", "options", "match"),
        [
            (torch.ones(5), {}, r"`features` should be a dense real tensor of shape \(N, D\)"),
            (torch.ones(5, 0), {}, r"`features` should have shape \(N, D\) with D > 0"),
            (torch.ones(5, 2, dtype=torch.cfloat), {}, "`features` should be a dense real tensor"),
            (torch.ones(0, 2), {}, "`features` should be finite with at least one row. Found 0"),
            (torch.tensor([[1.0], [math.nan], [1.0]]), {}, "`features` should be finite"),
            (torch.tensor([[1.0], [math.inf], [1.0]]), {}, "`features` should be finite"),
            (torch.tensor([[1.0], [-math.inf], [1.0]]), {}, "`features` should be finite"),
            (torch.ones(1, 2), {}, "`features` should have at least `num_clusters = 2` rows. Found 1"),
            (
                torch.ones(3, 2),
                {"num_clusters": 0},
                "whole number of at least 1. Found num_clusters = 0",
            ),
            (
                torch.ones(3, 2),
                {"max_iterations": 0},
                "`max_iterations` should be a whole number of at least 1",
            ),
            (torch.ones(3, 2), {"n_init": 0}, "`n_init` should be a whole number of at least 1"),
            (torch.ones(3, 2), {"tolerance": -1.0}, "`tolerance` should be a finite number of at least 0"),
            (torch.ones(3, 2), {"init": torch.ones(3, 2)}, r"`init` should have shape \(2, 2\)"),
        ],
    )
    def test_errors(self, features, options, match):
        with pytest.raises(ValueError, match=match):
            kmeans(features, **{"num_clusters": 2, **options})


BITS = """
import hashlib, sys, torch
from balanceopt.functional import kmeans, minmax_scale
torch.set_num_threads(int(sys.argv[1]))
draw = torch.Generator().manual_seed(0)
digest = hashlib.sha256()
for rows, width, clusters in ((5000, 37, 20), (700, 515, 6)):
    # Whole numbers are drawn alike everywhere, unlike Gaussian ones.
    x = torch.randint(-2000, 2000, (rows, width), generator=draw) + 500 * (torch.arange(rows) % clusters)[:, None]
    for features in (x.float() / 1024, x.double() / 1000):
        found = kmeans(minmax_scale(features), clusters, generator=torch.Generator().manual_seed(1), n_init=2)
        for part in (found.assignments, found.centroids, found.inertia):
            digest.update(part.numpy().tobytes())
print(digest.hexdigest())
"""


@pytest.mark.timeout(120)
def test_kmeans_has_the_same_bits_on_every_processor_and_with_any_number_of_threads():
    found = set()
    for capability, threads in (("default", 1), ("avx2", 4)):
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-c", BITS, str(threads)]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found.add(run.stdout)
    assert len(found) == 1


class TestMinmaxScale:
    def test_range(self):
        found = minmax_scale(torch.randn(100, 5) * torch.tensor([1.0, 1e-30, 1e30, 1e4, 1e-4]))
        torch.testing.assert_close(found.amin(0), -torch.ones(5))
        torch.testing.assert_close(found.amax(0), torch.ones(5))

    def test_constant_features_become_minus_one(self):
        x = torch.tensor([[3.0, 1e30, 0.0, 1.0], [3.0, 1e30, 1e-42, 2.0]])
        assert minmax_scale(x).tolist() == [[-1, -1, -1, -1], [-1, -1, -1, 1]]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_dtype_and_strides(self, dtype):
        x = (torch.randn(6, 40) * 1e4).to(dtype).T
        found = minmax_scale(x)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), minmax_scale(x.double()), atol=1e-2, rtol=0)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_errors(self, bad):
        with pytest.raises(ValueError, match="`features` should be finite"):
            minmax_scale(torch.tensor([[1.0, 2.0], [bad, 3.0]]))
        with pytest.raises(ValueError, match="`features` should be finite"):
            minmax_scale(torch.ones(0, 2))
        with pytest.raises(ValueError, match=r"`features` should be a dense real tensor of shape \(N, D\)"):
            minmax_scale(torch.ones(3))


class TestPurity:
    @pytest.mark.parametrize(
        ("assignments", "labels", "expected"),
        [
            ([0, 0, 1, 1], [5, 5, 7, 7], 1.0),
            ([0, 0, 0, 0], [1, 1, 1, 2], 0.75),
            ([0, 1, 2, 3], [1, 1, 1, 2], 1.0),
            ([3, 3, 9, 9], [0, 1, 0, 1], 0.5),
            ([4], [-100], 1.0),
            ([-(2**63), 2**63 - 1, -(2**63)], [2**63 - 1, -(2**63), 0], 2 / 3),
            ([0, 10**12, 0, 10**12], [-(10**12), 3, -(10**12), 4], 0.75),
        ],
    )
    def test_values(self, assignments, labels, expected):
        found = purity(torch.tensor(assignments), torch.tensor(labels))
        assert found.shape == ()
        assert float(found) == pytest.approx(expected)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool])
    def test_integer_dtypes(self, dtype):
        labels = torch.tensor([0, 1, 1, 0, 1]).to(dtype)
        assert float(purity(torch.tensor([0, 0, 0, 1, 1], dtype=torch.int32), labels)) == pytest.approx(0.6)

    def test_table_and_pairs_agree(self, monkeypatch):
        assignments, labels = torch.randint(30, (500,)), torch.randint(-9, 30, (500,))
        expected = purity(assignments, labels)
        monkeypatch.setattr(_clustering, "TABLE_CELLS", 0)
        assert torch.equal(purity(assignments, labels), expected)

    @pytest.mark.parametrize(
        ("assignments", "labels", "match"),
        [
            (torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), "at least one entry"),
            (torch.tensor([1, 2]), torch.tensor([1]), r"one entry per assignment \(2\). Found 1"),
            (torch.tensor([1.0]), torch.tensor([1]), "`assignments` should be a dense integer tensor"),
            (torch.tensor([1]), torch.tensor([[1]]), "`labels` should be a dense integer tensor"),
        ],
    )
    def test_errors(self, assignments, labels, match):
        with pytest.raises(ValueError, match=match):
            purity(assignments, labels)
