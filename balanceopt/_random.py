"""Randomness as a function of (seed, step, parameter): the same on every rank, and again after a resume."""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 2**64 - 1


def generator_for(seed: int, step: int, index: int, device: torch.device) -> torch.Generator:
    """A generator whose stream depends on nothing but its arguments."""
    generator = torch.Generator(device)
    generator.manual_seed(mixed(seed, step, index) >> 1)  # manual_seed takes 63 bits on every device
    return generator


def gaussian_like(tensor: Tensor, seed: int, step: int, index: int) -> Tensor:
    """Standard normal numbers in the shape, dtype and (for DTensors) layout of `tensor`.

    A sharded tensor gets its part of the noise that the whole one would get.
    """
    dtype = tensor.dtype if tensor.dtype in (torch.float32, torch.float64) else torch.float32
    generator = generator_for(seed, step, index, tensor.device)
    noise = torch.randn(tensor.shape, dtype=dtype, device=tensor.device, generator=generator).to(tensor.dtype)
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is None:
        return noise
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(noise, mesh, tensor.placements, src_data_rank=None)  # type: ignore[attr-defined]


def mixed(*words: int) -> int:
    """64 well-mixed bits of several integers (the finaliser of splitmix64, chained)."""
    state = 0
    for word in words:
        state = (state ^ (word & _WORD)) + 0x9E3779B97F4A7C15 & _WORD
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _WORD
        state ^= state >> 31
    return state
