"""Rows of features, perhaps spread over ranks: reductions, blocks of bounded size, ranges."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from balanceopt.functional._together import Ask, Steps

# Entries of the largest temporary, features or distances of a block of rows: in cache on a CPU, a small part
# of the memory elsewhere.
BLOCK_ENTRIES_CPU = 2**20
BLOCK_ENTRIES = 2**26


class Ranks:
    """Reductions over the ranks that share the features; identity without a group."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.index = 0 if group is None else dist.get_rank(group)
        self.count = 1 if group is None else dist.get_world_size(group)

    def sum(self, values: Tensor) -> Steps[Tensor]:
        return values if self.group is None else (yield Ask(values, "sum"))

    def max(self, values: Tensor) -> Steps[Tensor]:
        return values if self.group is None else (yield Ask(values, "max"))

    def stack(self, values: Tensor) -> Steps[Tensor]:
        """`(ranks, ...)`, every rank's values."""
        slots = values.new_zeros(self.count, *values.shape)
        slots[self.index] = values
        return (yield from self.sum(slots))

    def from_first(self, values: Tensor) -> Steps[Tensor]:
        """Rank 0's values: what ranks drew each for itself becomes the same everywhere."""
        return (yield from self.sum(values if self.index == 0 else torch.zeros_like(values)))


def check_features(features: Tensor) -> None:
    if features.dim() != 2 or features.shape[1] == 0 or not features.is_floating_point():
        raise ValueError(
            "`features` should be a floating tensor of shape (N, D) with D > 0. "
            f"Found shape {tuple(features.shape)}, dtype {features.dtype}."
        )


def wide(features: Tensor) -> Tensor:
    return features if features.dtype == torch.float64 else features.float()


def row_blocks(features: Tensor, width: int = 0) -> list[Tensor]:
    """Views of consecutive rows, so that rows times the larger of D and `width` stays bounded."""
    entries = BLOCK_ENTRIES_CPU if features.device.type == "cpu" else BLOCK_ENTRIES
    step = max(1, entries // max(features.shape[1], width))
    return [features[first : first + step] for first in range(0, max(1, len(features)), step)]


def column_range(features: Tensor, ranks: Ranks) -> Steps[tuple[Tensor, Tensor]]:
    """Least and largest value of each column over all ranks, in float32 or wider."""
    # `aminmax` over the rows is an order of magnitude slower than these two.
    low = torch.full_like(features[:0].sum(0), math.inf, dtype=wide(features[:0]).dtype)
    high = -low
    for block in row_blocks(features):
        if len(block):
            low = torch.minimum(low, block.amin(0))
            high = torch.maximum(high, block.amax(0))
    extrema = torch.stack([-low, high])
    # A maximum over ranks may lose NaN, which has to be seen on all of them.
    extrema = yield from ranks.max(torch.where(extrema.isnan(), math.inf, extrema))
    return -extrema[0], extrema[1]
