"""Checks that refuse unsupported models and contexts, and name the alternative."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import nn

from balanceopt._torch import is_joining, is_traced
from balanceopt.distributed import Group, active_group

# Shown by torch if a hook breaks the graph under fullgraph=True.
_NO_FULL_GRAPH = "balanceopt's ModalityMonitor looks at the numbers: compile the model without fullgraph=True"

Function = TypeVar("Function", bound=Callable[..., Any])


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


def outside_graphs(function: Function) -> Function:
    """Exclude a hook, which reads tensor values, from compiled graphs; a no-op hook while `is_traced`."""

    @wraps(function)
    def hook(*args: Any, **kwargs: Any) -> Any:
        return None if is_traced() else function(*args, **kwargs)

    knows_reason = "reason" in inspect.signature(torch.compiler.disable).parameters  # since torch 2.8
    options: dict[str, Any] = {"reason": _NO_FULL_GRAPH} if knows_reason else {}
    disabled: Function = torch.compiler.disable(hook, **options)
    return disabled
