"""In which dtype to reckon, and in which to answer."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(values: Tensor) -> Tensor:
    """At least float32: half precision would spoil a reduction, and integers are numbers."""
    return values if values.dtype == torch.float64 else values.float()


def narrowed(result: Tensor, like: Tensor) -> Tensor:
    """A result in the dtype of a floating input; as it is for an integer one, which would truncate it."""
    return result.to(like.dtype) if like.is_floating_point() else result
