"""Collectives for sums, rows and the seed; the identity without a process group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from balanceopt._options import check_seed, shown

Group = dist.ProcessGroup | None | Literal[False]


def active_group(group: Group) -> dist.ProcessGroup | None:
    """Return the process group for collectives; None where this process is alone.

    Args:
        group: a process group, None for the default one where initialised, or False for no communication.
    """
    if group is False or not (dist.is_available() and dist.is_initialized()):
        return None
    found = dist.group.WORLD if group is None else group
    return found if found is not None and dist.get_world_size(found) > 1 else None


def check_group(group: object) -> None:
    """Check that a value is a process group, None or False.

    Raises:
        TypeError: naming the allowed values and the given one.
    """
    if group is not None and group is not False and not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "`group` should be a process group, None for the default one or False for no communication. "
            f"Found {shown(group)}."
        )


def sum_over_ranks(tensor: Tensor, group: Group) -> Tensor:
    """Sum a tensor over the ranks of `group`; every rank gets the sum, a single process `tensor` itself."""
    found = active_group(group)
    if found is None:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total, group=found)
    return total


def shared_seed(group: Group, seed: int | None = None) -> int:
    """Return the first rank's seed, below 2**63, on every rank; `torch.initial_seed()` where `seed` is None.

    Raises:
        ValueError: if `seed` is not a whole number.
    """
    check_seed(seed)
    return int(of_first_rank((torch.initial_seed() if seed is None else int(seed)) % 2**63, group))


def of_first_rank(value: Any, group: Group) -> Any:
    """Broadcast the first rank's `value` to every rank of `group`."""
    found = active_group(group)
    if found is None:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=dist.get_global_rank(found, 0), group=found)
    return box[0]


def concatenate_over_ranks(rows: Tensor, counts: Sequence[int], group: Group) -> Tensor:
    """Gather every rank's rows in rank order on every rank of `group`; `counts` are the rows of each rank."""
    found = active_group(group)
    if found is None:
        return rows
    # Every backend can sum on any device, where not every one can gather, and a rank may hold no row.
    whole = rows.new_zeros(sum(counts), *rows.shape[1:])
    first = sum(counts[: dist.get_rank(found)])
    whole[first : first + len(rows)] = rows
    dist.all_reduce(whole, group=found)
    return whole


def rank_in(group: Group) -> int:
    """Return this process's rank in `group`, else in the default group; 0 without a process group."""
    found = active_group(group)
    if found is not None:
        return dist.get_rank(found)
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
