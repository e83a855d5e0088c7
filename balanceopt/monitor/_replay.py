"""Run part of a model once more and leave no trace: no hook, no random number, no mode, no statistic."""

from __future__ import annotations

import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)

_GLOBAL_HOOKS: list[dict[int, Any]] = [
    hooks
    for name, hooks in vars(nn.modules.module).items()
    if name.startswith("_global_") and name.endswith("_hooks")
]


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Leave every global random stream (torch, the device's, numpy, Python) as it was."""
    devices = [device] if device.type != "cpu" else []
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)


@contextmanager
def quiet(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Within it `modules` are in eval mode, call no hook and no compiled code, and nothing records gradients."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(random_state_kept(device))
        stack.enter_context(_gathered(modules))
        stack.enter_context(_nothing_compiled())
        stack.enter_context(_no_global_hooks())
        stack.enter_context(_no_checkpoint_warnings())
        for module in modules:
            # Straight into __dict__: nn.Module's own attribute setter costs more than the whole fusion on small models.
            changes: dict[str, Any] = {name: OrderedDict() for name in _HOOKS if module.__dict__.get(name)}
            if module.training:
                changes["training"] = False
            stack.enter_context(_attributes(module, changes))
        yield


@contextmanager
def in_eval_mode(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within it `modules` are in eval mode."""
    with ExitStack() as stack:
        for module in modules:
            if module.training:
                stack.enter_context(_attributes(module, {"training": False}))
        yield


@contextmanager
def forwards(replacements: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Within it each module's `forward` is the function given."""
    with ExitStack() as stack:
        for module, function in replacements:
            stack.enter_context(_attributes(module, {"forward": function}))
        yield


@contextmanager
def _nothing_compiled() -> Iterator[None]:
    """Within it compiled functions and modules run as they were written."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and importing it takes a second
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def _no_checkpoint_warnings() -> Iterator[None]:
    """Within it reentrant activation checkpointing does not complain of inputs without gradients.

    Not by `warnings.catch_warnings`, which makes every warning that was shown once show again.
    """
    module: Any = sys.modules.get("torch.utils.checkpoint")
    check = getattr(module, "check_backward_validity", None)
    if check is None:
        yield
        return
    module.check_backward_validity = lambda inputs: None
    try:
        yield
    finally:
        module.check_backward_validity = check


@contextmanager
def _no_global_hooks() -> Iterator[None]:
    """Within it hooks on all modules (profilers, counters of operations) are off."""
    filled = [hooks for hooks in _GLOBAL_HOOKS if hooks]
    before = [hooks.copy() for hooks in filled]
    try:
        for hooks in filled:
            hooks.clear()
        yield
    finally:
        for hooks, kept in zip(filled, before, strict=True):
            hooks.update(kept)


@contextmanager
def _gathered(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within it modules under `fully_shard` have their whole parameters, which their own hooks else see to."""
    sharded: list[Any] = [m for m in modules if hasattr(m, "unshard") and _holds_shards(m)]
    try:
        for module in sharded:
            module.unshard()
        yield
    finally:
        for module in sharded:
            module.reshard()


def _holds_shards(module: nn.Module) -> bool:
    return any(hasattr(p, "full_tensor") for p in module.parameters())


@contextmanager
def _attributes(module: nn.Module, changes: dict[str, Any]) -> Iterator[None]:
    own = module.__dict__
    before = {name: own[name] for name in changes if name in own}
    own.update(changes)
    try:
        yield
    finally:
        for name in changes:
            if name in before:
                own[name] = before[name]
            else:
                own.pop(name, None)
