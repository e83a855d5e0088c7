"""Uniform numbers by counting: number j of a stream is a function of (seed, step, stream) and of j alone.

A stream is that of the generator splitmix64 from a state that depends on the three. So ranks, devices and resumed runs
draw the same numbers, and those of many streams are made in the same few operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from balanceopt._random import mixed

_GOLDEN = 0x9E3779B97F4A7C15
# Shifts and factors of the generator's output, round by round, and its last shift.
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31
# A float64 holds so many bits of the word.
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
    start = _int64(mixed(seed, step))
    states = _output(streams * _int64(_GOLDEN) + start)
    steps = torch.arange(1, count + 1, device=streams.device) * _int64(_GOLDEN)
    words = _output(states[:, None] + steps)
    return _shifted(words, 64 - _BITS).double() * 2.0**-_BITS


def _output(words: Tensor) -> Tensor:
    for shift, factor in _ROUNDS:
        words = (words ^ _shifted(words, shift)) * _int64(factor)
    return words ^ _shifted(words, _LAST_SHIFT)


def _shifted(words: Tensor, shift: int) -> Tensor:
    """To the right, with zeros from the left: torch's own shift copies the sign."""
    return (words >> shift) & ((1 << (64 - shift)) - 1)


def _int64(word: int) -> int:
    """64 bits as a signed number."""
    return word - 2**64 if word >= 2**63 else word
