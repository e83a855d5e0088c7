"""What ranks share: sums and the seed. Everything is the identity without a process group."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None | Literal[False]


def active_group(group: Group) -> dist.ProcessGroup | None:
    """The process group to reduce over, or None when this process is alone.

    Args:
        group: None for the default group where one is initialised, a group, or False for no communication.
    """
    if group is False or not (dist.is_available() and dist.is_initialized()):
        return None
    found = dist.group.WORLD if group is None else group
    return found if found is not None and dist.get_world_size(found) > 1 else None


def sum_over_ranks(tensor: Tensor, group: Group) -> Tensor:
    """The sum of `tensor` over the ranks of `group`, on every rank; `tensor` itself when alone."""
    found = active_group(group)
    if found is None:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total, group=found)
    return total


def shared_seed(group: Group, seed: int | None = None) -> int:
    """The first rank's `seed`, `torch.initial_seed()` where None, on every rank; below 2**63."""
    own = (torch.initial_seed() if seed is None else int(seed)) % 2**63
    found = active_group(group)
    if found is None:
        return own
    box = [own]
    dist.broadcast_object_list(box, src=dist.get_global_rank(found, 0), group=found)
    return int(box[0])


def rank_in(group: Group) -> int:
    """This process's rank in `group`, in the default group where it does not communicate; 0 when alone."""
    found = active_group(group)
    if found is not None:
        return dist.get_rank(found)
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
