"""How well clusters agree with classes."""

from __future__ import annotations

import torch
from torch import Tensor

from balanceopt._options import check_tensor

# Cells up to which purity counts in a dense table of clusters by classes.
TABLE_CELLS = 2**22


@torch.no_grad()
def purity(assignments: Tensor, labels: Tensor) -> Tensor:
    r"""Share of rows that belong to the most frequent class of their cluster.

    $$P = \frac{1}{N} \sum_m \max_c |C_m \cap Z_c|$$

    Args:
        assignments: `(N,)`, any integers: each row's cluster.
        labels: `(N,)`, any integers: each row's class. Every value is a class, -100 as well.

    Returns:
        Scalar in (0, 1], float32.

    Raises:
        ValueError: if the arguments are not integer vectors of one length, or are empty.
        TypeError: if one is no tensor.

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
        return _share(table.view(cluster_count, class_count).amax(1).sum(), total)
    # Widespread values: count the pairs that occur.
    clusters = torch.unique(clusters, return_inverse=True)[1]
    pairs, counts = torch.unique(torch.stack([clusters, classes]), dim=1, return_counts=True)
    largest = torch.zeros_like(counts).scatter_reduce_(0, pairs[0], counts, "amax")
    return _share(largest.sum(), total)


def _share(count: Tensor, total: int) -> Tensor:
    return count.float() / total  # a quotient of integers would be of the user's default dtype


def _value_range(values: Tensor) -> tuple[int, int]:
    """Least value and number of integers from it to the largest."""
    first, last = (int(value) for value in torch.aminmax(values))
    return first, last - first + 1
