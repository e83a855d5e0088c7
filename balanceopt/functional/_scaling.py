"""Scaling of features before clustering, in blocks of rows of bounded size."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from balanceopt._options import check_tensor
from balanceopt.functional._dtypes import wide

# Entries of the largest temporary, a block's features or distances: on a CPU the block fits into the cache, on a device
# it takes a small part of the memory.
BLOCK_ENTRIES_CPU = 2**20
BLOCK_ENTRIES = 2**26


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
