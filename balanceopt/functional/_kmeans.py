"""K-means on the features' own device: Lloyd's iterations from a k-means++ start.

Features may be spread over the ranks of a process group. Only sums, extrema and the rows chosen as centroids
then leave a rank, and the result is that of one process on the features concatenated in rank order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from balanceopt.functional._kmeans_start import (
    Points,
    normalise,
    plus_plus_start,
    rows_at,
)
from balanceopt.functional._rows import Ranks, check_features, row_blocks
from balanceopt.functional._together import Steps, run_together, to_host


@dataclass(frozen=True, eq=False)
class KMeansResult:
    """What `kmeans` found.

    Attributes:
        assignments: `(N,)` int64, each row's nearest centroid.
        centroids: `(K, D)`, in float32 or wider.
        inertia: scalar, sum of the squared distances to the nearest centroid (over all ranks).
        iterations: number of Lloyd iterations of the run that was kept.
    """

    assignments: Tensor
    centroids: Tensor
    inertia: Tensor
    iterations: int


def _assign(points: Points, centroids: Tensor) -> Tensor:
    """`(n,)`, the nearest centroid of each row."""
    # Of |x - c|^2 only what differs between centroids.
    offsets = centroids.square().sum(1)
    blocks = row_blocks(points.rows, len(centroids))
    return torch.cat([torch.addmm(offsets, block, centroids.T, alpha=-2).min(1).indices for block in blocks])


def _sum_by_cluster(block: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """`(K, D)` sums of the rows of each cluster, in an order that does not change from run to run."""
    if block.device.type == "cpu":
        return block.new_zeros(clusters, block.shape[1]).index_add_(0, labels, block)
    return _sum_by_sorting(block, labels, clusters)


def _sum_by_sorting(block: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """As `index_add_`, which on a GPU adds in the order in which threads arrive."""
    counts = torch.bincount(labels, minlength=clusters)
    return torch.nn.functional.embedding_bag(
        labels.argsort(stable=True), block, counts.cumsum(0) - counts, mode="sum"
    )


def _reseed(
    points: Points, labels: Tensor, centroids: Tensor, sums: Tensor, counts: Tensor
) -> Steps[tuple[Tensor, Tensor]]:
    """Sums and counts with each empty cluster given one of the rows farthest from their centroids."""
    ranks = points.ranks
    empty = (counts == 0).nonzero()[:, 0]
    # A row on its centroid, up to rounding, is no seed: with fewer different rows than clusters some stay empty.
    distances = _squared_distances(points, labels, centroids)
    rounding = 64 * torch.finfo(distances.dtype).eps ** 2
    distances = torch.where(distances > rounding * points.norms, distances, 0)
    far, place = distances.sort(descending=True, stable=True)
    missing = (0, max(0, len(empty) - len(far)))
    far = torch.nn.functional.pad(far[: len(empty)], missing)
    place = torch.nn.functional.pad(place[: len(empty)], missing)
    cluster = labels[place] if len(labels) else place
    # Every rank's farthest rows, then the farthest of all.
    far = (yield from ranks.stack(far)).flatten()
    order = far.argsort(descending=True, stable=True)[: len(empty)]
    order = order[far[order] > 0]
    empty = empty[: len(order)]
    old = (yield from ranks.stack(cluster)).flatten()[order]
    targets = (yield from ranks.stack(place + points.offset)).flatten()[order]
    ends = torch.arange(1, len(points.rows) + 1, device=labels.device)
    rows = (yield from rows_at(points, ends, points.offset, targets)).double()
    sums = sums.index_add(0, old, -rows).index_copy_(0, empty, rows)
    ones = torch.ones_like(old, dtype=counts.dtype)
    return sums, counts.index_add(0, old, -ones).index_copy_(0, empty, ones)


def _run(
    points: Points,
    clusters: int,
    init: Tensor | None,
    generator: torch.Generator | None,
    max_iterations: int,
    tolerance: float,
) -> Steps[KMeansResult]:
    """One start and its iterations, on the normalised scale."""
    if init is None:
        start = yield from plus_plus_start(points, clusters, generator)
    else:
        start = (init.to(points.mean) * points.factor - points.mean).to(points.rows.dtype)
    labels, centroids, iterations = yield from _lloyd(points, start, max_iterations, tolerance)
    inertia = yield from points.ranks.sum(_squared_distances(points, labels, centroids).double().sum())
    return KMeansResult(labels, centroids, inertia, iterations)


def _lloyd(
    points: Points, centroids: Tensor, max_iterations: int, tolerance: float
) -> Steps[tuple[Tensor, Tensor, int]]:
    """Labels, centroids and number of iterations."""
    labels = torch.full((len(points.rows),), -1, device=centroids.device)
    sums = torch.zeros(centroids.shape, dtype=torch.float64, device=centroids.device)
    shift = sums.new_full((), math.inf)
    iteration = 0
    while True:
        previous, labels = labels, _assign(points, centroids)
        changed = labels != previous
        here = changed.sum(dtype=torch.float64)
        own = sums.new_zeros(len(centroids)).index_add_(0, labels, sums.new_ones(len(labels)))
        counted = yield from points.ranks.sum(torch.cat([own, here[None]]))
        counts, everywhere = counted[:-1], counted[-1]
        # The one thing in an iteration that the host waits for.
        facts = yield from to_host(torch.stack([shift, everywhere, here, (counts == 0).sum()]))
        moved, changes, changes_here, empty = facts.tolist()
        if moved <= tolerance * points.variance or iteration == max_iterations:
            return labels, centroids, iteration
        iteration += 1
        # The same rows in every cluster: the centroids are their means already.
        if not changes:
            return labels, centroids, iteration
        sums = _update_sums(points.rows, sums, previous, labels, changed, int(changes_here))
        total = yield from points.ranks.sum(sums)
        if empty:
            total, counts = yield from _reseed(points, labels, centroids, total, counts)
        means = torch.where(counts[:, None] > 0, total / counts[:, None], centroids.double())
        previous_centroids, centroids = centroids, means.to(centroids.dtype)
        shift = (centroids - previous_centroids).double().square().sum()


def _update_sums(
    rows: Tensor, sums: Tensor, previous: Tensor, labels: Tensor, changed: Tensor, count: int
) -> Tensor:
    """This rank's `(K, D)` float64 sums of the rows of each cluster, from the `count` that changed when few did."""
    if 8 * count <= len(rows):
        which = torch.nonzero_static(changed, size=count)[:, 0]
        few = rows[which].double()
        gained = _sum_by_cluster(few, labels[which], len(sums))
        return sums + gained - _sum_by_cluster(few, previous[which], len(sums))
    sums, first = torch.zeros_like(sums), 0
    for block in row_blocks(rows):
        sums += _sum_by_cluster(block, labels[first : first + len(block)], len(sums))
        first += len(block)
    return sums


def _squared_distances(points: Points, labels: Tensor, centroids: Tensor) -> Tensor:
    """`(n,)`, to each row's own centroid; from differences, as products lose the digits of tight clusters."""
    parts, first = [], 0
    for block in row_blocks(points.rows):
        apart = centroids[labels[first : first + len(block)]].sub_(block)
        parts.append(torch.linalg.vector_norm(apart, dim=1).square_())
        first += len(block)
    return torch.cat(parts)


@torch.no_grad()
def kmeans(
    features: Tensor,
    num_clusters: int,
    *,
    generator: torch.Generator | None = None,
    init: Tensor | None = None,
    max_iterations: int = 300,
    tolerance: float = 1e-4,
    n_init: int = 1,
    group: dist.ProcessGroup | None = None,
) -> KMeansResult:
    r"""Cluster rows by k-means: Lloyd's iterations from a greedy k-means++ start.

    $$\phi_i \in C_m \iff \lVert \phi_i - O_m \rVert \le \lVert \phi_i - O_j \rVert \ \forall j, \quad
    O_m = \mathrm{mean}(C_m)$$

    Stops when no assignment changes, or when the centroids' squared shifts sum to at most `tolerance` times
    the features' mean variance. A cluster that loses all its rows gets the row farthest from its centroid.
    The same features, generator state and number of threads give the same result.

    Args:
        features: `(N, D)`, finite; half precision is computed in float32. Temporaries are one copy of the
            features and a bounded block.
        num_clusters: K, from 1 to N.
        generator: source of the start; torch's own for None. On another device than `features` it gives the
            same numbers as it would there.
        init: the `(K, D)` centroids to start from; None for k-means++.
        max_iterations: most Lloyd iterations of a run.
        tolerance: see above; 0 runs until no assignment changes.
        n_init: number of starts; the run with the least inertia is kept.
        group: process group whose ranks hold a part of the rows each: the result is that of one process on
            all rows, of which only the centroids' candidates and sums leave their rank. The starts drawn are
            rank 0's. None: this process holds all rows and talks to nobody.

    Returns:
        `KMeansResult`: assignments `(N,)` of this process's rows, centroids `(K, D)`, inertia, iterations.

    Raises:
        ValueError: if `features` is not a finite, floating `(N, D)` tensor with `N >= num_clusters`, or
            another argument is outside its range.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [8.0, 8.0], [8.0, 9.0]])
        >>> result = kmeans(x, 2, generator=torch.Generator().manual_seed(0))
        >>> bool(result.assignments[0] == result.assignments[1]), float(result.inertia)
        (True, 1.0)

    Reference:
        Wei et al., Diagnosing and Re-learning for Balanced Multimodal Learning, ECCV 2024, Eq. 1-2; start:
        Arthur and Vassilvitskii, k-means++, 2007, greedy as in scikit-learn.
    """
    steps = kmeans_steps(features, num_clusters, generator, init, max_iterations, tolerance, n_init, group)
    with full_precision([features.device.type]):
        (result,) = run_together([steps], group)
    return result


def kmeans_steps(
    features: Tensor,
    num_clusters: int,
    generator: torch.Generator | None = None,
    init: Tensor | None = None,
    max_iterations: int = 300,
    tolerance: float = 1e-4,
    n_init: int = 1,
    group: dist.ProcessGroup | None = None,
) -> Steps[KMeansResult]:
    """`kmeans` as a computation beside others."""
    check_features(features)
    for name, value in (
        ("num_clusters", num_clusters),
        ("max_iterations", max_iterations),
        ("n_init", n_init),
    ):
        if value < 1:
            raise ValueError(f"`{name}` should be at least 1. Found {value}.")
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"`tolerance` should be non-negative. Found {tolerance}.")
    if init is not None and init.shape != (num_clusters, features.shape[1]):
        raise ValueError(
            f"`init` should have shape {(num_clusters, features.shape[1])}. Found {tuple(init.shape)}."
        )
    points = yield from normalise(features, Ranks(group))
    del features  # it may be a copy that nobody else needs
    if points.total < num_clusters:
        raise ValueError(
            f"`features` should have at least `num_clusters = {num_clusters}` rows. Found {points.total}."
        )
    best = yield from _run(points, num_clusters, init, generator, max_iterations, tolerance)
    for _ in range(n_init - 1):
        run = yield from _run(points, num_clusters, init, generator, max_iterations, tolerance)
        if (yield from to_host(run.inertia < best.inertia)):
            best = run
    # Back from the normalised scale.
    dtype = best.centroids.dtype
    centroids = ((best.centroids.double() + points.mean) / points.factor).to(dtype)
    inertia = (best.inertia / points.factor**2).to(dtype)
    return KMeansResult(best.assignments, centroids, inertia, best.iterations)


@contextmanager
def full_precision(device_types: Iterable[str]) -> Iterator[None]:
    """Distances keep their digits inside a user's autocast region."""
    with ExitStack() as stack:
        for device_type in device_types:
            if torch.amp.is_autocast_available(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield
