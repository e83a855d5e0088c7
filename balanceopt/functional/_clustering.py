"""Clustering of features on their device: scaling, k-means (Lloyd's iterations from a k-means++ start), and purity.

Every decision is computed in an order that does not depend on the processor, the number of threads or a row's index:
distances in the start are whole numbers, sums are pairwise or row by row, and matrix products, whose last digits
depend on the processor, only exclude the centroids that are certainly not the nearest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from balanceopt._options import check_count, check_generator, check_number, check_tensor
from balanceopt.functional._dtypes import wide, without_autocast
from balanceopt.functional._sampling import uniforms_like

# Entries of the largest temporary, a block's features or distances: on a CPU the block fits into the cache, on a device
# it takes a small part of the memory.
BLOCK_ENTRIES_CPU = 2**20
BLOCK_ENTRIES = 2**26

# k-means++ reads all rows once per cluster, so from twice as many rows on it uses a random subset of this size, the
# larger of the two. Over 400 seeds 2048 rows hit as many of 6 true clusters as all rows. With 24 rows for each of 309
# clusters the purity after the iterations was 0.73 and 0.81 for two seeds, with 64 it was 0.86 and 0.83.
START_ROWS = 2048
START_ROWS_PER_CLUSTER = 64

# Upper limit of the cells of purity's dense table of clusters by classes, which bounds the memory.
TABLE_CELLS = 2**22


@dataclass(frozen=True, eq=False)
class KMeansResult:
    """The result of `kmeans`.

    Attributes:
        assignments: `(N,)` int64, the index of each row's nearest centroid.
        centroids: `(K, D)`, in float32 or wider.
        inertia: scalar, sum of the squared distances to the nearest centroid.
        iterations: number of Lloyd iterations of the best run.
    """

    assignments: Tensor
    centroids: Tensor
    inertia: Tensor
    iterations: int


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
) -> KMeansResult:
    r"""Cluster rows by k-means: Lloyd's iterations from a greedy k-means++ start.

    $$\phi_i \in C_m \iff \lVert \phi_i - O_m \rVert \le \lVert \phi_i - O_j \rVert \ \forall j, \quad
    O_m = \mathrm{mean}(C_m)$$

    Stops when no assignment changes, or when the centroids' squared shifts sum to at most `tolerance` times
    the features' mean variance. A cluster that loses all its rows gets the row farthest from its centroid.

    A row's assignment is a function of the row and the centroids alone, so equal rows are in one cluster: distances
    are compared in float64, and a tie goes to the first centroid. On a CPU the same features and generator state
    give the same bits on every processor, with any number of threads; on an accelerator sums of rows may differ
    by the rounding of float32.

    Args:
        features: `(N, D)`, finite; half precision and integers are computed in float32. Temporaries are one copy of the
            features and a bounded block.
        num_clusters: number of clusters K, from 1 to N.
        generator: random generator of the start, on any device, whose numbers depend on the generator's device alone;
            None for torch's default one.
        init: initial centroids `(K, D)`; None for k-means++.
        max_iterations: upper limit of a run's Lloyd iterations, >= 1.
        tolerance: relative tolerance of the stopping rule, >= 0; 0 runs until no assignment changes.
        n_init: number of starts, >= 1; the run with the least inertia is returned.

    Returns:
        `KMeansResult`: assignments `(N,)`, centroids `(K, D)`, inertia, iterations.

    Raises:
        ValueError: if `features` is not a finite real `(N, D)` tensor with `N >= num_clusters`, or another argument
            is outside its range.
        TypeError: if `features` or `init` is not a tensor, or `generator` not a `torch.Generator`.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [8.0, 8.0], [8.0, 9.0]])
        >>> result = kmeans(x, 2, generator=torch.Generator().manual_seed(0))
        >>> bool(result.assignments[0] == result.assignments[1]), float(result.inertia)
        (True, 1.0)

    Reference:
        Wei et al., Diagnosing and Re-learning for Balanced Multimodal Learning, ECCV 2024, Eq. 1-2; start:
        Arthur and Vassilvitskii, k-means++, 2007, greedy as in scikit-learn.
    """
    features = floating_features(features)
    counts = {"num_clusters": num_clusters, "max_iterations": max_iterations, "n_init": n_init}
    for name, value in counts.items():
        check_count(name, value, at_least=1)
    check_number("tolerance", tolerance, at_least=0)
    check_generator(generator)
    if init is not None:
        check_tensor("init", init, f"{(num_clusters, features.shape[1])}")
        if init.shape != (num_clusters, features.shape[1]) or not bool(torch.isfinite(init).all()):
            raise ValueError(
                f"`init` should have shape {(num_clusters, features.shape[1])}, and finite numbers. "
                f"Found shape {tuple(init.shape)}{'' if init.isfinite().all() else ', not all finite'}."
            )
    points = _normalise(features)
    if len(features) < num_clusters:
        raise ValueError(
            f"`features` should have at least `num_clusters = {num_clusters}` rows. Found {len(features)}."
        )
    least_shift = tolerance * points.variance
    with _full_precision(features.device.type):
        runs = (
            _run(points, num_clusters, init, generator, max_iterations, least_shift) for _ in range(n_init)
        )
        best = min(runs, key=lambda run: float(run.inertia))
    # Undo the normalised scale, so that callers get centroids of their features.
    dtype = best.centroids.dtype
    centroids = ((best.centroids.double() + points.centre) / points.factor).to(dtype)
    inertia = (best.inertia / points.factor**2).to(dtype)
    return KMeansResult(best.assignments, centroids, inertia, best.iterations)


@dataclass(frozen=True, eq=False)
class _Points:
    """Features normalised near 0 and 1, where distances by products are exact enough."""

    rows: Tensor  # (N, D): features * factor - centre
    norms: Tensor  # (N,): norms of the rows
    centre: Tensor  # (D,) float64
    factor: float  # a power of 2
    variance: float  # mean over the features


def _normalise(features: Tensor) -> _Points:
    low, high = column_range(features)
    largest = float(torch.maximum(low.abs(), high.abs()).amax())
    if not math.isfinite(largest):
        raise ValueError(
            f"`features` should be finite with at least one row. Found {len(features)} rows, not all finite."
        )
    # A power of 2 changes no digit; the bound keeps the factor a normal float32.
    factor = 2.0 ** -max(-126, min(126, math.frexp(largest)[1]))
    rows = wide(features) * factor
    total = torch.zeros_like(low, dtype=torch.float64)
    for block in row_blocks(rows):
        total += _pairwise_sum(block, 0)
    centre = (total / len(rows)).to(rows.dtype)
    squares = torch.cat([_pairwise_sum(block.sub_(centre).square(), 1) for block in row_blocks(rows)])
    variance = float(_pairwise_sum(squares.double(), 0)) / rows.numel()
    return _Points(rows, squares.sqrt(), centre.double(), factor, variance)


def _pairwise_sum(values: Tensor, dim: int) -> Tensor:
    """Sum along a dimension in an order that depends on the length alone, for the same bits on every processor."""
    length = values.shape[dim]
    while length > 1:
        half, odd = divmod(length, 2)
        last = values.narrow(dim, length - 1, 1)
        values = values.narrow(dim, 0, half) + values.narrow(dim, half, half)
        if odd:
            values.narrow(dim, 0, 1).add_(last)
        length = half
    return values.squeeze(dim)


def _run(
    points: _Points,
    clusters: int,
    init: Tensor | None,
    generator: torch.Generator | None,
    max_iterations: int,
    least_shift: float,
) -> KMeansResult:
    """Run k-means from one start on normalised features."""
    if init is None:
        start = _plus_plus_start(points.rows, clusters, generator)
    else:
        start = (init.to(points.centre) * points.factor - points.centre).to(points.rows.dtype)
    assignments, centroids, iterations = _lloyd(points, start, max_iterations, least_shift)
    inertia = _pairwise_sum(_squared_distances(points.rows, assignments, centroids).double(), 0)
    return KMeansResult(assignments, centroids, inertia, iterations)


# -- the start -------------------------------------------------------------------------------------------------------


def _plus_plus_start(rows: Tensor, clusters: int, generator: torch.Generator | None) -> Tensor:
    """Choose initial centroids by greedy k-means++, each the best of 2 + log K candidates drawn by squared distance."""
    enough = max(START_ROWS, START_ROWS_PER_CLUSTER * clusters)
    if len(rows) > 2 * enough:
        order = uniforms_like(rows, (len(rows),), generator).argsort(stable=True)
        rows = rows[order[:enough].sort().values]
    draws = uniforms_like(rows, (clusters, 2 + int(math.log(clusters))), generator)
    whole = _whole_numbers(rows)
    norms = whole.square().sum(1)
    index = torch.empty(clusters, dtype=torch.int64, device=rows.device)
    index[0] = (draws[0, 0] * len(rows)).long()
    nearest = _distances_between(whole, norms, index[:1])[0]
    for number in range(1, clusters):
        weights = torch.where(nearest.any(), nearest, 1).long()
        ends = weights.cumsum(0)
        targets = torch.minimum((draws[number] * ends[-1]).long(), ends[-1] - 1)
        candidates = torch.searchsorted(ends, targets, right=True)
        distances = torch.minimum(_distances_between(whole, norms, candidates), nearest)
        best = distances.long().sum(1).argmin()
        nearest, index[number] = distances[best], candidates[best]
    return rows[index]


def _whole_numbers(rows: Tensor) -> Tensor:
    """Round rows to the finest float64 grid on which products of rows and sums of distances stay whole numbers.

    No order of summation then changes a bit, so the same draws choose the same rows on every device.
    """
    width, count = rows.shape[1].bit_length(), len(rows).bit_length()
    # With coordinates up to 2^bits a squared distance is below 2^53, and a sum of `count` of them below 2^63.
    bits = min(51 - width, 61 - width - count) // 2
    return (rows.double() * 2.0 ** (bits - math.frexp(float(rows.abs().amax()))[1])).round_()


def _distances_between(whole: Tensor, norms: Tensor, index: Tensor) -> Tensor:
    """Compute the squared distances `(len(index), n)` of all rows to the rows at `index`."""
    products = torch.addmm(norms[None], whole[index], whole.T, alpha=-2)
    return products.add_(norms[index, None])


# -- iterations ------------------------------------------------------------------------------------------------------


def _lloyd(
    points: _Points, centroids: Tensor, max_iterations: int, least_shift: float
) -> tuple[Tensor, Tensor, int]:
    """Run Lloyd's iterations; return assignments, the centroids assigned to, and the number of iterations."""
    rows = points.rows
    labels = torch.full((len(rows),), -1, dtype=torch.int64, device=rows.device)
    sums = torch.zeros(centroids.shape, dtype=torch.float64, device=rows.device)
    shift = sums.new_full((), math.inf)
    iteration = 0
    while True:
        previous, labels = labels, _assign(points, centroids)
        changed = labels != previous
        counts = torch.bincount(labels, minlength=len(centroids)).double()
        # One device synchronisation for all three numbers; ties between centroids need a second one.
        facts = torch.stack([shift, changed.sum().double(), (counts == 0).sum().double()])
        moved, changes, empty = facts.tolist()
        if moved <= least_shift or iteration == max_iterations:
            return labels, centroids, iteration
        iteration += 1
        # Without a change the centroids are the clusters' means already.
        if not changes:
            return labels, centroids, iteration
        sums = _update_sums(rows, sums, previous, labels, changed, int(changes))
        total = sums
        if empty:
            total, counts = _reseed(points, labels, centroids, sums, counts)
        means = torch.where(counts[:, None] > 0, total / counts[:, None], centroids.double())
        before, centroids = centroids, means.to(centroids.dtype)
        shift = _pairwise_sum((centroids.double() - before.double()).square_().flatten(), 0)


def _assign(points: _Points, centroids: Tensor) -> Tensor:
    """Find the index `(N,)` of each row's nearest centroid."""
    # |x|^2 is the same for all centroids, so |c|^2 - 2 xc decides.
    offsets = centroids.square().sum(1)
    lengths = offsets.sqrt()
    labels, gaps = [], []
    for block in row_blocks(points.rows, len(centroids)):
        scores = torch.addmm(offsets, block, centroids.T, alpha=-2)
        least, nearest = scores.min(1)
        labels.append(nearest)
        gaps.append(scores.scatter_(1, nearest[:, None], math.inf).amin(1) - least)
    nearest = torch.cat(labels)
    close = (torch.cat(gaps) <= 2 * _rounding(centroids, points.norms, lengths.amax())).nonzero()
    for index in row_blocks(close, max(centroids.shape)):
        rows, norms = points.rows[index[:, 0]], points.norms[index]
        scores = torch.addmm(offsets, rows, centroids.T, alpha=-2)
        rounding = _rounding(centroids, norms, lengths)
        possible = scores - rounding <= (scores + rounding).amin(1, keepdim=True)
        nearest[index[:, 0]] = _nearest_of(rows, centroids, possible)
    return nearest


def _rounding(centroids: Tensor, norms: Tensor, lengths: Tensor) -> Tensor:
    """Bound the error of |c|^2 - 2 xc by products in any order, and of |x - c|^2 in float64."""
    width, single, double = centroids.shape[1], torch.finfo(centroids.dtype), torch.finfo(torch.float64)
    # Each rounding costs half an eps; 0.6 leaves room for products of roundings.
    products = 0.6 * (width + 8) * single.eps * lengths * (lengths + 2 * norms)
    differences = (math.log2(width) + 8) * double.eps * (lengths + norms).square()
    return products + differences + width * single.tiny


def _nearest_of(rows: Tensor, centroids: Tensor, possible: Tensor) -> Tensor:
    """Find the first nearest centroid `(n,)` among the `possible` `(n, K)` ones, by float64 distances."""
    distances = torch.full(possible.shape, math.inf, dtype=torch.float64, device=rows.device)
    for pairs in row_blocks(possible.nonzero(), rows.shape[1]):
        row, column = pairs.unbind(1)
        apart = rows[row].double() - centroids[column].double()
        distances[row, column] = _pairwise_sum(apart.square_(), 1)
    return distances.argmin(1)


def _squared_distances(rows: Tensor, labels: Tensor, centroids: Tensor) -> Tensor:
    """Compute squared distances `(N,)` to each row's centroid by differences; products would lose digits."""
    blocks = row_blocks(rows)
    parts = zip(blocks, labels.split(len(blocks[0])), strict=True)
    apart = (centroids.index_select(0, label).sub_(block) for block, label in parts)
    return torch.cat([_pairwise_sum(difference.square_(), 1) for difference in apart])


def _update_sums(
    rows: Tensor, sums: Tensor, previous: Tensor, labels: Tensor, changed: Tensor, count: int
) -> Tensor:
    """Sum each cluster's rows in float64, `(K, D)`; from the `count` changed rows alone where few changed."""
    if 8 * count <= len(rows):
        which = torch.nonzero_static(changed, size=count)[:, 0]
        few = rows[which].double()
        gained = _sum_by_cluster(few, labels[which], len(sums))
        return sums + gained - _sum_by_cluster(few, previous[which], len(sums))
    sums = torch.zeros_like(sums)
    blocks = row_blocks(rows)
    for block, label in zip(blocks, labels.split(len(blocks[0])), strict=True):
        sums += _sum_by_cluster(block, label, len(sums))
    return sums


def _sum_by_cluster(block: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """Sum each cluster's rows, `(K, D)`, in an order that does not change from run to run."""
    if block.device.type == "cpu":
        return block.new_zeros(clusters, block.shape[1]).index_add_(0, labels, block)
    return _sum_by_sorting(block, labels, clusters)


def _sum_by_sorting(block: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """Sum each cluster's rows after a sort, because a GPU's `index_add_` has no fixed order of addition."""
    counts = torch.bincount(labels, minlength=clusters)
    return torch.nn.functional.embedding_bag(
        labels.argsort(stable=True), block, counts.cumsum(0) - counts, mode="sum"
    )


def _reseed(
    points: _Points, labels: Tensor, centroids: Tensor, sums: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """Update sums and counts so that each empty cluster gets one of the rows farthest from their centroids."""
    distances = _squared_distances(points.rows, labels, centroids)
    # A row on its centroid, up to rounding, is no seed, so clusters beyond the number of distinct rows stay empty.
    rounding = 8 * torch.finfo(distances.dtype).eps * points.norms
    distances = torch.where(distances > rounding.square(), distances, 0)
    empty = (counts == 0).nonzero()[:, 0]
    far, index = distances.sort(descending=True, stable=True)
    index = index[: int((far[: len(empty)] > 0).sum())]
    empty, full, rows = empty[: len(index)], labels[index], points.rows[index].double()
    ones = counts.new_ones(len(index))
    sums = sums.index_add(0, full, -rows).index_copy_(0, empty, rows)
    return sums, counts.index_add(0, full, -ones).index_copy_(0, empty, ones)


@contextmanager
def _full_precision(device_type: str) -> Iterator[None]:
    """Run float32 matrix products in full precision, despite the user's autocast region or precision setting."""
    backends = (torch.backends.cuda, torch.backends.mkldnn)
    matmuls: list[Any] = [
        m for backend in backends if hasattr(m := getattr(backend, "matmul", None), "fp32_precision")
    ]
    with ExitStack() as stack:
        stack.enter_context(without_autocast(device_type))
        for matmul in matmuls:
            stack.callback(setattr, matmul, "fp32_precision", matmul.fp32_precision)
            matmul.fp32_precision = "ieee"
        if not matmuls:  # torch before 2.9
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        yield


# -- purity ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def purity(assignments: Tensor, labels: Tensor) -> Tensor:
    r"""Compute the share of rows that belong to the most frequent class of their cluster.

    $$P = \frac{1}{N} \sum_m \max_c |C_m \cap Z_c|$$

    Args:
        assignments: `(N,)`, each row's cluster, any integers.
        labels: `(N,)`, each row's class, any integers; -100 is a class too.

    Returns:
        Scalar in (0, 1], float32.

    Raises:
        ValueError: if the arguments are not integer vectors of one length, or are empty.
        TypeError: if `assignments` or `labels` is not a tensor.

    Example:
        >>> purity(torch.tensor([5, 5, 5, 9]), torch.tensor([0, 0, 1, 1]))
        tensor(0.7500)

    Reference:
        Wei et al., Diagnosing and Re-learning for Balanced Multimodal Learning, ECCV 2024, Eq. 3.
    """
    check_tensor("assignments", assignments, "(N,)", dims=(1,), kind="integer")
    check_tensor("labels", labels, "(N,)", dims=(1,), kind="integer")
    if len(assignments) != len(labels):
        raise ValueError(
            f"`labels` should have one entry per assignment ({len(assignments)}). Found {len(labels)}."
        )
    total = len(labels)
    if total == 0:
        raise ValueError("`labels` should have at least one entry. Found none.")
    clusters, classes = assignments.long(), labels.to(assignments.device).long()
    first_cluster, cluster_count = _value_range(clusters)
    first_class, class_count = _value_range(classes)
    if cluster_count * class_count <= TABLE_CELLS:
        cells = (clusters - first_cluster) * class_count + (classes - first_class)
        table = torch.bincount(cells, minlength=cluster_count * class_count)
        largest = table.view(cluster_count, class_count).amax(1)
    else:  # the table would be too large, so only the pairs that occur are counted
        clusters = torch.unique(clusters, return_inverse=True)[1]
        pairs, counts = torch.unique(torch.stack([clusters, classes]), dim=1, return_counts=True)
        largest = torch.zeros_like(counts).scatter_reduce_(0, pairs[0], counts, "amax")
    return largest.sum().float() / total  # a quotient of integers would have the user's default dtype


def _value_range(values: Tensor) -> tuple[int, int]:
    """Return the least value and the number of integers from the least to the largest value."""
    first, last = (int(value) for value in torch.aminmax(values))
    return first, last - first + 1


# -- scaling, and blocks of rows of bounded size ----------------------------------------------------------------------


@torch.no_grad()
def minmax_scale(features: Tensor) -> Tensor:
    r"""Scale each feature to the range from -1 to 1, as the published code does before clustering.

    $$x' = 2 (x - \min x) / (\max x - \min x) - 1$$

    with a range of 0 taken as 1, so that a constant feature becomes -1.

    Args:
        features: `(N, D)`, finite.

    Returns:
        `(N, D)`, in the dtype of `features` (computed in float32 or wider); float32 for integers.

    Raises:
        ValueError: if `features` is not a real `(N, D)` tensor, is empty, or a feature's range is not finite.
        TypeError: if `features` is not a tensor.

    Example:
        >>> minmax_scale(torch.tensor([[0.0, 7.0], [1.0, 7.0], [4.0, 7.0]]))
        tensor([[-1.0000, -1.0000],
                [-0.5000, -1.0000],
                [ 1.0000, -1.0000]])

    Reference:
        Wei et al., Diagnosing and Re-learning for Balanced Multimodal Learning, ECCV 2024: the authors'
        published code (`code/ours.py`).
    """
    features = floating_features(features)
    low, high = column_range(features)
    spread = high - low
    if not torch.isfinite(spread).all():
        raise ValueError(
            "`features` should be finite with at least one row. Found an entry or range that is not."
        )
    factor = torch.where(spread < torch.finfo(spread.dtype).tiny, 2.0, 2 / spread)
    scaled = torch.empty_like(features, memory_format=torch.contiguous_format)
    for block, target in zip(row_blocks(features), row_blocks(scaled), strict=True):
        if block.dtype == low.dtype:
            torch.sub(block, low, out=target).mul_(factor).sub_(1)
        else:
            target.copy_((block - low).mul_(factor).sub_(1))
    return scaled


def floating_features(features: Tensor) -> Tensor:
    """Check features `(N, D)` and convert integers to float32.

    Raises:
        TypeError: if `features` is not a tensor.
        ValueError: if `features` is complex, of another shape or without a column.
    """
    check_tensor("features", features, "(N, D)", dims=(2,))
    if features.shape[1] == 0:
        raise ValueError(f"`features` should have shape (N, D) with D > 0. Found {tuple(features.shape)}.")
    return features if features.is_floating_point() else wide(features)


def row_blocks(features: Tensor, width: int = 0) -> list[Tensor]:
    """Split features into views of consecutive rows, with rows times the larger of D and `width` bounded."""
    entries = BLOCK_ENTRIES_CPU if features.device.type == "cpu" else BLOCK_ENTRIES
    step = max(1, entries // max(features.shape[1], width))
    return list(features.split(step))


def column_range(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least and largest value of each column, in float32 or wider; NaN where a column holds NaN."""
    # `amin` and `amax` are an order of magnitude faster than `aminmax` over the rows.
    low = torch.full_like(features[:0].sum(0), math.inf, dtype=wide(features[:0]).dtype)
    high = -low
    for block in row_blocks(features):
        if len(block):
            low = torch.minimum(low, block.amin(0))
            high = torch.maximum(high, block.amax(0))
    return low, high
