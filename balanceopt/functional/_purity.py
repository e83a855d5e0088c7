"""How well clusters agree with classes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from balanceopt.functional._rows import Ranks
from balanceopt.functional._together import Steps, run_together, to_host

# Cells up to which purity counts in a dense table of clusters by classes.
TABLE_CELLS = 2**22


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
    (share,) = run_together([purity_steps(assignments, labels, group)], group)
    return share


def purity_steps(assignments: Tensor, labels: Tensor, group: dist.ProcessGroup | None) -> Steps[Tensor]:
    """`purity` as a computation beside others."""
    for name, values in (("assignments", assignments), ("labels", labels)):
        if values.dim() != 1 or values.is_floating_point() or values.is_complex():
            raise ValueError(
                f"`{name}` should be a vector of integers. Found shape {tuple(values.shape)}, dtype {values.dtype}."
            )
    if len(assignments) != len(labels):
        raise ValueError(
            f"`labels` should have one entry per assignment ({len(assignments)}). Found {len(labels)}."
        )
    ranks = Ranks(group)
    counted = yield from ranks.sum(torch.tensor(len(labels), device=labels.device))
    total = int((yield from to_host(counted)))
    if total == 0:
        raise ValueError("`labels` should have at least one entry. Found none.")
    clusters, classes = assignments.long(), labels.to(assignments.device).long()
    first_cluster, cluster_count = yield from _value_range(clusters, ranks)
    first_class, class_count = yield from _value_range(classes, ranks)
    if cluster_count * class_count <= TABLE_CELLS:
        cells = (clusters - first_cluster) * class_count + (classes - first_class)
        table = torch.bincount(cells, minlength=cluster_count * class_count)
        table = yield from ranks.sum(table.view(cluster_count, class_count))
        return table.amax(1).sum() / total
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


def _value_range(values: Tensor, ranks: Ranks) -> Steps[tuple[int, int]]:
    """Least value and number of integers from it to the largest, over all ranks."""
    if len(values):
        low, high = values.amin(), values.amax()
    else:
        low, high = (
            values.new_full((), torch.iinfo(torch.int64).max),
            values.new_full((), -torch.iinfo(torch.int64).max),
        )
    # The complement instead of the negative: the least int64 has no negative.
    largest = yield from ranks.max(torch.stack([~low, high]))
    extrema = (yield from to_host(largest)).tolist()
    first = ~extrema[0]
    return first, extrema[1] - first + 1
