"""Randomness as a function of (seed, step, parameter): the same on every rank, and again after a resume."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from balanceopt import _gaussian_compiled
from balanceopt._deferred import on_host, sent
from balanceopt._gaussian import RUN, Gaussians, Key
from balanceopt._splitmix import each_mixed_in, mixed, mixed_in

# Tensors up to this size are served together: for each alone, operations would cost more than their arithmetic.
SMALL = 2**14
# As many numbers at once: their buffers stay small, and in cache.
TOGETHER = 2**17
# How many elements of whole rows are made at a time for a part that holds some columns of them.
_OF_ROWS = 2**18


def generator_for(seed: int, step: int, index: int, device: torch.device) -> torch.Generator:
    """A generator whose stream depends on nothing but its arguments."""
    generator = torch.Generator(device)
    generator.manual_seed(mixed(seed, step, index) >> 1)  # manual_seed takes 63 bits on every device
    return generator


def key_of(seed: int, step: int, index: int) -> Key:
    """The name of a parameter's Gaussian stream at a step."""
    own = mixed_in(_of_step(seed, step), index)
    return Key.from_bits(mixed_in(own, 0), mixed_in(own, 1))


def keys_of(seed: int, step: int, indices: Sequence[int], device: torch.device) -> Tensor:
    """The same for many: int32 `(n, 3)`, a key's words by row, on the device without waiting for it."""
    own = each_mixed_in(_of_step(seed, step), torch.tensor(indices))
    low, high = each_mixed_in(own, 0), each_mixed_in(own, 1)
    words = torch.stack([low, low >> 32, high], 1).to(torch.int32)
    return sent(words, device)


@lru_cache(maxsize=4)
def _of_step(seed: int, step: int) -> int:
    return mixed(seed, step)


def gaussian_like(tensor: Tensor, seed: int, step: int, index: int) -> Tensor:
    """Standard normal numbers in the shape, dtype and (for DTensors) layout of `tensor`.

    A sharded tensor gets its part of the noise that the whole one would get.
    """
    noise = torch.zeros_like(tensor)
    one = torch.ones(1, device=tensor.device)
    scale_and_add_gaussians_([noise], one, one, seed, step, [index])
    return noise


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
    """`tensors[i] <- factors[i] * tensors[i] + scales[i] * N(0, 1)` in place, with the noise of parameter `indices[i]`.

    No buffer of a tensor's size is made for a large one whose memory is in order: not for sharded ones either, whose
    ranks each make only their own part. `compiled` kernels give the same numbers but for rounding.
    """
    if not tensors:
        return
    source = Gaussians(tensors[0].device)
    factor_of, scale_of = factors.unbind(), scales.unbind()
    small: list[int] = []
    for position, tensor in enumerate(tensors):
        if tensor.numel() <= SMALL and getattr(tensor, "device_mesh", None) is None:
            small.append(position)
        else:
            key = key_of(seed, step, indices[position])
            _scale_and_add_to_one(tensor, factor_of[position], scale_of[position], key, source, compiled)
    if not small:
        return
    chosen = [tensors[place] for place in small]
    scale_(chosen, [factor_of[place] for place in small])
    keys = keys_of(seed, step, [indices[place] for place in small], chosen[0].device)
    own_scales = torch.stack([scale_of[place] for place in small]).float()
    # In memory each takes whole blocks.
    sizes = [-(-tensor.numel() // (2 * RUN)) * 2 * RUN for tensor in chosen]
    for group in in_groups(range(len(chosen)), sizes):
        part = slice(group[0], group[-1] + 1)
        numels = tuple(tensor.numel() for tensor in chosen[part])
        if compiled and sum(sizes[part]) >= 2 * RUN * _gaussian_compiled.FEWEST_BLOCKS:
            heads = _gaussian_compiled.scaled_heads(numels, keys[part], own_scales[part])
        else:
            heads = source.heads(numels, keys[part], own_scales[part])
        torch._foreach_add_(
            chosen[part], [shaped_like(t, z) for z, t in zip(heads, chosen[part], strict=True)]
        )


def shaped_like(tensor: Tensor, numbers: Tensor) -> Tensor:
    """The numbers in a tensor's shape and dtype."""
    shaped = numbers.view(tensor.shape)
    return shaped if shaped.dtype == tensor.dtype else shaped.to(tensor.dtype)


def in_groups(places: Sequence[int], numels: Sequence[int], room: int = TOGETHER) -> list[list[int]]:
    """The places in order, in groups of not many more than `room` elements."""
    groups: list[list[int]] = []
    left = 0
    for place in places:
        if left <= 0:
            groups.append([])
            left = room
        groups[-1].append(place)
        left -= numels[place]
    return groups


def scale_(tensors: list[Tensor], factors: list[Tensor]) -> None:
    """Multiply each by its own; not by ones that can be seen without waiting."""
    known = on_host(torch.stack(factors))
    if known is None:
        torch._foreach_mul_(tensors, factors)
        return
    chosen = [place for place, factor in enumerate(known) if factor != 1]
    if chosen:
        torch._foreach_mul_([tensors[place] for place in chosen], [factors[place] for place in chosen])


def _scale_and_add_to_one(
    tensor: Tensor, factor: Tensor, scale: Tensor, key: Key, source: Gaussians, compiled: bool
) -> None:
    local, place = _local_part(tensor)
    if local is None:
        tensor.mul_(factor).add_(_distributed(tensor, scale, key, source))
        return
    if local.numel() == 0:
        return
    if local.shape[1:] != tensor.shape[1:]:
        _scale_and_add_to_columns(local, place, tensor.shape, factor, scale, key, source)
        return
    first = place[0] * math.prod(tensor.shape[1:]) if place else 0
    numbers = local.view(-1) if local.is_contiguous() else local.reshape(-1)
    rest = [range(len(numbers))]
    if compiled and local.is_floating_point():
        # What a shard begins and ends with is no whole block.
        begin, end = -first % (2 * RUN), len(numbers) - (first + len(numbers)) % (2 * RUN)
        if end - begin >= 2 * RUN * _gaussian_compiled.FEWEST_BLOCKS:
            _gaussian_compiled.scale_and_add_blocks_(numbers[begin:end], factor, scale, key, first + begin)
            rest = [range(begin), range(end, len(numbers))]
    for part in filter(len, rest):
        _by_pieces(numbers[part.start : part.stop], factor, scale, key, first + part.start, source)
    if not local.is_contiguous():
        local.copy_(numbers.view(local.shape))


def _by_pieces(
    numbers: Tensor, factor: Tensor, scale: Tensor, key: Key, first: int, source: Gaussians
) -> None:
    known = on_host(factor)
    scaled = known is None or known != 1
    for place, values in source.pieces(len(numbers), key, first, scale):
        piece = numbers[place]
        (piece.mul_(factor) if scaled else piece).add_(values)


def _scale_and_add_to_columns(
    local: Tensor,
    place: Sequence[int],
    shape: torch.Size,
    factor: Tensor,
    scale: Tensor,
    key: Key,
    source: Gaussians,
) -> None:
    """Noise for a part that holds some columns: some whole rows are made at a time, and cut."""
    columns = tuple(slice(o, o + n) for o, n in zip(place[1:], local.shape[1:], strict=True))
    length = math.prod(shape[1:])
    at_once = min(len(local), max(1, _OF_ROWS // length))
    whole = torch.empty(at_once, *shape[1:], device=local.device)
    for rows in local.split(at_once):
        made = whole[: len(rows)]
        fill_(made.view(-1), source.pieces(made.numel(), key, place[0] * length, scale))
        rows.mul_(factor).add_(made[(slice(None), *columns)])
        place = (place[0] + len(rows), *place[1:])


def _local_part(tensor: Tensor) -> tuple[Tensor | None, Sequence[int]]:
    """This process's part of a tensor and where in the whole it begins; None where it has gaps."""
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is None:
        return tensor, (0,) * tensor.dim()
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if any(type(p) not in (Replicate, Shard) for p in tensor.placements):  # type: ignore[attr-defined]
        return None, ()
    _, place = compute_local_shape_and_global_offset(tensor.shape, mesh, tensor.placements)  # type: ignore[attr-defined]
    return tensor.to_local(), place  # type: ignore[attr-defined]


def _distributed(tensor: Tensor, scale: Tensor, key: Key, source: Gaussians) -> Tensor:
    """Noise for a tensor cut in a way of its own (strided shards): made in full, and cut."""
    from torch.distributed.tensor import distribute_tensor

    full = torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    fill_(full.view(-1), source.pieces(full.numel(), key, scale=scale))
    return distribute_tensor(full, tensor.device_mesh, tensor.placements, src_data_rank=None)  # type: ignore[attr-defined]


def fill_(flat: Tensor, pieces: Iterable[tuple[slice, Tensor]]) -> None:
    """Put pieces where they belong."""
    for place, values in pieces:
        flat[place] = values
