"""Gaussian noise as a function of (seed, step, parameter): the same on every rank, in every shard and after a resume.

A tensor is split into chunks. Each chunk has a generator, seeded by a hash of (seed, step, parameter, index of the
chunk), so that threads draw chunks in parallel, and a rank draws only the chunks that overlap with its shard.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from balanceopt._deferred import on_host
from balanceopt._random import mixed, mixed_in
from balanceopt._sharding import distributed_as, is_sharded, local_box, local_part, summed_over_shards
from balanceopt._torch import foreach_add_, foreach_mul_, foreach_norm
from balanceopt.modulation import _noise_compiled
from balanceopt.modulation._base import Slot
from balanceopt.modulation._scaling import by_device

Noise = Literal["compiled"]
Box = tuple[slice, ...]

# Largest number of elements of a chunk. With smaller chunks, threads wait for the interpreter's lock; with larger
# ones, a GPU's numbers depend on its number of multiprocessors. torch's threads share a compiled chunk.
_CHUNK, _COMPILED_CHUNK = 2**18, 2**20
# Number of elements up to which a thread or a call of the compiled kernel costs more than it saves.
_SMALL = 2**15
# Number of elements up to which torch adds without starting threads within a thread.
_PIECE = 2**14
# Largest numbers of elements summed in float32, of a tensor and of a row in a larger tensor, because longer sums
# lose a number of digits that depends on the processor.
_SUMMED, _ROW = 2**13, 2**10
# Limits of mean square minus squared mean, because digits cancel where the variance is a small part or tiny.
_LOST, _TINY = 0.5, 1e-30


class _Chunk(NamedTuple):
    """Operation `target <- factor * target + scale * z[part]`, with the chunk's Gaussian numbers z of `shape`."""

    target: Tensor
    factor: float | Tensor
    scale: float | Tensor
    seed: int
    size: int
    shape: tuple[int, ...]
    part: Box


@torch.no_grad()
def scale_and_add_noise_(
    slots: Sequence[Slot],
    coefficient: Tensor,
    noise_scale: Tensor,
    seed: int,
    step: int,
    *,
    compiled: bool = False,
) -> Tensor:
    """Set each gradient g to `k g + noise_scale * std(g) * N(0, 1)` in place, std of the unscaled gradient.

    Complex gradients are treated as their real and imaginary parts. Returns the number of non-finite gradients, 0-d,
    which stay unchanged.
    """
    left = torch.zeros_like(coefficient, dtype=torch.int64)
    for device, there in by_device(slots).items():
        grads = [slot.grad for slot in there]
        # A real view of a complex gradient; of a copy for a lazily conjugated gradient.
        numbers = [torch.view_as_real(g.resolve_conj()) if g.is_complex() else g for g in grads]
        sigma = stds(numbers)
        finite = torch.isfinite(sigma)
        left += (~finite).sum().to(left.device)
        host_value = on_host(finite)
        touched = [i for i in range(len(there)) if host_value is None or host_value[i]]
        if not touched:
            continue
        factors = torch.where(finite, coefficient.to(device), 1)
        scales = torch.where(finite, noise_scale.to(device) * sigma, 0)
        if len(touched) < len(there):
            factors, scales = (torch.stack([x[i] for i in touched]) for x in (factors, scales))
        chosen, indices = [numbers[i] for i in touched], [there[i].index for i in touched]
        scale_and_add_gaussians_(chosen, factors, scales, seed, step, indices, compiled=compiled)
        for i in touched:
            if grads[i].is_conj():
                grads[i].copy_(torch.view_as_complex(numbers[i]))
    return left


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

    The noise is drawn in float32, with memory for one chunk in each thread. torch's CPU generator uses 32 bits of the
    seed: among n chunks, about n^2 / 2^33 pairs have the same numbers.

    Args:
        tensors: n real tensors on one device; a DTensor gets this rank's shard of the whole tensor's noise.
        factors: `(n,)` factors of the tensors.
        scales: `(n,)` standard deviations of the noise.
        seed: seed of all randomness.
        step: number of the step.
        indices: indices of the parameters that the tensors belong to.
        compiled: draw large chunks by the compiled kernel, which gives other numbers.
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
            size = math.prod(shape)
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
        list(done)  # re-raises exceptions of the threads


def _each(values: Tensor) -> Sequence[float | Tensor]:
    """Return the elements, as Python numbers where they can be read without device synchronisation."""
    host_values = on_host(values)
    return values.unbind() if host_values is None else host_values.tolist()


@torch.no_grad()  # grad mode is local to a thread
def _add(chunks: Sequence[_Chunk]) -> None:
    """Draw and add the noise of chunks, one after the other."""
    if not chunks:
        return
    device = chunks[0].target.device
    generator = torch.Generator(device)
    for target, factor, scale, seed, _, shape, part in chunks:
        generator.manual_seed(seed >> 1)  # 63 bits are accepted on every device
        numbers = torch.empty(shape, dtype=torch.float32, device=device)
        if isinstance(scale, float):
            numbers.normal_(0, scale, generator=generator)
        else:
            numbers.normal_(generator=generator).mul_(scale)
        _apply(target, factor, numbers[part] if part else numbers)
        del numbers  # so that only one chunk's numbers are in memory


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
    """Scale the target and add the numbers, without starting torch's threads within a thread."""
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
    """Split a tensor of `shape`, whose box `local` at `offset` is on this rank, into chunks of up to `most` elements.

    Yields:
        For each chunk that overlaps `local`: index, the elements in `local`, shape, and their box in the chunk.
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
    """Split a shape into boxes of up to `most` elements: full trailing dimensions, a run along the one before them."""
    inner, run_along = 1, len(shape) - 1
    while run_along > 0 and inner * shape[run_along] <= most:
        inner *= shape[run_along]
        run_along -= 1
    length, run = shape[run_along], most // inner
    full = tuple(slice(0, size) for size in shape[run_along + 1 :])
    for places in product(*map(range, shape[:run_along])):
        for start in range(0, length, run):
            yield (*(slice(i, i + 1) for i in places), slice(start, min(start + run, length)), *full)


# -- standard deviations of whole tensors, on the CPU by short float32 sums, twice as fast as torch.std ------------


def stds(tensors: Sequence[Tensor]) -> Tensor:
    """Return the `(n,)` population standard deviations of whole tensors; non-finite where an element is."""
    if not any(is_sharded(tensor) for tensor in tensors):
        return _whole_stds(tensors)
    count, total, squares = torch.stack(summed_over_shards(tensors, [_moments(t) for t in tensors])).unbind(1)
    variance = (squares / count - (total / count).square()).clamp(min=0)
    return variance.sqrt().to(torch.promote_types(tensors[0].dtype, torch.float32))


def _whole_stds(tensors: Sequence[Tensor]) -> Tensor:
    """Return the population standard deviation of each unsharded tensor's elements.

    Contiguous float32 tensors on the CPU are summed in float32; those with more than 2^13 elements by rows of 2^10
    elements, whose sums are added in float64. A sum of n squares in four lanes or more has at most n / 4 roundings of
    2^-24, so that the relative error is at most 1.5e-4 on any processor, and 2e-5 where rows are summed. (Measured:
    1e-5 and 1e-6 for elements all of one size, whose roundings have one sign, and 2e-7 for others.) Threads sum whole
    rows, so that results do not depend on their number.

    Returns:
        `(n,)`, in float32 or wider; non-finite where an element is.
    """
    in_order = np.array(
        [x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous() for x in tensors]
    )
    sizes = np.array([tensor.numel() for tensor in tensors])
    small = np.flatnonzero(in_order & (sizes <= _SUMMED) & (sizes > 0)).tolist()
    sums, squares = np.full((2, len(tensors)), math.nan)
    if small:
        chosen = [tensors[index] for index in small]
        sums[small] = torch.stack([tensor.sum() for tensor in chosen]).numpy()
        squares[small] = torch.stack(foreach_norm(chosen)).numpy().astype(np.float64) ** 2
    for index in np.flatnonzero(in_order & (sizes > _SUMMED)).tolist():
        sums[index], squares[index] = _by_rows(tensors[index].detach().view(-1))
    with np.errstate(all="ignore"):
        variance = squares / sizes - (sums / sizes) ** 2
        inexact = ~(variance > np.maximum(_LOST * squares / sizes, _TINY))  # also for non-finite elements
    result = list(torch.from_numpy(np.sqrt(np.where(inexact, 0, variance))).float())
    for index in np.flatnonzero(inexact).tolist():
        result[index] = _wide(tensors[index]).std(correction=0)
    return torch.stack(result)


def _by_rows(flat: Tensor) -> tuple[float, float]:
    """Return sum and sum of squares of a vector's elements, row by row."""
    total = squares = 0.0
    whole = len(flat) - len(flat) % _ROW
    for rows in (flat[:whole].view(-1, _ROW), flat[whole:].view(1, -1)):
        total += float(rows.sum(1).numpy().sum(dtype=np.float64))
        squares += float(np.square(torch.linalg.vector_norm(rows, dim=1).numpy(), dtype=np.float64).sum())
    return total, squares


def _moments(tensor: Tensor) -> Tensor:
    """Return count, sum and sum of squares of this rank's shard, in float64 because the squared mean is subtracted."""
    part = local_part(tensor)
    if part.numel() == 0:
        return torch.zeros(3, dtype=torch.float64, device=part.device)
    std, mean = (x.double() for x in torch.std_mean(_wide(part), correction=0))
    count = torch.full_like(mean, part.numel())
    return torch.stack([count, count * mean, count * (std.square() + mean.square())])


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
