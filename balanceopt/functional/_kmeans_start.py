"""Where k-means starts: greedy k-means++."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from balanceopt.functional._rows import Ranks, column_range, row_blocks, wide
from balanceopt.functional._together import Steps, to_host

# k-means++ reads all its rows once per cluster, so from twice as many rows on it works on a random subset: of this
# many rows, and of so many per cluster. Over 60 seeds inertia and purity were those of all rows.
START_ROWS = 4096
START_ROWS_PER_CLUSTER = 64


@dataclass(frozen=True, eq=False)
class Points:
    """Features brought near 0 and 1, where float32 distances by products are exact enough."""

    rows: Tensor  # (n, D): features * factor - mean
    norms: Tensor  # (n,): squared norms of the rows
    mean: Tensor  # (D,) float64
    factor: float  # a power of 2
    total: int  # rows over all ranks
    offset: int  # rows on the ranks before this one
    variance: float  # mean over the features, over all ranks
    ranks: Ranks


def normalise(features: Tensor, ranks: Ranks) -> Steps[Points]:
    low, high = yield from column_range(features, ranks)
    stacked = yield from ranks.stack(torch.tensor(len(features), device=features.device))
    counts = [int(count) for count in (yield from to_host(stacked))]
    total = sum(counts)
    largest = float((yield from to_host(torch.maximum(low.abs(), high.abs()).amax())))
    if total == 0 or not math.isfinite(largest):
        raise ValueError(
            f"`features` should be finite with at least one row. Found {total} rows, not all finite."
        )
    # A power of 2 changes no digit; the bound keeps it a normal float32.
    factor = 2.0 ** -max(-126, min(126, math.frexp(largest)[1]))
    mean = torch.zeros(features.shape[1], dtype=torch.float64, device=features.device)
    for block in row_blocks(features):
        mean += low.new_full((len(block),), factor) @ wide(block)
    mean = ((yield from ranks.sum(mean)) / total).to(low.dtype).double()
    rows = torch.add(-mean.to(low.dtype), wide(features), alpha=factor)
    norms = torch.linalg.vector_norm(rows, dim=1).square_()
    squares = yield from ranks.sum(norms.sum(dtype=torch.float64))
    variance = float((yield from to_host(squares))) / (total * rows.shape[1])
    return Points(rows, norms, mean, factor, total, sum(counts[: ranks.index]), variance, ranks)


def rows_at(points: Points, ends: Tensor, start: Tensor | int, targets: Tensor) -> Steps[Tensor]:
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
    return (yield from points.ranks.sum(rows))


def draw_uniform(points: Points, shape: tuple[int, ...], generator: torch.Generator | None) -> Steps[Tensor]:
    device = points.rows.device
    source = device if generator is None else generator.device
    numbers = torch.rand(shape, generator=generator, dtype=torch.float64, device=source)
    return (yield from points.ranks.from_first(numbers.to(device)))


def _subset(points: Points, count: int, generator: torch.Generator | None) -> Steps[Points]:
    """`count` of the rows without replacement, all equally likely, on the ranks where they are."""
    numbers = yield from draw_uniform(points, (points.total,), generator)
    chosen = numbers.argsort(stable=True)[:count].sort().values
    local = chosen - points.offset
    mine = local[(local >= 0) & (local < len(points.rows))]
    offset = int((local < 0).sum())
    return replace(points, rows=points.rows[mine], norms=points.norms[mine], total=count, offset=offset)


def plus_plus_start(points: Points, clusters: int, generator: torch.Generator | None) -> Steps[Tensor]:
    """Greedy k-means++: of 2 + log K candidates drawn by squared distance, the one that lowers the sum most."""
    enough = max(START_ROWS, START_ROWS_PER_CLUSTER * clusters)
    if points.total > 2 * enough:
        points = yield from _subset(points, enough, generator)
    rows, norms, ranks = points.rows, points.norms, points.ranks
    draws = yield from draw_uniform(points, (clusters, 2 + int(math.log(clusters))), generator)
    ends = torch.arange(1, len(rows) + 1, device=rows.device)
    centroids = rows.new_empty(clusters, rows.shape[1])
    first = (draws[0, :1] * points.total).long()
    centroids[:1] = yield from rows_at(points, ends, points.offset, first)
    nearest = distances_to(rows, norms, centroids[:1])[0]
    potential = yield from ranks.sum(nearest.sum().double())
    for place in range(1, clusters):
        # Running sums of integers are exact: the same on every device and with the rows cut in any way.
        weights = (nearest.double() * torch.where(potential > 0, 2.0**40 / potential, 0.0)).long()
        ends = torch.where(potential > 0, weights, 1).cumsum(0)
        sums = yield from ranks.stack(ends[-1] if len(ends) else ends.sum())
        targets = (draws[place] * sums.sum()).long()
        candidates = yield from rows_at(points, ends, sums[: ranks.index].sum(), targets)
        distances = torch.minimum(distances_to(rows, norms, candidates), nearest)
        potentials = yield from ranks.sum(distances.sum(1).double())
        best = potentials.argmin()
        nearest, potential, centroids[place] = distances[best], potentials[best], candidates[best]
    return centroids


def distances_to(rows: Tensor, norms: Tensor, centroids: Tensor) -> Tensor:
    """`(K, n)` squared distances, for few centroids."""
    products = torch.addmm(norms[None], centroids, rows.T, alpha=-2)
    return products.add_(centroids.square().sum(1)[:, None]).clamp_min_(0)
