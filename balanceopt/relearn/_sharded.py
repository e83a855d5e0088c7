"""This rank's part of tensors that may be DTensors (FSDP2, tensor parallelism)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part, of the same storage; the tensor itself where it is not sharded."""
    part: Callable[[], Tensor] | None = getattr(tensor, "to_local", None)
    return tensor if part is None else part()


def local_start(start: Tensor, tensor: Tensor) -> Tensor:
    """This rank's part of an initial value, given whole, as a part, or sharded in whatever way, for `tensor`."""
    mesh: Any = getattr(tensor, "device_mesh", None)
    if mesh is None:
        full: Callable[[], Tensor] | None = getattr(start, "full_tensor", None)
        return start if full is None else full()
    placements: Any = tensor.placements  # type: ignore[attr-defined]
    if hasattr(start, "to_local"):
        return local(start.redistribute(mesh, placements))  # type: ignore[attr-defined]
    if start.shape == local(tensor.detach()).shape:
        return start
    from torch.distributed.tensor import distribute_tensor

    return local(distribute_tensor(start.to(mesh.device_type), mesh, placements, src_data_rank=None))


def as_saved(start: Tensor, tensor: Tensor) -> Tensor:
    """An initial value as a checkpoint holds it: sharded as `tensor` is."""
    mesh: Any = getattr(tensor, "device_mesh", None)
    if mesh is None:
        return start
    from torch.distributed.tensor import DTensor

    part = local_start(start, tensor).to(mesh.device_type)
    placements: Any = tensor.placements  # type: ignore[attr-defined]
    return DTensor.from_local(
        part, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
