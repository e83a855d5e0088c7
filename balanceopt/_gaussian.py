"""Gaussian numbers by counting: element i of a stream is a function of the stream's key and of i alone.

So a resumed step, another rank or a shard draws the very numbers that the whole tensor would get, with no state and no
communication, in parallel. A pair's counter is hashed (three rounds of multiply and shift, the key mixed in between) to
32 bits that give the radius, and once more to the angle, of Box and Muller's transform. Two neighbouring runs of `_RUN`
elements share their pairs: the first takes the cosines, the second the sines, so that memory is written in rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import NamedTuple, overload

import torch
from torch import Tensor

_RUN = 256
# Small enough for a piece's buffers to stay in cache and for torch to keep each operation on one thread: an OpenMP
# fork for every small operation costs more than it brings, and stalls when another process has taken a core.
_PAIRS_AT_ONCE = 2**14
# Below this many elements threads cost more than they bring.
_WORTH_THREADS = 2**18
_BITS = 2.0**-32

Use = Callable[[int, int, Tensor], None]


class Key(NamedTuple):
    """Three 32-bit words that name a stream; tensors of them `(P,)` where P pairs are of several streams."""

    first: int | Tensor
    second: int | Tensor
    third: int | Tensor

    @classmethod
    def from_bits(cls, low: int, high: int) -> Key:
        """From two 64-bit numbers."""
        return cls(low & 0xFFFFFFFF, low >> 32, high & 0xFFFFFFFF)


def for_gaussian_pieces(numel: int, key: Key, device: torch.device, use: Use, first: int = 0) -> None:
    """Make elements `first` to `first + numel` of the stream `key` piece by piece, on as many threads as torch has.

    Args:
        numel: how many.
        key: names the stream.
        device: where.
        use: called with `(start, stop, values)`: the float32 elements from `start` to `stop`, counted from `first`,
            in a buffer that is used again. Pieces come in any order, perhaps from several threads at once.
        first: index of the first element in the whole stream.
    """
    if numel <= 0:
        return
    blocks = range(first // (2 * _RUN), -(-(first + numel) // (2 * _RUN)))
    workers = torch.get_num_threads() if device.type == "cpu" and numel >= _WORTH_THREADS else 1
    each = -(-len(blocks) // workers)
    parts = [blocks[i : i + each] for i in range(0, len(blocks), each)]
    work = partial(_work, key=key, device=device, use=use, first=first, end=first + numel)
    if len(parts) == 1:
        work(parts[0])
    else:
        with ThreadPoolExecutor(len(parts)) as pool:
            list(pool.map(work, parts))


@torch.no_grad()
def gaussian_heads(numels: tuple[int, ...], keys: Sequence[Key], device: torch.device) -> list[Tensor]:
    """The first `numels[i]` elements of each stream `keys[i]`, all made in the same few operations.

    For many small tensors, where an operation for each would cost more than its arithmetic.
    """
    counter, stream = _layout(numels, device)
    # One row a key word; signed, as torch's 32-bit integers are.
    words = torch.tensor(
        [[_int32(word) for word in key] for key in keys], dtype=torch.int32, pin_memory=device.type == "cuda"
    ).to(device, non_blocking=True)
    scratch = _Scratch(counter.numel(), device, counter)
    values = scratch.fill(0, counter.numel(), Key(*words.index_select(0, stream).unbind(1)))
    heads, begin = [], 0
    for numel in numels:
        heads.append(values[begin : begin + numel])
        begin += -(-numel // (2 * _RUN)) * 2 * _RUN
    return heads


@lru_cache(maxsize=64)
def _layout(numels: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Each pair's number in its own stream, and which stream that is."""
    pairs = torch.tensor([-(-numel // (2 * _RUN)) * _RUN for numel in numels])
    stream = torch.repeat_interleave(torch.arange(len(numels)), pairs)
    counter = torch.arange(int(pairs.sum())) - (pairs.cumsum(0) - pairs)[stream]
    return counter.to(device, torch.int32), stream.to(device)


@torch.no_grad()
def _work(blocks: range, *, key: Key, device: torch.device, use: Use, first: int, end: int) -> None:
    at_once = _PAIRS_AT_ONCE // _RUN if device.type == "cpu" else len(blocks)
    scratch = _Scratch(min(len(blocks), at_once) * _RUN, device)
    for position in range(0, len(blocks), at_once):
        piece = blocks[position : position + at_once]
        values = scratch.fill(piece.start * _RUN, len(piece) * _RUN, key)
        begin = piece.start * 2 * _RUN
        start, stop = max(begin, first), min(piece.stop * 2 * _RUN, end)
        use(start - first, stop - first, values[start - begin : stop - begin])


class _Scratch:
    """Buffers for one piece, and the arithmetic on them."""

    def __init__(self, pairs: int, device: torch.device, counter: Tensor | None = None) -> None:
        self.counter = torch.arange(pairs, dtype=torch.int32, device=device) if counter is None else counter
        self.word = torch.empty_like(self.counter)
        self.shifted = torch.empty_like(self.counter)
        self.radius, self.angle = torch.empty(2, pairs, device=device)
        self.values = torch.empty(2 * pairs, device=device)

    def fill(self, first_pair: int, pairs: int, key: Key) -> Tensor:
        """The `2 * pairs` elements of the pairs from `first_pair` on."""
        word, radius, angle = self.word[:pairs], self.radius[:pairs], self.angle[:pairs]
        torch.add(self.counter[:pairs], _int32(first_pair), out=word)
        word.bitwise_xor_(_int32(key.first))
        if first_pair >> 32:  # pairs beyond 2**32 count anew, under another key
            word.bitwise_xor_(_int32((first_pair >> 32) * 0x9E3779B1))
        self._mix(word, 17, 0xED5AD4BB)
        self._mix(word, 11, 0xAC4C1B51, add=key.second)
        self._mix(word, 15, 0x31848BAB)
        self._mix(word, 14, 1)
        radius.copy_(word)
        self._mix(word.mul_(_int32(0x9E3779B1)), 15, 1, add=key.third)
        angle.copy_(word)
        # Both were signed: (word + 2**31 + 1/2) / 2**32 lies inside (0, 1), and turning by half a circle is no matter.
        radius.mul_(_BITS).add_(0.5).clamp_(min=0.5 * _BITS, max=1.0)
        radius.log_().mul_(-2).sqrt_()
        angle.mul_(2 * math.pi * _BITS)
        rows = self.values[: 2 * pairs].view(-1, 2, _RUN)
        torch.cos(angle.view(-1, _RUN), out=rows[:, 0])
        torch.sin(angle.view(-1, _RUN), out=rows[:, 1])
        rows.mul_(radius.view(-1, 1, _RUN))
        return self.values[: 2 * pairs]

    def _mix(self, word: Tensor, shift: int, factor: int, add: int | Tensor = 0) -> None:
        """`word = (word ^ (word >>> shift) + add) * factor` in 32-bit arithmetic."""
        shifted = self.shifted[: word.numel()]
        torch.bitwise_right_shift(word, shift, out=shifted)
        shifted.bitwise_and_((1 << (32 - shift)) - 1)  # torch's shift copies the sign, a hash must not
        word.bitwise_xor_(shifted)
        if isinstance(add, Tensor) or add:
            word.add_(_int32(add))
        if factor != 1:
            word.mul_(_int32(factor))


@overload
def _int32(value: int) -> int: ...


@overload
def _int32(value: Tensor) -> Tensor: ...


def _int32(value: int | Tensor) -> int | Tensor:
    """The low 32 bits of a number as a signed one; tensors hold such already."""
    if isinstance(value, Tensor):
        return value
    value &= 0xFFFFFFFF
    return value - 2**32 if value >= 2**31 else value
