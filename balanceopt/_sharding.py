"""Sharded tensors (DTensor): local parts, sums over shards, and conversion to and from shards.

The local part of a plain tensor is the tensor. DTensor is imported where needed, because its import is slow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is a DTensor."""
    return hasattr(tensor, "device_mesh")


def local_part(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds, without a copy."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return part


def whole(tensor: Tensor) -> Tensor:
    """Return the full tensor with its autograd graph; a collective for a DTensor."""
    full: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return full


def local_box(tensor: Tensor) -> tuple[Tensor | None, Sequence[int]]:
    """Return this rank's part of a tensor and the part's offset in it; None where the part is not one box."""
    if not is_sharded(tensor):
        return tensor, (0,) * tensor.dim()
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # has no public twin

    t: Any = tensor
    if any(type(placement) not in (Replicate, Shard) for placement in t.placements):
        return None, ()
    _, offset = compute_local_shape_and_global_offset(t.shape, t.device_mesh, t.placements)
    return t.to_local(), offset


def distributed_as(tensor: Tensor, values: Tensor, *, broadcast: bool = False) -> Tensor:
    """Shard values that every rank holds in full like a DTensor.

    Args:
        tensor: the DTensor.
        values: the shape of `tensor`; with `broadcast`, a shape that broadcasts with it.
        broadcast: replicate along dimensions of size 1.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    t: Any = tensor
    placements = t.placements
    if broadcast:
        placements = [
            p if isinstance(p, Shard) and values.shape[p.dim] > 1 else Replicate() for p in placements
        ]
    values = values.to(t.device_mesh.device_type)
    # Not distribute_tensor, which until torch 2.7 sends the values of one rank to all others.
    replicas = DTensor.from_local(values, t.device_mesh, [Replicate()] * t.device_mesh.ndim, run_check=False)
    shards: Tensor = replicas.redistribute(placements=placements)
    return shards


def local_like(values: Tensor, tensor: Tensor) -> Tensor:
    """Return this rank's part of values shaped like a tensor, from the full values, the local part or any DTensor."""
    if not is_sharded(tensor):
        return whole(values)
    t: Any = tensor
    if is_sharded(values):
        return local_part(values.redistribute(t.device_mesh, t.placements))  # type: ignore[attr-defined]
    if values.shape == local_part(tensor.detach()).shape:
        return values
    return local_part(distributed_as(tensor, values))


def sharded_like(part: Tensor, tensor: Tensor) -> Tensor:
    """Make a DTensor sharded like `tensor` from this rank's `part`; return `part` where `tensor` is not sharded."""
    if not is_sharded(tensor):
        return part
    from torch.distributed.tensor import DTensor

    t: Any = tensor
    local = local_like(part, tensor).to(t.device_mesh.device_type)
    return DTensor.from_local(
        local, t.device_mesh, t.placements, run_check=False, shape=t.shape, stride=t.stride()
    )


def summed_over_shards(tensors: Sequence[Tensor], own: Sequence[Tensor]) -> list[Tensor]:
    """Sum 1-d partial results `own[i]` over the shards of `tensors[i]`, with one collective for each mesh and dtype.

    Results of tensors that are not sharded are returned unchanged. Replicas of a shard count once.
    """
    result = list(own)
    if not any(is_sharded(tensor) for tensor in tensors):
        return result
    from torch.distributed.tensor import DTensor, Partial, Replicate

    together: dict[Any, list[int]] = {}
    for index, tensor in enumerate(tensors):
        if is_sharded(tensor):
            t: Any = tensor
            kinds = tuple(not placement.is_replicate() for placement in t.placements)
            together.setdefault((t.device_mesh, kinds, own[index].dtype), []).append(index)
    for (mesh, kinds, _), indices in together.items():
        placements = [Partial() if kind else Replicate() for kind in kinds]
        sums = torch.cat([own[index] for index in indices])
        total: Tensor = DTensor.from_local(sums, mesh, placements, run_check=False).full_tensor()
        pieces = total.split([own[index].numel() for index in indices])
        for index, piece in zip(indices, pieces, strict=True):
            result[index] = piece
    return result
