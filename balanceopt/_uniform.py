"""Uniform numbers by counting: number j of a stream is a function of (seed, step, stream) and of j alone.

A stream is that of the generator splitmix64 from a state that depends on the three. So ranks, devices and resumed runs
draw the same numbers, and those of many streams are made in the same few operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from balanceopt._splitmix import GOLDEN, each_mixed_in, int64, mixed, output, shifted

# A float64 holds so many bits of a word.
_BITS = 53


@torch.no_grad()
def uniforms(seed: int, step: int, streams: Tensor, count: int) -> Tensor:
    """The first `count` numbers of each stream.

    Args:
        seed: of all randomness.
        step: number of the step.
        streams: int64 `(n,)`.
        count: how many of each.

    Returns:
        float64 `(n, count)` in [0, 1), multiples of 2^-53.
    """
    states = each_mixed_in(mixed(seed, step), streams)
    steps = torch.arange(1, count + 1, device=streams.device) * int64(GOLDEN)
    return shifted(output(states[:, None] + steps), 64 - _BITS).double() * 2.0**-_BITS
