"""Dtypes of computations and of results."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def wide(values: Tensor) -> Tensor:
    """Convert values to float32, or keep float64, for reductions that half precision would spoil."""
    return values if values.dtype == torch.float64 else values.float()


def narrowed(result: Tensor, like: Tensor) -> Tensor:
    """Convert a result to the dtype of a floating input; keep it for an integer input, which would truncate."""
    return result.to(like.dtype) if like.is_floating_point() else result


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Disable autocast where a type of device has it, so that operations run in the dtypes of their tensors."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
