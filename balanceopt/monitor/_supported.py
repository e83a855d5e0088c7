"""What the monitor can't watch, refused with the alternative named."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from balanceopt.distributed import Group, active_group

# What torch says where a hook breaks a graph that should be whole.
_NO_FULL_GRAPH = "balanceopt's ModalityMonitor looks at the numbers: compile the model without fullgraph=True"

Function = TypeVar("Function", bound=Callable[..., Any])


def refuse_model(model: nn.Module) -> None:
    """Raise for wrappers under which gradients or features can't be had.

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
        NotImplementedError: naming the alternative.
    """
    running = getattr(DistributedDataParallel, "_active_ddp_module", None)
    joining = getattr(getattr(running, "_join_config", None), "enable", False)
    if joining and active_group(group) is not None:
        raise NotImplementedError(
            "DistributedDataParallel.join() is not supported: a rank that ran out of batches is missing from the sum "
            "of the scores, and the others would wait for it. Give every rank the same number of batches, as "
            "torch.utils.data.DistributedSampler does."
        )


def in_backward() -> bool:
    """Whether autograd is running: a forward seen then is activation checkpointing's second one."""
    return torch._C._current_graph_task_id() != -1


def is_traced() -> bool:
    """Whether a function transform (`torch.func`), an export or a tracer is at work: no training, or no numbers."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    modes = torch._C._TorchDispatchModeKey
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_dispatch_mode(modes.FAKE) is not None
        or torch._C._get_dispatch_mode(modes.PROXY) is not None
    )


def is_batched(gradient: Tensor) -> bool:
    """Whether a gradient stands for many, as under `vmap` or `torch.autograd.grad(..., is_grads_batched=True)`."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(gradient) or functorch.is_legacy_batchedtensor(gradient)


def next_node() -> int:
    """The number that autograd will give to the next node of this thread's graph."""
    return int(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]


def running_node() -> int:
    """The number of the node whose backward is running; -1 for none."""
    node = torch._C._current_autograd_node()
    return -1 if node is None else int(node._sequence_nr())


def outside_graphs(function: Function) -> Function:
    """Keep a hook, which looks at numbers, out of compiled graphs; it is a no-op while `is_traced`."""

    @wraps(function)
    def hook(*args: Any, **kwargs: Any) -> Any:
        return None if is_traced() else function(*args, **kwargs)

    knows_reason = "reason" in inspect.signature(torch.compiler.disable).parameters  # since torch 2.8
    options: dict[str, Any] = {"reason": _NO_FULL_GRAPH} if knows_reason else {}
    disabled: Function = torch.compiler.disable(hook, **options)
    return disabled
