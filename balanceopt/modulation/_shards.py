"""Sums over whole tensors of which each rank holds a shard: one collective for many of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from balanceopt.modulation import _spread


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "device_mesh")


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of it."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return part


def local_box(tensor: Tensor) -> tuple[Tensor | None, Sequence[int]]:
    """This rank's part, and where in the whole tensor it begins; None if it is not one box of it."""
    if not is_sharded(tensor):
        return tensor, (0,) * tensor.dim()
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    t: Any = tensor
    if any(type(placement) not in (Replicate, Shard) for placement in t.placements):
        return None, ()
    _, offset = compute_local_shape_and_global_offset(t.shape, t.device_mesh, t.placements)
    return t.to_local(), offset


def distributed_as(tensor: Tensor, whole: Tensor) -> Tensor:
    """A tensor that every rank holds, cut like another one."""
    from torch.distributed.tensor import distribute_tensor

    t: Any = tensor
    shards: Tensor = distribute_tensor(whole, t.device_mesh, t.placements, src_data_rank=None)
    return shards


def summed_over_shards(tensors: Sequence[Tensor], own: Sequence[Tensor]) -> list[Tensor]:
    """Sums over the shards of `tensors[i]` of what each rank has found in its own, `own[i]` of one dimension.

    Those of tensors that are not sharded are returned as they are. Copies of a shard count once.
    """
    result = list(own)
    if not any(is_sharded(tensor) for tensor in tensors):
        return result
    from torch.distributed.tensor import DTensor, Partial, Replicate

    together: dict[Any, list[int]] = {}
    for place, tensor in enumerate(tensors):
        if is_sharded(tensor):
            t: Any = tensor
            kinds = tuple(not placement.is_replicate() for placement in t.placements)
            together.setdefault((t.device_mesh, kinds, own[place].dtype), []).append(place)
    for (mesh, kinds, _), places in together.items():
        placements = [Partial() if kind else Replicate() for kind in kinds]
        sums = torch.cat([own[place] for place in places])
        total: Tensor = DTensor.from_local(sums, mesh, placements, run_check=False).full_tensor()
        pieces = total.split([own[place].numel() for place in places])
        for place, piece in zip(places, pieces, strict=True):
            result[place] = piece
    return result


def stds(tensors: Sequence[Tensor]) -> Tensor:
    """`(n,)` population standard deviations of all elements of each tensor; not finite where an element is not."""
    if not any(is_sharded(tensor) for tensor in tensors):
        return _spread.stds(tensors)
    count, total, squares = torch.stack(summed_over_shards(tensors, [_moments(t) for t in tensors])).unbind(1)
    mean = total / count
    return (squares / count - mean.square()).clamp(min=0).sqrt().to(_wide_dtype(tensors[0]))


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """bool `(n,)`, tensors of which all elements are: a sum is, unless a term is not (or they are beyond use)."""
    parts = [local_part(t.coalesce().values() if t.is_sparse else t) for t in tensors]
    sums = [part.sum(dtype=_wide_dtype(part)).view(1) for part in parts]
    return torch.isfinite(torch.cat(summed_over_shards(tensors, sums)))


def _moments(tensor: Tensor) -> Tensor:
    """Count, sum and sum of squares of this rank's part, in float64: the mean's square is to be taken off again."""
    part = local_part(tensor)
    if part.numel() == 0:
        return torch.zeros(3, dtype=torch.float64, device=part.device)
    std, mean = (x.double() for x in torch.std_mean(_wide(part), correction=0))
    count = torch.full_like(mean, part.numel())
    return torch.stack([count, count * mean, count * (std.square() + mean.square())])


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(_wide_dtype(tensor))


def _wide_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
