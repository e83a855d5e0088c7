"""Randomness as a function of (seed, step, parameter): the same on every rank and after a resume.

Integers are hashed by the mixing function of the generator splitmix64. Uniform numbers are counter-based: number
j of a stream is a function of (seed, step, stream, j) in integer arithmetic, the same on any device.
A `torch.Generator`, seeded by a hash, gives other numbers on another type of device.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_WORD = 2**64 - 1
# splitmix64's shift and factor of each round, then its last shift.
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31
# A float64 has 53 bits of precision.
_BITS = 53


def mixed(*words: int) -> int:
    """Hash several integers into one 64-bit integer."""
    state = 0
    for word in words:
        state = mixed_in(state, word)
    return state


def mixed_in(state: int, word: int) -> int:
    """Hash one more integer into a hash state."""
    state = (state ^ (word & _WORD)) + _GOLDEN & _WORD
    for shift, factor in _ROUNDS:
        state = (state ^ (state >> shift)) * factor & _WORD
    return state ^ (state >> _LAST_SHIFT)


def generator_for(seed: int, step: int, index: int, device: torch.device) -> torch.Generator:
    """Make a `torch.Generator` whose stream depends on the arguments alone."""
    generator = torch.Generator(device)
    generator.manual_seed(mixed(seed, step, index) >> 1)  # a seed has 63 bits on every device
    return generator


@torch.no_grad()
def uniforms(seed: int, step: int, streams: Tensor, count: int) -> Tensor:
    """Make the first `count` uniform numbers of each stream.

    Args:
        seed: seed of all randomness.
        step: index of the step.
        streams: stream indices, int64 `(n,)`.
        count: how many numbers of each stream.

    Returns:
        float64 `(n, count)` in [0, 1), multiples of 2^-53.
    """
    golden = _int64(_GOLDEN)
    states = _output((streams ^ _int64(mixed(seed, step))) + golden)  # `mixed_in`, for each stream
    steps = torch.arange(1, count + 1, dtype=torch.int64, device=streams.device) * golden
    return _shifted(_output(states[:, None] + steps), 64 - _BITS).double() * 2.0**-_BITS


def _output(states: Tensor) -> Tensor:
    """Compute splitmix64's output for each state."""
    for shift, factor in _ROUNDS:
        states = (states ^ _shifted(states, shift)) * _int64(factor)
    return states ^ _shifted(states, _LAST_SHIFT)


def _shifted(words: Tensor, shift: int) -> Tensor:
    """Shift int64 words to the right and fill with zeros, where torch's shift copies the sign."""
    return (words >> shift) & ((1 << (64 - shift)) - 1)


def _int64(word: int) -> int:
    """Convert the low 64 bits of an integer to a signed integer."""
    word &= _WORD
    return word - 2**64 if word >= 2**63 else word
