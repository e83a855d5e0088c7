"""Private API of torch without a public equivalent; no other file of the package uses any."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Function = TypeVar("Function", bound=Callable[..., Any])
_UNCOMPILED: list[tuple[Callable[..., Any], str | None]] = []

# Operations over lists of tensors in one call, documented although their names are private.
foreach_add_ = torch._foreach_add_
foreach_copy_ = torch._foreach_copy_
foreach_lerp_ = torch._foreach_lerp_
foreach_mul_ = torch._foreach_mul_
foreach_norm = torch._foreach_norm
foreach_sub = torch._foreach_sub

# A module's hooks by type: no public API lists them or removes one without its handle.
BEFORE_FORWARD, AFTER_FORWARD = "_forward_pre_hooks", "_forward_hooks"
MODULE_HOOKS = (BEFORE_FORWARD, AFTER_FORWARD, "_backward_pre_hooks", "_backward_hooks")
# Hooks on all modules.
GLOBAL_HOOKS: list[dict[int, Any]] = [
    hooks
    for name, hooks in vars(nn.modules.module).items()
    if name.startswith("_global_") and name.endswith("_hooks")
]
# Attributes that Optimizer.__init__ sets, which third-party optimizers that never call it lack.
OPTIMIZER_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
# Modules that define torch's sharding hooks, which a replay skips because it gathers shards itself.
SHARDING_HOOKS = ("torch.distributed.fsdp", "torch.distributed._composable")
# Prefixes that torch.compile and activation checkpointing add to parameter names.
WRAPPER_NAMES = ("_orig_mod.", "_checkpoint_wrapped_module.")


# -- modules and tensors ----------------------------------------------------------------------------------------------


def compiled_module(module: nn.Module) -> Any:
    """Return the module inside a torch.compile wrapper; None for any other module."""
    return getattr(module, "_orig_mod", None)


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile was used on a model or on a part of it, as a wrapper or in place."""
    return any(
        "_orig_mod" in module._modules or vars(module).get("_compiled_call_impl") is not None
        for module in model.modules()
    )


def has_forward(module: nn.Module) -> bool:
    """Whether a module defines a forward, which containers do not."""
    return getattr(type(module).forward, "__name__", "") != "_forward_unimplemented"


def version_of(tensor: Tensor) -> int:
    """Return the count of in-place writes to a tensor's memory."""
    return tensor._version


def base_of(tensor: Tensor) -> Tensor | None:
    """Return the tensor whose memory a view shares; None for a tensor that is not a view."""
    return tensor._base


def parameters_of(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield a module's direct parameters; several times faster than `parameters(recurse=False)`."""
    return (parameter for parameter in module._parameters.values() if parameter is not None)


def parameter_dict(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return the dict that holds a module's direct parameters, in which any tensor may replace one for a while."""
    return module._parameters


def steps_in_backward(parameter: Tensor) -> bool:
    """Whether an optimizer inside backward updates a parameter."""
    return hasattr(parameter, "_in_backward_optimizers")


def is_flattened(parameter: Tensor) -> bool:
    """Whether a parameter is FSDP1's flat local shard of several parameters."""
    return bool(getattr(parameter, "_fsdp_flattened", False))


def is_joining() -> bool:
    """Whether a forward runs under `DistributedDataParallel.join()`."""
    running = getattr(DistributedDataParallel, "_active_ddp_module", None)
    return bool(getattr(getattr(running, "_join_config", None), "enable", False))


# -- autograd ---------------------------------------------------------------------------------------------------------


def backward_number() -> int:
    """Return the id of the backward that is running in this thread; -1 outside of backward."""
    return torch._C._current_graph_task_id()


def in_backward() -> bool:
    """Whether autograd is running: a forward seen then is activation checkpointing's second one."""
    return backward_number() != -1


def after_backward(callback: Callable[[], None]) -> None:
    """Queue a `callback` for the end of the running backward, as DistributedDataParallel does."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def running_node() -> Any:
    """Return the autograd node whose backward is running; None outside of backward."""
    return torch._C._current_autograd_node()


def number_of_node(node: Any) -> int:
    """Return an autograd node's sequence number, which counts nodes in forward order; -1 for None."""
    return -1 if node is None else int(node._sequence_nr())


def next_node() -> int:
    """Return the sequence number of this thread's next autograd node."""
    return int(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]


def will_run(node: Any) -> bool:
    """Whether the running backward goes through an autograd node.

    Raises:
        RuntimeError: for a leaf among the inputs of `torch.autograd.grad`.
    """
    return bool(torch._C._will_engine_execute_node(node))


# -- tracing and compiling --------------------------------------------------------------------------------------------


def is_traced() -> bool:
    """Whether a function transform (`torch.func`), an export or a tracer is active, so that no training step runs."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    modes = torch._C._TorchDispatchModeKey
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_dispatch_mode(modes.FAKE) is not None
        or torch._C._get_dispatch_mode(modes.PROXY) is not None
    )


def uncompiled(reason: str | None = None) -> Callable[[Function], Function]:
    """Mark a method that `exclude_from_graphs` excludes from compiled graphs.

    Args:
        reason: what torch shows of the graph break under `fullgraph=True`.
    """

    def mark(method: Function) -> Function:
        _UNCOMPILED.append((method, reason))
        return method

    return mark


@cache
def exclude_from_graphs() -> None:
    """Exclude the marked methods of all classes from compiled graphs, from the first monitor on.

    Not at import: `torch.compiler.disable` imports the compiler, which takes ten times as long as all else here.
    """
    knows_reason = "reason" in inspect.signature(torch.compiler.disable).parameters  # since torch 2.8
    for method, reason in _UNCOMPILED:
        owner = getattr(sys.modules[method.__module__], method.__qualname__.split(".")[0])
        options: dict[str, Any] = {"reason": reason} if knows_reason else {}
        setattr(owner, method.__name__, torch.compiler.disable(method, **options))


def is_batched(gradient: Tensor) -> bool:
    """Whether a gradient is batched, as under `vmap` or `torch.autograd.grad(..., is_grads_batched=True)`."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(gradient) or functorch.is_legacy_batchedtensor(gradient)


def inductor_options() -> dict[str, Any]:
    """Return the options of torch.compile's default compiler with their current values."""
    options: dict[str, Any] = torch._inductor.config.get_config_copy()
    return options


def has_compiler() -> bool:
    """Whether torch.compile's front end, whose import takes a second, is imported already."""
    return "torch._dynamo" in sys.modules


def keep_compiler_stance() -> Callable[[], object]:
    """Return a function that restores torch.compile's current stance."""
    from torch._dynamo import eval_frame  # imported here, because the import is slow

    return partial(eval_frame._set_stance, eval_frame._stance)


def holds_compiled_code() -> bool:
    """Whether the process holds code made by torch.compile, which torch shares among all modules of a class."""
    dynamo = sys.modules.get("torch._dynamo.convert_frame")
    return dynamo is not None and any(code() is not None for code in dynamo.output_codes.seen)
