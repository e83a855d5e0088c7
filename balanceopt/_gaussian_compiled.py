"""The Gaussian numbers of `_gaussian`, made and added by a compiled kernel: one pass over the memory.

The hash is in integers and gives the same bits. The logarithm is that of the compiler's library, cosine and sine are
short polynomials, so that numbers differ from those of plain torch by a few units in the last place.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from balanceopt._gaussian import (
    BITS,
    FACTORS,
    GOLDEN,
    MOST_BLOCKS,
    RUN,
    SHIFTS,
    Key,
    int32,
    key_words,
    layout,
    pieces,
)

# A number of blocks that the compiler takes for any other: of one it would make a special case.
FEWEST_BLOCKS = 2
# For the compiler, as far as this torch knows them: keep all in one loop, without buffers in between; fuse
# multiplications with additions.
_OPTIONS: dict[str, int | str] = {
    "realize_opcount_threshold": 1000,
    "realize_reads_threshold": 1000,
    "cpp.enable_floating_point_contract_flag": "fast",
}
# Least squares on Chebyshev nodes: sin(x) / x and cos(x) in x^2, for |x| <= pi / 2, to 4e-9 and 2e-10.
_SINE = (0.99999999571, -0.16666657968, 0.00833305058, -0.000198090432, 2.60515895e-6)
_COSINE = (0.99999999978, -0.49999999357, 0.04166663620, -0.00138883608, 2.476013213e-5, -2.60510154e-7)
_compiled_kinds: set[tuple[Callable[..., Any], torch.dtype, torch.device]] = set()


@torch.no_grad()
def scale_and_add_blocks_(numbers: Tensor, factor: Tensor, scale: Tensor, key: Key, first: int) -> None:
    """`numbers <- factor * numbers + scale * z`, z the elements of the stream `key` from `first` on.

    Both are whole blocks of `2 * RUN`, and not fewer than `FEWEST_BLOCKS`.
    """
    blocks = numbers.detach().view(-1, 2, RUN)
    start = first // (2 * RUN)
    for piece in pieces(range(start, start + len(blocks)), MOST_BLOCKS):
        pair = piece.start * RUN
        high = (pair >> 32) * GOLDEN if pair >> 32 else 0
        words = key_words([(pair, key.first ^ high, key.second, key.third)], numbers.device)
        # As tensors of two memories: for the compiler, views of one would have to be copied before they are changed.
        halves = blocks[piece.start - start : piece.stop - start].unbind(1)
        _run(_compiled(_scale_and_add), *map(from_dlpack, halves), fixed=(factor, scale, words))


@torch.no_grad()
def scaled_heads(numels: tuple[int, ...], keys: Tensor, scales: Tensor) -> list[Tensor]:
    """The first `numels[i]` elements of each stream `keys[i]` (its words, int32 `(n, 3)`), times `scales[i]`."""
    starts, stream, begins = layout(numels, scales.device)
    words = keys.index_select(0, stream)
    made = _run(_compiled(_fill), starts, words, scales.index_select(0, stream)).view(-1)
    return [made[begin : begin + numel] for begin, numel in zip(begins, numels, strict=True)]


def warm_up(kinds: Iterable[tuple[torch.device, torch.dtype]]) -> None:
    """Compile for tensors of these devices and dtypes, now: seconds for each that is new.

    Raises:
        RuntimeError: if nothing can be compiled here.
    """
    _compiled_kinds.clear()  # `torch._dynamo.reset` may have thrown them away
    for device, dtype in kinds:
        numbers, one = torch.zeros(8 * RUN, dtype=dtype, device=device), torch.ones(1, device=device)
        key = Key(1, 2, 3)
        try:
            with warnings.catch_warnings():  # torch's own, about itself
                warnings.simplefilter("ignore")
                scale_and_add_blocks_(numbers, one[0], one[0], key, 0)
                scaled_heads((1, 1), key_words([key, key], device), one.expand(2))
        except Exception as error:  # what a missing compiler raises is different from platform to platform
            raise RuntimeError(
                f"noise='compiled' needs what torch.compile needs for {device.type}: a C++ compiler (CPU) or Triton "
                "(CUDA). Use noise=True: the same noise without compiling, slower."
            ) from error


def _run(kernel: Callable[..., Any], *blocks: Tensor, fixed: Sequence[Tensor] = ()) -> Any:
    """Call a kernel that is compiled once for any number of blocks."""
    kind = (kernel, blocks[0].dtype, blocks[0].device)
    if kind not in _compiled_kinds:  # marking costs as much as a small tensor's noise
        for tensor in blocks:
            torch._dynamo.mark_dynamic(tensor, 0)
        _compiled_kinds.add(kind)
    return kernel(*blocks, *fixed)


@lru_cache(maxsize=2)
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    known = torch._inductor.config.get_config_copy()
    options: dict[str, Any] = {
        name: value
        for name, value in _OPTIONS.items()
        if name in known and (known[name] is None or type(known[name]) is type(value))
    }
    return torch.compile(function, fullgraph=True, options=options)


def _scale_and_add(cosines: Tensor, sines: Tensor, factor: Tensor, scale: Tensor, words: Tensor) -> None:
    pair, first, second, third = words[0].unbind()
    counter = (
        torch.arange(cosines.numel(), dtype=torch.int32, device=cosines.device).view(cosines.shape) + pair
    )
    for numbers, z in zip((cosines, sines), _normal(counter, first, second, third), strict=True):
        numbers.mul_(factor).add_(z * scale)


def _fill(starts: Tensor, words: Tensor, scales: Tensor) -> Tensor:
    counter = torch.arange(RUN, dtype=torch.int32, device=starts.device) + starts[:, None]
    first, second, third = words.split(1, dim=1)
    return torch.stack(_normal(counter, first, second, third), 1) * scales[:, None, None]


def _normal(counter: Tensor, first: Tensor, second: Tensor, third: Tensor) -> tuple[Tensor, Tensor]:
    """Both numbers of each of the pairs: what `_gaussian` does step by step, as one expression."""
    word = _mix(counter ^ first, SHIFTS[0]) * int32(FACTORS[0])
    word = (_mix(word, SHIFTS[1]) + second) * int32(FACTORS[1])
    word = _mix(_mix(word, SHIFTS[2]) * int32(FACTORS[2]), SHIFTS[3])
    half = (_mix(word * int32(GOLDEN), SHIFTS[2]) + third).to(torch.float32) * (math.pi * BITS)
    uniform = (word.to(torch.float32) * BITS + 0.5).clamp(0.5 * BITS, 1.0)
    radius = (uniform.log() * -2).sqrt()
    square = half * half
    cosine, sine = _horner(_COSINE, square), _horner(_SINE, square) * half
    return (1 - 2 * sine * sine) * radius, 2 * sine * cosine * radius


def _horner(coefficients: Sequence[float], x: Tensor) -> Tensor:
    *lower, last = coefficients
    value: Tensor | float = last
    for coefficient in reversed(lower):
        value = value * x + coefficient
    assert isinstance(value, Tensor)
    return value


def _mix(word: Tensor, shift: int) -> Tensor:
    return word ^ ((word >> shift) & ((1 << (32 - shift)) - 1))
