"""The noise that a parameter gets, by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from balanceopt.modulation._noise import scale_and_add_gaussians_


def gaussian_like(tensor: Tensor, seed: int, step: int, index: int, *, compiled: bool = False) -> Tensor:
    """Standard normal numbers in the shape, dtype and layout of `tensor`."""
    noise = torch.zeros_like(tensor)
    one = torch.ones(1, device=tensor.device)
    scale_and_add_gaussians_([noise], one, one, seed, step, [index], compiled=compiled)
    return noise
