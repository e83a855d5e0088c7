"""Gaussian noise as a function of (seed, step, parameter): the same on every rank, in every shard and after a resume.

A tensor is cut into chunks. Each chunk's numbers come from a generator of its own, seeded by a hash of the
three and of the chunk's number. So threads make chunks side by side, and a shard makes only those that it
overlaps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from math import prod
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from balanceopt._deferred import on_host
from balanceopt._random import mixed, mixed_in
from balanceopt._sharding import distributed_as, local_box
from balanceopt._torch import foreach_add_, foreach_mul_
from balanceopt.modulation import _noise_compiled

Noise = Literal["compiled"]
Box = tuple[slice, ...]

# Elements of a chunk at most. With fewer, threads would wait for the interpreter's lock; with more, a GPU's
# generator would give numbers that depend on how many multiprocessors it has. torch's own threads share a
# compiled chunk.
_CHUNK, _COMPILED_CHUNK = 2**18, 2**20
# Chunks of up to this many elements are worth neither a thread nor a call of the compiled kernel.
_SMALL = 2**15
# Elements that torch adds without starting threads of its own within each of ours.
_PIECE = 2**14


class _Chunk(NamedTuple):
    """What to do: `target <- factor * target + scale * z[part]`, with z the numbers of the chunk, of this shape."""

    target: Tensor
    factor: float | Tensor
    scale: float | Tensor
    seed: int
    size: int
    shape: tuple[int, ...]
    part: Box


@torch.no_grad()
def scale_and_add_gaussians_(
    tensors: Sequence[Tensor],
    factors: Tensor,
    scales: Tensor,
    seed: int,
    step: int,
    indices: Sequence[int],
    *,
    compiled: bool = False,
) -> None:
    """Set `tensors[i]` to `factors[i] * tensors[i] + scales[i] * N(0, 1)` in place.

    The noise is made in float32, in a chunk's memory for each thread. torch's generator on the CPU uses 32 bits of its
    seed: of n chunks, about n^2 / 2^33 pairs have the same numbers.

    Args:
        tensors: real ones on one device. DTensors get their shards of the whole tensors' noise.
        factors: `(n,)`.
        scales: `(n,)`.
        seed: of all randomness.
        step: number of the step.
        indices: of the parameters that the tensors belong to.
        compiled: make large chunks by the compiled kernel, whose numbers are others.
    """
    small: list[_Chunk] = []
    large: list[_Chunk] = []
    of_step, most = mixed(seed, step), _COMPILED_CHUNK if compiled else _CHUNK
    for tensor, factor, scale, index in zip(tensors, _each(factors), _each(scales), indices, strict=True):
        local, offset = local_box(tensor)
        if local is None:
            noise = torch.zeros(tensor.shape, dtype=torch.float32, device=tensor.device)
            one = torch.ones(1, dtype=torch.float32, device=tensor.device)
            scale_and_add_gaussians_([noise], one, one, seed, step, [index], compiled=compiled)
            tensor.mul_(factor).add_(distributed_as(tensor, noise.mul_(scale)))
            continue
        of_tensor = mixed_in(of_step, index)
        for number, target, shape, part in _cut(local, offset, tensor.shape, most):
            size = prod(shape)
            chunk = _Chunk(target, factor, scale, mixed_in(of_tensor, number), size, shape, part)
            (small if size <= _SMALL else large).append(chunk)
    if compiled:
        for chunk in large:
            _add_compiled(chunk)
        large = []
    threads = min(torch.get_num_threads(), len(large))
    if threads < 2 or large[0].target.device.type != "cpu":
        _add(small + large)
        return
    with ThreadPoolExecutor(threads) as pool:
        done = pool.map(_add, [[chunk] for chunk in large])
        _add(small)
        list(done)  # raises what was raised in a thread


def _each(values: Tensor) -> Sequence[float | Tensor]:
    """As numbers where they can be read without waiting for a device."""
    host_values = on_host(values)
    return values.unbind() if host_values is None else host_values.tolist()


@torch.no_grad()  # in each thread anew
def _add(chunks: Sequence[_Chunk]) -> None:
    """Serve chunks one after the other."""
    if not chunks:
        return
    device = chunks[0].target.device
    generator = torch.Generator(device)
    for target, factor, scale, seed, _, shape, part in chunks:
        generator.manual_seed(seed >> 1)  # takes 63 bits on every device
        numbers = torch.empty(shape, dtype=torch.float32, device=device)
        if isinstance(scale, float):
            numbers.normal_(0, scale, generator=generator)
        else:
            numbers.normal_(generator=generator).mul_(scale)
        _apply(target, factor, numbers[part] if part else numbers)
        del numbers  # before the next chunk's are made


def _add_compiled(chunk: _Chunk) -> None:
    target, factor, scale, seed, size, shape, part = chunk
    device = target.device
    one, k, sigma = (torch.as_tensor(x, dtype=torch.float32, device=device) for x in (1.0, factor, scale))
    if target.numel() == size and _noise_compiled.takes(target):
        _noise_compiled.scale_and_add_(target.view(-1), k, sigma, seed)
    else:
        numbers = torch.zeros(size + size % 2, dtype=torch.float32, device=device)
        _noise_compiled.scale_and_add_(numbers, one, sigma, seed)
        _apply(target, factor, numbers[:size].view(shape)[part])


def _apply(target: Tensor, factor: float | Tensor, numbers: Tensor) -> None:
    """Scale the target and add the numbers, without starting threads of torch's own within one of ours."""
    if isinstance(factor, Tensor):
        target.mul_(factor).add_(numbers)
    elif target.numel() <= _PIECE:
        torch.add(numbers, target, alpha=factor, out=target)
    else:
        if target.is_contiguous() and numbers.is_contiguous():
            target, numbers = target.view(-1), numbers.view(-1)
        rows = max(1, _PIECE * len(target) // target.numel())
        pieces = target.split(rows)
        foreach_mul_(pieces, factor)
        foreach_add_(pieces, numbers.split(rows))


def _cut(
    local: Tensor, offset: Sequence[int], shape: torch.Size, most: int
) -> Iterator[tuple[int, Tensor, tuple[int, ...], Box]]:
    """Cut a tensor, of which this process holds `local` from `offset` on, into chunks of up to `most` elements.

    Yields:
        Of each chunk that it holds elements of: its number, these elements, its shape, and where in it they are.
    """
    if local.numel() == 0:
        return
    if local.shape == shape and shape.numel() <= most:
        yield 0, local, shape, ()
        return
    for number, box in enumerate(_boxes(shape, most)):
        ends = [
            (max(along.start, first), min(along.stop, first + size))
            for along, first, size in zip(box, offset, local.shape, strict=True)
        ]
        if all(start < stop for start, stop in ends):
            target = local[
                tuple(slice(start - o, stop - o) for (start, stop), o in zip(ends, offset, strict=True))
            ]
            part = tuple(
                slice(start - along.start, stop - along.start)
                for (start, stop), along in zip(ends, box, strict=True)
            )
            yield number, target, tuple(along.stop - along.start for along in box), part


def _boxes(shape: Sequence[int], most: int) -> Iterator[Box]:
    """Cut a shape into boxes of up to `most` elements: trailing dimensions in full, and a run along the one before."""
    inner, run_along = 1, len(shape) - 1
    while run_along > 0 and inner * shape[run_along] <= most:
        inner *= shape[run_along]
        run_along -= 1
    length, run = shape[run_along], most // inner
    full = tuple(slice(0, size) for size in shape[run_along + 1 :])
    for places in product(*map(range, shape[:run_along])):
        for start in range(0, length, run):
            yield (*(slice(i, i + 1) for i in places), slice(start, min(start + run, length)), *full)
