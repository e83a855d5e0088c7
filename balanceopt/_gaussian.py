"""Gaussian numbers by counting: element i of a stream is a function of the stream's key and of i alone.

So a resumed step, another rank or a shard draws the very numbers that the whole tensor would get, with no state and no
communication, in parallel. A pair's counter is hashed (three rounds of multiply and shift, the key mixed in between) to
32 bits that give the radius, and once more to the angle, of Box and Muller's transform. Two neighbouring runs of `RUN`
elements share their pairs: the first takes the cosines, the second the sines, so that memory is written in rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise, starmap
from typing import NamedTuple, overload

import torch
from torch import Tensor

from balanceopt._deferred import sent

RUN = 256
# Small enough for a piece's buffers to stay in cache, and as many for each thread as torch gives one at the least.
# Python's threads, each with pieces of its own, wait for the interpreter's lock longer than they work.
_PAIRS_A_THREAD = 2**15
# Where there is no cache to stay in: their pairs' numbers fit into 32 bits.
MOST_BLOCKS = 2**22
BITS = 2.0**-32
# Of the hash: what is shifted by and multiplied with, round by round; and a factor that parts what is alike.
SHIFTS = (17, 11, 15, 14)
FACTORS = (0xED5AD4BB, 0xAC4C1B51, 0x31848BAB)
GOLDEN = 0x9E3779B1


class Key(NamedTuple):
    """Three 32-bit words that name a stream; columns of them where blocks of pairs are of several streams."""

    first: int | Tensor
    second: int | Tensor
    third: int | Tensor

    @classmethod
    def from_bits(cls, low: int, high: int) -> Key:
        """From two 64-bit numbers."""
        return cls(low & 0xFFFFFFFF, low >> 32, high & 0xFFFFFFFF)


def _blocks_at_once(device: torch.device) -> int:
    """A power of two."""
    if device.type != "cpu":
        return MOST_BLOCKS
    threads: int = 1 << (torch.get_num_threads().bit_length() - 1)
    return threads * _PAIRS_A_THREAD // RUN


@lru_cache(maxsize=64)
def layout(numels: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, list[int]]:
    """How streams lie end to end in whole blocks.

    Returns:
        `(blocks,)` each block's first pair in its own stream, `(blocks,)` which stream that is, and at which element
        each stream begins.
    """
    blocks = torch.tensor([-(-numel // (2 * RUN)) for numel in numels])
    begins = blocks.cumsum(0) - blocks
    stream = torch.repeat_interleave(torch.arange(len(numels)), blocks)
    starts = (torch.arange(len(stream)) - begins[stream]) * RUN
    return starts.to(device, torch.int32), stream.to(device), (2 * RUN * begins).tolist()


def key_words(keys: Sequence[Sequence[int | Tensor]], device: torch.device) -> Tensor:
    """Numbers of 32 bits by row, signed as torch's are, on the device without waiting for it."""
    return sent(torch.tensor([[int32(word) for word in key] for key in keys], dtype=torch.int32), device)


def pieces(blocks: range, at_once: int) -> Iterator[range]:
    """Cut at multiples of `at_once`, a power of two: no piece holds pairs from both sides of a multiple of 2**32."""
    inner = range(blocks.start - blocks.start % at_once + at_once, blocks.stop, at_once)
    yield from starmap(range, pairwise([blocks.start, *inner, blocks.stop]))


class Gaussians:
    """Makes numbers in memory of its own, again and again: new memory costs more than what is written to it."""

    def __init__(self, device: torch.device) -> None:
        """On this device."""
        self._device = device
        self._blocks = -1

    @torch.no_grad()
    def pieces(
        self, numel: int, key: Key, first: int = 0, scale: Tensor | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Make elements `first` to `first + numel` of the stream `key` piece by piece.

        Args:
            numel: how many.
            key: names the stream.
            first: index of the first element in the whole stream.
            scale: 0-d, what they are multiplied by.

        Yields:
            Which elements, counted from `first`, and the float32 values in memory that the next piece uses again.
        """
        if numel <= 0:
            return
        blocks = range(first // (2 * RUN), -(-(first + numel) // (2 * RUN)))
        at_once = _blocks_at_once(self._device)
        self._reserve(min(len(blocks), at_once))
        end = first + numel
        for piece in pieces(blocks, at_once):
            values = self._fill(piece.start * RUN, len(piece), key, scale)
            begin = piece.start * 2 * RUN
            start, stop = max(begin, first), min(piece.stop * 2 * RUN, end)
            yield slice(start - first, stop - first), values[start - begin : stop - begin]

    @torch.no_grad()
    def heads(self, numels: tuple[int, ...], keys: Tensor, scales: Tensor | None = None) -> list[Tensor]:
        """The first `numels[i]` elements of each stream `keys[i]`, all made in the same few operations.

        For many small tensors, where an operation for each would cost more than its arithmetic.

        Args:
            numels: of each stream.
            keys: int32 `(n, 3)`, the words of a key by row.
            scales: `(n,)`, what they are multiplied by.

        Returns:
            float32 values in memory that the next call uses again.
        """
        starts, stream, begins = layout(numels, self._device)
        self._reserve(len(starts))
        words = keys.index_select(0, stream).split(1, dim=1)
        by_block = None if scales is None else scales.index_select(0, stream)[:, None]
        values = self._fill(starts[:, None], len(starts), Key(*words), by_block)
        return [values[begin : begin + numel] for begin, numel in zip(begins, numels, strict=True)]

    def _reserve(self, blocks: int) -> None:
        """Have memory for so many blocks of pairs."""
        if blocks <= self._blocks:
            return
        self._blocks = blocks
        self.counter = torch.arange(blocks * RUN, dtype=torch.int32, device=self._device).view(blocks, RUN)
        self.word = torch.empty_like(self.counter)
        self.shifted = torch.empty_like(self.counter)
        self.radius, self.angle = torch.empty(2, blocks, RUN, device=self._device)
        self.values = torch.empty(blocks, 2, RUN, device=self._device)

    def _fill(self, first_pair: int | Tensor, blocks: int, key: Key, scale: Tensor | None) -> Tensor:
        """The elements of the pairs from `first_pair` on; of a column of first pairs, a block for each."""
        word, radius, angle = self.word[:blocks], self.radius[:blocks], self.angle[:blocks]
        if isinstance(first_pair, Tensor):
            torch.add(self.counter[:1], first_pair, out=word)
        else:
            torch.add(self.counter[:blocks], int32(first_pair), out=word)
            if first_pair >> 32:  # pairs beyond 2**32 count anew, under another key
                word.bitwise_xor_(int32((first_pair >> 32) * GOLDEN))
        word.bitwise_xor_(int32(key.first))
        self._mix(word, SHIFTS[0], FACTORS[0])
        self._mix(word, SHIFTS[1], FACTORS[1], add=key.second)
        self._mix(word, SHIFTS[2], FACTORS[2])
        self._mix(word, SHIFTS[3], 1)
        radius.copy_(word)
        self._mix(word.mul_(int32(GOLDEN)), SHIFTS[2], 1, add=key.third)
        angle.copy_(word)
        # Both were signed: (word + 2**31 + 1/2) / 2**32 lies inside (0, 1), and turning by half a circle is no matter.
        radius.mul_(BITS).add_(0.5).clamp_(min=0.5 * BITS, max=1.0)
        radius.log_().mul_(-2).sqrt_()
        if scale is not None:
            radius.mul_(scale)
        angle.mul_(2 * math.pi * BITS)
        rows = self.values[:blocks]
        torch.cos(angle, out=rows[:, 0])
        torch.sin(angle, out=rows[:, 1])
        rows.mul_(radius[:, None])
        return rows.view(-1)

    def _mix(self, word: Tensor, shift: int, factor: int, add: int | Tensor = 0) -> None:
        """`word = (word ^ (word >>> shift) + add) * factor` in 32-bit arithmetic."""
        shifted = self.shifted[: len(word)]
        torch.bitwise_right_shift(word, shift, out=shifted)
        shifted.bitwise_and_((1 << (32 - shift)) - 1)  # torch's shift copies the sign, a hash must not
        word.bitwise_xor_(shifted)
        if isinstance(add, Tensor) or add:
            word.add_(int32(add))
        if factor != 1:
            word.mul_(int32(factor))


@overload
def int32(value: int) -> int: ...


@overload
def int32(value: Tensor) -> Tensor: ...


def int32(value: int | Tensor) -> int | Tensor:
    """The low 32 bits of a number as a signed one; tensors hold such already."""
    if isinstance(value, Tensor):
        return value
    value &= 0xFFFFFFFF
    return value - 2**32 if value >= 2**31 else value
