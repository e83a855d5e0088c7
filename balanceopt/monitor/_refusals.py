"""Refusals of unsupported models and contexts, and of two objects that act on the same encoders."""

from __future__ import annotations

import gc
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from balanceopt._torch import is_joining
from balanceopt.distributed import Group, active_group

_ACTORS: WeakKeyDictionary[nn.Module, WeakSet[Any]] = WeakKeyDictionary()


def refuse_model(model: nn.Module) -> None:
    """Raise for wrappers under which gradients or features are out of reach.

    Raises:
        NotImplementedError: for FSDP1, DataParallel and DeepSpeed.
    """
    for module in model.modules():
        kind = type(module)
        if kind.__name__ == "FullyShardedDataParallel":
            raise NotImplementedError(
                "FullyShardedDataParallel (FSDP1) is not supported: its parameters are flat local shards. "
                "Use torch.distributed.fsdp.fully_shard (FSDP2)."
            )
        if isinstance(module, nn.DataParallel):
            raise NotImplementedError(
                "DataParallel is not supported: its replicas' hooks run in threads. Use DistributedDataParallel."
            )
        if kind.__module__.split(".")[0] == "deepspeed":
            raise NotImplementedError(
                "DeepSpeed is not supported: it keeps gradients in buffers of its own. "
                "Use DistributedDataParallel or torch.distributed.fsdp.fully_shard."
            )


def refuse_join(group: Group) -> None:
    """Raise within a forward under `DistributedDataParallel.join()`, where ranks may run out of batches.

    Raises:
        NotImplementedError: under `join()` with several ranks; the message names the alternative.
    """
    if is_joining() and active_group(group) is not None:
        raise NotImplementedError(
            "DistributedDataParallel.join() is not supported: a rank that ran out of batches is missing from the sum "
            "of the scores, and the others would wait for it. Give every rank the same number of batches, as "
            "torch.utils.data.DistributedSampler does."
        )


def enter(actor: Any) -> None:
    """Register an object as acting on its monitor's encoders, until `leave` or its garbage collection."""
    for encoder in actor.monitor.encoders.values():
        _ACTORS.setdefault(encoder, WeakSet()).add(actor)


def leave(actor: Any) -> None:
    """Remove an object from the registry. May be called twice."""
    for encoder in actor.monitor.encoders.values():
        _ACTORS.get(encoder, WeakSet()).discard(actor)


def refuse_company(actor: Any, what: str) -> None:
    """Raise if another object of the actor's class acts on the same encoder by another monitor.

    Call this at the actor's first action, not in `__init__`: a notebook cell that is run again builds the new object
    before the old object is released.

    Raises:
        RuntimeError: if there is such an object; the message names the remedy.
    """
    if not _has_company(actor):
        return
    gc.collect()  # the other object may be garbage already
    if _has_company(actor):
        raise RuntimeError(
            f"another {what}, built with another monitor, acts on the same encoders: both together would act twice. "
            "Was the cell of a notebook run again? Call remove() on the first one."
        )


def _has_company(actor: Any) -> bool:
    return any(
        type(other) is type(actor) and other.monitor is not actor.monitor
        for encoder in actor.monitor.encoders.values()
        for other in _ACTORS.get(encoder, ())
    )
