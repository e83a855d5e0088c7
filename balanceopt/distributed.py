"""What ranks share: sums and the seed. Everything is the identity without a process group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from balanceopt._options import check_seed, shown

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


def check_group(group: object) -> None:
    """Refuse what is no process group.

    Raises:
        TypeError: saying what may be given.
    """
    if group is not None and group is not False and not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "`group` should be a process group, None for the default one or False for no communication. "
            f"Found {shown(group)}."
        )


def sum_over_ranks(tensor: Tensor, group: Group) -> Tensor:
    """The sum of `tensor` over the ranks of `group`, on every rank; `tensor` itself when alone."""
    found = active_group(group)
    if found is None:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total, group=found)
    return total


def shared_seed(group: Group, seed: int | None = None) -> int:
    """The first rank's `seed`, `torch.initial_seed()` where None, on every rank; below 2**63.

    Raises:
        ValueError: if `seed` is no whole number.
    """
    check_seed(seed)
    return int(of_first_rank((torch.initial_seed() if seed is None else int(seed)) % 2**63, group))


def of_first_rank(value: Any, group: Group) -> Any:
    """The first rank's `value`, on every rank of `group`; what the others pass is ignored."""
    found = active_group(group)
    if found is None:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=dist.get_global_rank(found, 0), group=found)
    return box[0]


def concatenate_over_ranks(rows: Tensor, counts: Sequence[int], group: Group) -> Tensor:
    """Every rank's rows in rank order, on every rank of `group`; `counts` says how many each rank holds."""
    found = active_group(group)
    if found is None:
        return rows
    # A sum over ranks, as every backend has it for tensors of any device, and ranks may hold no row.
    whole = rows.new_zeros(sum(counts), *rows.shape[1:])
    first = sum(counts[: dist.get_rank(found)])
    whole[first : first + len(rows)] = rows
    dist.all_reduce(whole, group=found)
    return whole


def rank_in(group: Group) -> int:
    """This process's rank in `group`, in the default group where it does not communicate; 0 when alone."""
    found = active_group(group)
    if found is not None:
        return dist.get_rank(found)
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
