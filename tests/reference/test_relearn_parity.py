"""The package's re-learning rules against the formulas written out naively, and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.preprocessing import MinMaxScaler

from balanceopt.functional import kmeans, minmax_scale, purity, reinit_strength, soft_reinit_
from tests.reference import relearn


def blobs(rows: int, clusters: int, width: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(clusters, width, generator=draw, dtype=torch.float64)
    which = torch.randint(clusters, (rows,), generator=draw)
    return centres[which] + torch.randn(rows, width, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(5))
def test_lloyd_from_the_same_start(seed):
    x = blobs(120, 4, 3, seed)
    labels, centroids = relearn.lloyd(x.numpy(), x[:4].numpy())
    found = kmeans(x, 4, init=x[:4], tolerance=0.0)
    assert found.assignments.tolist() == labels.tolist()
    torch.testing.assert_close(found.centroids, torch.from_numpy(centroids))
    torch.testing.assert_close(found.inertia, torch.tensor(((x.numpy() - centroids[labels]) ** 2).sum()))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("tolerance", [1e-4, 1e-2])
def test_the_same_as_scikit_learn_from_the_same_start(seed, tolerance):
    x = blobs(400, 6, 5, seed)
    theirs = KMeans(6, init=x[:6].numpy(), n_init=1, tol=tolerance, algorithm="lloyd").fit(x.numpy())
    ours = kmeans(x, 6, init=x[:6], tolerance=tolerance)
    assert ours.assignments.tolist() == theirs.labels_.tolist()
    assert ours.iterations == theirs.n_iter_
    np.testing.assert_allclose(ours.centroids.numpy(), theirs.cluster_centers_, rtol=1e-9, atol=1e-9)
    assert float(ours.inertia) == pytest.approx(theirs.inertia_)


def test_purity():
    assignments, labels = torch.randint(7, (200,)), torch.randint(-3, 4, (200,))
    assert float(purity(assignments, labels)) == pytest.approx(
        relearn.purity(assignments.tolist(), labels.tolist())
    )


def test_minmax_scale():
    x = torch.randn(50, 6, dtype=torch.float64) * torch.tensor([1.0, 1e-6, 1e6, 0.0, 3.0, 1.0]) + 5
    found = minmax_scale(x).numpy()
    np.testing.assert_allclose(found, relearn.minmax(x.numpy()), atol=1e-12)
    np.testing.assert_allclose(found, MinMaxScaler((-1, 1)).fit_transform(x.numpy()), atol=1e-6)


@pytest.mark.parametrize("purities", [(0.9, 0.7), (0.7, 0.9), (0.5, 0.5), (1.0, 0.1)])
def test_reinit_strength(purities):
    train, val = torch.tensor(purities, dtype=torch.float64)
    expected = relearn.strength(purities[0], purities[1], lam=3.0)
    assert float(reinit_strength((train - val).abs(), 3.0)) == pytest.approx(expected)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 0.7, 1.0])
def test_soft_reinit(alpha):
    current, initial = torch.randn(9, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    expected = [relearn.reinit(c, i, alpha) for c, i in zip(current.tolist(), initial.tolist(), strict=True)]
    soft_reinit_([current], [initial], alpha)
    assert current.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-15)
