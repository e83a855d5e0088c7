"""Diagnosing and re-learning: how well a modality's features separate the classes, and the way back.

Features may be spread over the ranks of a process group. Only sums, extrema and the rows chosen as centroids
then leave a rank, and the result is that of one process on the features concatenated in rank order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

# Entries of the largest temporary, features or distances of a block of rows: in cache on a CPU, a small part
# of the memory elsewhere.
BLOCK_ENTRIES_CPU = 2**20
BLOCK_ENTRIES = 2**26

# k-means++ reads all its rows once per cluster, so from twice as many rows on it works on a random subset: of this
# many rows, and of so many per cluster. Over 60 seeds inertia and purity were those of all rows.
START_ROWS = 4096
START_ROWS_PER_CLUSTER = 64

# Cells up to which purity counts in a dense table of clusters by classes.
TABLE_CELLS = 2**22


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


class _Ranks:
    """Reductions over the ranks that share the features; identity without a group."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.index = 0 if group is None else dist.get_rank(group)
        self.count = 1 if group is None else dist.get_world_size(group)

    def sum(self, values: Tensor) -> Tensor:
        if self.group is None:
            return values
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.group)
        return total

    def max(self, values: Tensor) -> Tensor:
        if self.group is None:
            return values
        largest = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return largest

    def stack(self, values: Tensor) -> Tensor:
        """`(ranks, ...)`, every rank's values."""
        slots = values.new_zeros(self.count, *values.shape)
        slots[self.index] = values
        return self.sum(slots)

    def from_first(self, values: Tensor) -> Tensor:
        """Rank 0's values: what ranks drew each for itself becomes the same everywhere."""
        return self.sum(values if self.index == 0 else torch.zeros_like(values))


def _check_features(features: Tensor) -> None:
    if features.dim() != 2 or features.shape[1] == 0 or not features.is_floating_point():
        raise ValueError(
            "`features` should be a floating tensor of shape (N, D) with D > 0. "
            f"Found shape {tuple(features.shape)}, dtype {features.dtype}."
        )


def _wide(features: Tensor) -> Tensor:
    return features if features.dtype == torch.float64 else features.float()


def _blocks(features: Tensor, width: int = 0) -> list[Tensor]:
    """Views of consecutive rows, so that rows times the larger of D and `width` stays bounded."""
    entries = BLOCK_ENTRIES_CPU if features.device.type == "cpu" else BLOCK_ENTRIES
    step = max(1, entries // max(features.shape[1], width))
    return [features[first : first + step] for first in range(0, max(1, len(features)), step)]


def _column_range(features: Tensor, ranks: _Ranks) -> tuple[Tensor, Tensor]:
    """Least and largest value of each column over all ranks, in float32 or wider."""
    # `aminmax` over the rows is an order of magnitude slower than these two.
    low = torch.full_like(features[:0].sum(0), math.inf, dtype=_wide(features[:0]).dtype)
    high = -low
    for block in _blocks(features):
        if len(block):
            low = torch.minimum(low, block.amin(0))
            high = torch.maximum(high, block.amax(0))
    extrema = torch.stack([-low, high])
    # A maximum over ranks may lose NaN, which has to be seen on all of them.
    extrema = ranks.max(torch.where(extrema.isnan(), math.inf, extrema))
    return -extrema[0], extrema[1]


@torch.no_grad()
def minmax_scale(features: Tensor, *, group: dist.ProcessGroup | None = None) -> Tensor:
    r"""Scale each feature to the range from -1 to 1, as the published code does before clustering.

    $$x' = 2 (x - \min x) / (\max x - \min x) - 1$$

    with a range of 0 taken as 1, so that a constant feature becomes -1.

    Args:
        features: `(N, D)`.
        group: process group whose ranks hold a part of the rows each; the extrema are shared. None: this
            process holds all rows.

    Returns:
        `(N, D)`, in the dtype of `features` (computed in float32 or wider).

    Raises:
        ValueError: if `features` is not a floating `(N, D)` tensor, is empty, or a feature's range is not
            finite.

    Example:
        >>> minmax_scale(torch.tensor([[0.0, 7.0], [1.0, 7.0], [4.0, 7.0]]))
        tensor([[-1.0000, -1.0000],
                [-0.5000, -1.0000],
                [ 1.0000, -1.0000]])

    Reference:
        Wei et al., Diagnosing and Re-learning for Balanced Multimodal Learning, ECCV 2024: the authors'
        published code (`code/ours.py`).
    """
    _check_features(features)
    low, high = _column_range(features, _Ranks(group))
    spread = high - low
    if not bool(torch.isfinite(spread).all()):
        raise ValueError(
            "`features` should be finite with at least one row. Found an entry or range that is not."
        )
    factor = torch.where(spread < torch.finfo(spread.dtype).tiny, 2.0, 2 / spread)
    scaled = torch.empty_like(features, memory_format=torch.contiguous_format)
    for block, target in zip(_blocks(features), _blocks(scaled), strict=True):
        if block.dtype == low.dtype:
            torch.sub(block, low, out=target).mul_(factor).sub_(1)
        else:
            target.copy_((block - low).mul_(factor).sub_(1))
    return scaled


@dataclass(frozen=True, eq=False)
class _Points:
    """Features brought near 0 and 1, where float32 distances by products are exact enough."""

    rows: Tensor  # (n, D): features * factor - mean
    norms: Tensor  # (n,): squared norms of the rows
    mean: Tensor  # (D,) float64
    factor: float  # a power of 2
    total: int  # rows over all ranks
    offset: int  # rows on the ranks before this one
    variance: float  # mean over the features, over all ranks
    ranks: _Ranks


def _normalise(features: Tensor, ranks: _Ranks) -> _Points:
    low, high = _column_range(features, ranks)
    counts = ranks.stack(torch.tensor(len(features), device=features.device)).tolist()
    total = sum(counts)
    largest = float(torch.maximum(low.abs(), high.abs()).amax())
    if total == 0 or not math.isfinite(largest):
        raise ValueError(
            f"`features` should be finite with at least one row. Found {total} rows, not all finite."
        )
    # A power of 2 changes no digit; the bound keeps it a normal float32.
    factor = 2.0 ** -max(-126, min(126, math.frexp(largest)[1]))
    mean = torch.zeros(features.shape[1], dtype=torch.float64, device=features.device)
    for block in _blocks(features):
        mean += low.new_full((len(block),), factor) @ _wide(block)
    mean = (ranks.sum(mean) / total).to(low.dtype).double()
    rows = torch.add(-mean.to(low.dtype), _wide(features), alpha=factor)
    norms = torch.linalg.vector_norm(rows, dim=1).square_()
    variance = float(ranks.sum(norms.sum(dtype=torch.float64))) / (total * rows.shape[1])
    return _Points(rows, norms, mean, factor, total, sum(counts[: ranks.index]), variance, ranks)


def _rows_at(points: _Points, ends: Tensor, start: Tensor | int, targets: Tensor) -> Tensor:
    """`(T, D)`, the rows of any rank in which the targets fall when rows are laid end to end by weight.

    `ends` `(n,)` int64 are the running sums of this rank's weights, `start` is the earlier ranks' sum.
    """
    local = targets - start
    place = torch.searchsorted(ends, local, right=True)
    if points.ranks.group is None:
        return points.rows[place]
    rows = points.rows.new_zeros(len(targets), points.rows.shape[1])
    if len(ends):
        mine = (local >= 0) & (place < len(ends))
        rows = torch.where(mine[:, None], points.rows[place.clamp(max=len(ends) - 1)], 0)
    return points.ranks.sum(rows)


def _draw(points: _Points, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    device = points.rows.device
    source = device if generator is None else generator.device
    numbers = torch.rand(shape, generator=generator, dtype=torch.float64, device=source)
    return points.ranks.from_first(numbers.to(device))


def _random_start(points: _Points, clusters: int, generator: torch.Generator | None) -> Tensor:
    """K rows without replacement, all equally likely."""
    targets = _draw(points, (points.total,), generator).argsort(stable=True)[:clusters]
    ends = torch.arange(1, len(points.rows) + 1, device=targets.device)
    return _rows_at(points, ends, points.offset, targets)


def _subset(points: _Points, count: int, generator: torch.Generator | None) -> _Points:
    """`count` of the rows without replacement, all equally likely, on the ranks where they are."""
    chosen = _draw(points, (points.total,), generator).argsort(stable=True)[:count].sort().values
    local = chosen - points.offset
    mine = local[(local >= 0) & (local < len(points.rows))]
    offset = int((local < 0).sum())
    return replace(points, rows=points.rows[mine], norms=points.norms[mine], total=count, offset=offset)


def _plus_plus_start(points: _Points, clusters: int, generator: torch.Generator | None) -> Tensor:
    """Greedy k-means++: of 2 + log K candidates drawn by squared distance, the one that lowers the sum most."""
    enough = max(START_ROWS, START_ROWS_PER_CLUSTER * clusters)
    if points.total > 2 * enough:
        points = _subset(points, enough, generator)
    rows, norms, ranks = points.rows, points.norms, points.ranks
    draws = _draw(points, (clusters, 2 + int(math.log(clusters))), generator)
    ends = torch.arange(1, len(rows) + 1, device=rows.device)
    centroids = rows.new_empty(clusters, rows.shape[1])
    centroids[:1] = _rows_at(points, ends, points.offset, (draws[0, :1] * points.total).long())
    nearest = _distances(rows, norms, centroids[:1])[0]
    potential = ranks.sum(nearest.sum().double())
    for place in range(1, clusters):
        # Running sums of integers are exact: the same on every device and with the rows cut in any way.
        weights = (nearest.double() * torch.where(potential > 0, 2.0**40 / potential, 0.0)).long()
        ends = torch.where(potential > 0, weights, 1).cumsum(0)
        sums = ranks.stack(ends[-1] if len(ends) else ends.sum())
        targets = (draws[place] * sums.sum()).long()
        candidates = _rows_at(points, ends, sums[: ranks.index].sum(), targets)
        distances = torch.minimum(_distances(rows, norms, candidates), nearest)
        potentials = ranks.sum(distances.sum(1).double())
        best = potentials.argmin()
        nearest, potential, centroids[place] = distances[best], potentials[best], candidates[best]
    return centroids


def _distances(rows: Tensor, norms: Tensor, centroids: Tensor) -> Tensor:
    """`(K, n)` squared distances, for few centroids."""
    products = torch.addmm(norms[None], centroids, rows.T, alpha=-2)
    return products.add_(centroids.square().sum(1)[:, None]).clamp_min_(0)


def _assign(points: _Points, centroids: Tensor) -> Tensor:
    """`(n,)`, the nearest centroid of each row."""
    # Of |x - c|^2 only what differs between centroids.
    offsets = centroids.square().sum(1)
    blocks = _blocks(points.rows, len(centroids))
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
    points: _Points, labels: Tensor, centroids: Tensor, sums: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
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
    far = ranks.stack(far).flatten()
    order = far.argsort(descending=True, stable=True)[: len(empty)]
    order = order[far[order] > 0]
    empty = empty[: len(order)]
    old = ranks.stack(cluster).flatten()[order]
    targets = ranks.stack(place + points.offset).flatten()[order]
    ends = torch.arange(1, len(points.rows) + 1, device=labels.device)
    rows = _rows_at(points, ends, points.offset, targets).double()
    sums = sums.index_add(0, old, -rows).index_copy_(0, empty, rows)
    ones = torch.ones_like(old, dtype=counts.dtype)
    return sums, counts.index_add(0, old, -ones).index_copy_(0, empty, ones)


def _run(
    points: _Points,
    clusters: int,
    init: str | Tensor,
    generator: torch.Generator | None,
    max_iterations: int,
    tolerance: float,
) -> KMeansResult:
    """One start and its iterations, on the normalised scale."""
    if isinstance(init, Tensor):
        start = (init.to(points.mean) * points.factor - points.mean).to(points.rows.dtype)
    else:
        choose = _plus_plus_start if init == "k-means++" else _random_start
        start = choose(points, clusters, generator)
    labels, centroids, iterations = _lloyd(points, start, max_iterations, tolerance)
    inertia = points.ranks.sum(_squared_distances(points, labels, centroids).double().sum())
    return KMeansResult(labels, centroids, inertia, iterations)


def _lloyd(
    points: _Points, centroids: Tensor, max_iterations: int, tolerance: float
) -> tuple[Tensor, Tensor, int]:
    """Labels, centroids and number of iterations."""
    ranks = points.ranks
    labels = torch.full((len(points.rows),), -1, device=centroids.device)
    sums = torch.zeros(centroids.shape, dtype=torch.float64, device=centroids.device)
    for iteration in range(1, max_iterations + 1):
        previous, labels = labels, _assign(points, centroids)
        changed = (labels != previous).nonzero()[:, 0]
        # The same rows in every cluster: the centroids are their means already.
        if not int(ranks.sum(torch.tensor(len(changed), device=labels.device))):
            return labels, centroids, iteration
        sums = _update_sums(points.rows, sums, previous, labels, changed)
        previous_centroids, centroids = centroids, _means(points, labels, centroids, sums)
        shift = (centroids - previous_centroids).double().square().sum()
        if float(shift) <= tolerance * points.variance:
            break
    return _assign(points, centroids), centroids, iteration


def _update_sums(rows: Tensor, sums: Tensor, previous: Tensor, labels: Tensor, changed: Tensor) -> Tensor:
    """This rank's `(K, D)` float64 sums of the rows of each cluster, from the rows that changed when few did."""
    if 8 * len(changed) <= len(rows):
        few = rows[changed].double()
        gained = _sum_by_cluster(few, labels[changed], len(sums))
        return sums + gained - _sum_by_cluster(few, previous[changed], len(sums))
    sums, first = torch.zeros_like(sums), 0
    for block in _blocks(rows):
        sums += _sum_by_cluster(block, labels[first : first + len(block)], len(sums))
        first += len(block)
    return sums


def _means(points: _Points, labels: Tensor, centroids: Tensor, sums: Tensor) -> Tensor:
    """The new centroids: means over all ranks, with empty clusters seeded again or left where they were."""
    counts = torch.bincount(labels, minlength=len(centroids)).double()
    sums, counts = points.ranks.sum(sums), points.ranks.sum(counts)
    if bool((counts == 0).any()):
        sums, counts = _reseed(points, labels, centroids, sums, counts)
    return torch.where(counts[:, None] > 0, sums / counts[:, None], centroids.double()).to(centroids.dtype)


def _squared_distances(points: _Points, labels: Tensor, centroids: Tensor) -> Tensor:
    """`(n,)`, to each row's own centroid; from differences, as products lose the digits of tight clusters."""
    parts, first = [], 0
    for block in _blocks(points.rows):
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
    init: Literal["k-means++", "random"] | Tensor = "k-means++",
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
        init: `"k-means++"`, `"random"` (K different rows, as in the paper), or the `(K, D)` centroids to
            start from.
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
    _check_features(features)
    for name, value in (
        ("num_clusters", num_clusters),
        ("max_iterations", max_iterations),
        ("n_init", n_init),
    ):
        if value < 1:
            raise ValueError(f"`{name}` should be at least 1. Found {value}.")
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"`tolerance` should be non-negative. Found {tolerance}.")
    if isinstance(init, Tensor) and init.shape != (num_clusters, features.shape[1]):
        raise ValueError(
            f"`init` should have shape {(num_clusters, features.shape[1])}. Found {tuple(init.shape)}."
        )
    if not isinstance(init, Tensor) and init not in ("k-means++", "random"):
        raise ValueError(f"`init` should be 'k-means++', 'random' or a tensor. Found {init!r}.")
    with _full_precision(features.device.type):
        points = _normalise(features, _Ranks(group))
        if points.total < num_clusters:
            raise ValueError(
                f"`features` should have at least `num_clusters = {num_clusters}` rows. Found {points.total}."
            )
        runs = (_run(points, num_clusters, init, generator, max_iterations, tolerance) for _ in range(n_init))
        best = min(runs, key=lambda run: float(run.inertia))
    # Back from the normalised scale.
    dtype = best.centroids.dtype
    centroids = ((best.centroids.double() + points.mean) / points.factor).to(dtype)
    inertia = (best.inertia / points.factor**2).to(dtype)
    return KMeansResult(best.assignments, centroids, inertia, best.iterations)


def _full_precision(device_type: str) -> AbstractContextManager[object]:
    """Distances keep their digits inside a user's autocast region."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


@torch.no_grad()
def purity(assignments: Tensor, labels: Tensor, *, group: dist.ProcessGroup | None = None) -> Tensor:
    r"""Share of rows that belong to the most frequent class of their cluster.

    $$P = \frac{1}{N} \sum_m \max_c |C_m \cap Z_c|$$

    Args:
        assignments: `(N,)`, any integers: each row's cluster.
        labels: `(N,)`, any integers: each row's class. Every value is a class, -100 as well.
        group: process group whose ranks hold a part of the rows each; the counts are summed.

    Returns:
        Scalar in (0, 1], in the default dtype.

    Raises:
        ValueError: if the arguments are not integer vectors of one length, or are empty.

    Example:
        >>> purity(torch.tensor([5, 5, 5, 9]), torch.tensor([0, 0, 1, 1]))
        tensor(0.7500)

    Reference:
        Wei et al., Diagnosing and Re-learning for Balanced Multimodal Learning, ECCV 2024, Eq. 3.
    """
    for name, values in (("assignments", assignments), ("labels", labels)):
        if values.dim() != 1 or values.is_floating_point() or values.is_complex():
            raise ValueError(
                f"`{name}` should be a vector of integers. Found shape {tuple(values.shape)}, dtype {values.dtype}."
            )
    if len(assignments) != len(labels):
        raise ValueError(
            f"`labels` should have one entry per assignment ({len(assignments)}). Found {len(labels)}."
        )
    ranks = _Ranks(group)
    total = int(ranks.sum(torch.tensor(len(labels), device=labels.device)))
    if total == 0:
        raise ValueError("`labels` should have at least one entry. Found none.")
    clusters, classes = assignments.long(), labels.to(assignments.device).long()
    first_cluster, cluster_count = _value_range(clusters, ranks)
    first_class, class_count = _value_range(classes, ranks)
    if cluster_count * class_count <= TABLE_CELLS:
        cells = (clusters - first_cluster) * class_count + (classes - first_class)
        table = torch.bincount(cells, minlength=cluster_count * class_count)
        return ranks.sum(table.view(cluster_count, class_count)).amax(1).sum() / total
    if group is not None:
        raise ValueError(
            f"`assignments` and `labels` should span at most {TABLE_CELLS} pairs of values over the ranks. "
            f"Found {cluster_count} x {class_count}."
        )
    # Widespread values: count the pairs that occur.
    clusters = torch.unique(clusters, return_inverse=True)[1]
    pairs, counts = torch.unique(torch.stack([clusters, classes]), dim=1, return_counts=True)
    largest = torch.zeros_like(counts).scatter_reduce_(0, pairs[0], counts, "amax")
    return largest.sum() / total


def _value_range(values: Tensor, ranks: _Ranks) -> tuple[int, int]:
    """Least value and number of integers from it to the largest, over all ranks."""
    if len(values):
        low, high = values.amin(), values.amax()
    else:
        low, high = (
            values.new_full((), torch.iinfo(torch.int64).max),
            values.new_full((), -torch.iinfo(torch.int64).max),
        )
    # The complement instead of the negative: the least int64 has no negative.
    extrema = ranks.max(torch.stack([~low, high])).tolist()
    first = ~extrema[0]
    return first, extrema[1] - first + 1


@torch.no_grad()
def reinit_strength(gap: Tensor | float, lam: float) -> Tensor:
    r"""How far a modality's encoder goes back to its initial weights.

    $$\alpha = \tanh(\lambda g)$$

    Args:
        gap: the purity gap $|P_D - P_V|$ between training and validation features, of any shape, or a float.
        lam: $\lambda \ge 0$; 0 never re-initialises.

    Returns:
        Tensor of the gap's shape and dtype (the default dtype for a float).

    Raises:
        ValueError: if `lam` is negative or not finite.

    Example:
        >>> reinit_strength(torch.tensor([0.0, 0.1]), lam=3.0)
        tensor([0.0000, 0.2913])

    Reference:
        Wei et al., Diagnosing and Re-learning for Balanced Multimodal Learning, ECCV 2024, Eq. 4-5.
    """
    if not (math.isfinite(lam) and lam >= 0):
        raise ValueError(f"`lam` should be non-negative and finite. Found {lam}.")
    values = torch.as_tensor(gap)
    return torch.tanh(lam * _wide(values)).to(values.dtype)


@torch.no_grad()
def soft_reinit_(
    params: Iterable[Tensor], initial: Iterable[Tensor], strength: float | Tensor | Sequence[float | Tensor]
) -> None:
    r"""Move parameters towards their initial values, in place.

    $$\theta \leftarrow (1 - \alpha) \theta + \alpha \theta^{\text{init}}$$

    Args:
        params: floating tensors, each once; leaf parameters too. They keep their storage.
        initial: one tensor per parameter, of its shape; another dtype or device is converted.
        strength: alpha in [0, 1], for all or one per parameter. 0 changes no bit, 1 copies the initial values
            (also over NaN). A tensor is read on the host.

    Raises:
        ValueError: if the lengths or shapes differ, a parameter is not floating or comes twice, or a strength
            is outside [0, 1].

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 3.0]))
        >>> soft_reinit_([weight], [torch.zeros(2)], 0.25)
        >>> weight.data
        tensor([0.7500, 2.2500])

    Reference:
        Wei et al., Diagnosing and Re-learning for Balanced Multimodal Learning, ECCV 2024, Eq. 6.
    """
    params, initial = list(params), list(initial)
    strengths = _strengths(strength, len(params))
    _check_pairs(params, initial)
    groups: dict[tuple[torch.device, torch.dtype, float], tuple[list[Tensor], list[Tensor]]] = {}
    for current, start, alpha in zip(params, initial, strengths, strict=True):
        if alpha > 0:
            targets, sources = groups.setdefault((current.device, current.dtype, alpha), ([], []))
            targets.append(current)
            sources.append(start.to(current.device, current.dtype))
    for (_, _, alpha), (targets, sources) in groups.items():
        if alpha == 1:
            torch._foreach_copy_(targets, sources)
        else:
            torch._foreach_lerp_(targets, sources, alpha)


def _strengths(strength: float | Tensor | Sequence[float | Tensor], count: int) -> list[float]:
    if isinstance(strength, Tensor):
        values = strength.tolist() if strength.dim() else [float(strength)] * count
    elif isinstance(strength, Sequence):
        values = [float(a) for a in strength]
    else:
        values = [float(strength)] * count
    if len(values) != count:
        raise ValueError(
            f"`strength` should be one value, or one per parameter ({count}). Found {len(values)}."
        )
    for alpha in values:
        if not 0 <= alpha <= 1:
            raise ValueError(f"`strength` should lie in [0, 1]. Found {alpha}.")
    return values


def _check_pairs(params: Sequence[Tensor], initial: Sequence[Tensor]) -> None:
    if len(params) != len(initial):
        raise ValueError(
            f"`initial` should have one tensor per parameter ({len(params)}). Found {len(initial)}."
        )
    if len({id(p) for p in params}) != len(params):
        raise ValueError("`params` should hold each tensor once. Found one twice.")
    for current, start in zip(params, initial, strict=True):
        if not (current.is_floating_point() or current.is_complex()):
            raise ValueError(f"`params` should be floating tensors. Found dtype {current.dtype}.")
        if current.shape != start.shape:
            raise ValueError(
                f"`initial` should have the shapes of `params`. Found {tuple(start.shape)} for {tuple(current.shape)}."
            )
