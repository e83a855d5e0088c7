"""Dtypes of computations and of results."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(values: Tensor) -> Tensor:
    """Convert values to float32, or keep float64, for reductions that half precision would spoil."""
    return values if values.dtype == torch.float64 else values.float()


def narrowed(result: Tensor, like: Tensor) -> Tensor:
    """Convert a result to the dtype of a floating input; keep it for an integer input, which would truncate."""
    return result.to(like.dtype) if like.is_floating_point() else result
