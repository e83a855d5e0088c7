"""Side-effect-free re-runs of model code: the state that user code may change is saved and restored."""

from __future__ import annotations

import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from operator import is_
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from balanceopt._sharding import is_sharded
from balanceopt._torch import GLOBAL_HOOKS, MODULE_HOOKS, has_compiler, keep_compiler_stance, version_of
from balanceopt._undo import Undo
from balanceopt.monitor._module_hooks import FunctionalHooks

Twin = TypeVar("Twin")

_CONTAINERS = frozenset({dict, OrderedDict, defaultdict, Counter, list, deque, set})
_PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size})
# Attributes of nn.Module itself, which are skipped when empty: a re-run can't add to the module's hooks, which are
# replaced by other dicts, and a forward does not change the rest.
_MACHINERY = frozenset(vars(nn.Module()))
# Longer lists and dicts are saved without the contents of their items, and larger arrays not at all, to save time.
_MANY_ITEMS = 1000
_MANY_BYTES = 2**20


# -- process state ---------------------------------------------------------------------------------------------------


def keep_random_states(undo: Undo, devices: Iterable[torch.device]) -> None:
    """Save the global random streams (torch, `devices`, numpy, Python), to be restored by `undo`."""
    undo.note(partial(torch.set_rng_state, torch.get_rng_state()))
    for device in devices:
        if device.type not in ("cpu", "meta"):
            module = torch.get_device_module(device)
            undo.note(partial(module.set_rng_state, module.get_rng_state(device), device))
    undo.note(partial(np.random.set_state, np.random.get_state()))
    undo.note(partial(random.setstate, random.getstate()))


def without_gradients(undo: Undo) -> None:
    """Disable gradients until `undo` restores the mode."""
    undo.note(partial(torch.set_grad_enabled, torch.is_grad_enabled()))
    torch.set_grad_enabled(False)


def quieten(undo: Undo, modules: Sequence[nn.Module], device: torch.device) -> None:
    """Prepare a re-run: disable gradients, global hooks and compiled code, and save the global random streams.

    Sharded parameters of `modules` are gathered here, a collective of all ranks.
    """
    without_gradients(undo)
    keep_random_states(undo, [device])
    for module in modules:
        if hasattr(module, "unshard") and any(is_sharded(p) for p in module.parameters()):
            sharded: Any = module  # the re-run skips FSDP2's hooks, which would gather
            undo.note(sharded.reshard)
            sharded.unshard()
    if has_compiler():  # without a compiler nothing is compiled
        undo.note(keep_compiler_stance())
        torch.compiler.set_stance("force_eager")
    for hooks in filter(None, GLOBAL_HOOKS):  # profilers and operation counters would count the re-run
        undo.note(partial(_refill, hooks, dict(hooks)))
        hooks.clear()
    checkpoint = sys.modules.get("torch.utils.checkpoint")
    if checkpoint is not None:
        # Reentrant checkpointing warns of inputs without gradients. `warnings.catch_warnings` would reset the record of
        # shown warnings.
        undo.set(vars(checkpoint), "check_backward_validity", _ignore)


def _ignore(inputs: Any) -> None:
    pass


# -- module state ---------------------------------------------------------------------------------------------------


def evaluate(undo: Undo, modules: Iterable[nn.Module]) -> None:
    """Put `modules` into eval mode."""
    for module in modules:
        if isinstance(module, torch.jit.ScriptModule):  # holds its mode in C++
            undo.note(partial(setattr, module, "training", module.training))
            module.training = False
        elif module.training:
            # By __dict__, since nn.Module's attribute setter costs more than the fusion of a small model.
            undo.set(vars(module), "training", False)


class State:
    """Saved state of modules, beside parameters, to be restored after a re-run of the modules' code.

    The state is the modules' attributes and buffers, and the items of lists, dicts, sets and the model's plain objects
    among these. The re-run gets copies of what it may write to: buffers, arrays, and tensors changed in place before.
    The originals keep their values and graphs.
    """

    def __init__(
        self,
        undo: Undo,
        modules: Iterable[nn.Module],
        written: Collection[int] = (),
        *,
        thorough: bool = False,
    ) -> None:
        """Save the state of `modules`, to be restored by `undo`.

        Args:
            undo: restores the state.
            modules: modules whose code runs again.
            written: ids of parameters that the code changes in place.
            thorough: whether to copy each tensor among the attributes, but no buffer; the caller restores buffers.
        """
        self._undo = undo
        self._parts = [module for module in modules if not _is_unbuilt(module)]
        self._written = written
        self._thorough = thorough
        self._before: dict[int, tuple[Any, Any]] = {}
        self._twins: dict[int, Any] = {}
        self._watched: list[tuple[Tensor, int, tuple[Any, ...]]] = []
        undo.note(self._restore)
        for module in self._parts:
            self._keep_module(module)

    def quieten(self, functional: FunctionalHooks) -> None:
        """Put the modules into eval mode, with only the hooks that are part of the model's function."""
        evaluate(self._undo, (module for module in self._parts if isinstance(module, torch.jit.ScriptModule)))
        for module in self._parts:
            namespace = vars(module)
            for kind in MODULE_HOOKS:
                namespace[kind] = OrderedDict(functional.of(module, kind) if namespace.get(kind) else ())
            namespace["training"] = False

    def tensor(self, tensor: Tensor, *where: Any) -> Tensor:
        """Return what the re-run gets for a tensor at `where`: a copy, or the tensor, watched for changes."""
        if is_lazy(tensor):
            return tensor
        if isinstance(tensor, nn.Parameter):
            if id(tensor) in self._written:
                return self._twin(tensor, nn.Parameter(_copied(tensor), tensor.requires_grad))
            return tensor
        buffer = where[-2:-1] == ("_buffers",)
        if not tensor.requires_grad:
            if self._thorough:
                return tensor if buffer else self._twin(tensor, _copied(tensor))
            if buffer or tensor.is_inference() or version_of(tensor) > 0:
                return self._twin(tensor, _copied(tensor))
        self._watched.append((tensor, version_of(tensor), where))
        return tensor

    def refuse_changed(self) -> None:
        """Raise if the re-run has changed in place a tensor that was not copied.

        Raises:
            RuntimeError: for such a tensor; the message names the attribute.
        """
        for tensor, version, where in self._watched:
            if version_of(tensor) != version:
                raise RuntimeError(
                    f"the model's forward changes {'.'.join(map(str, where))} in place in eval mode. The run of the "
                    "fusion by which a modality is scored alone can't take that back. Make it a buffer, change it out "
                    "of place or only in training mode, or pass `scores=` with a function from features to uni-modal "
                    "logits."
                )

    def _keep_module(self, module: nn.Module) -> None:
        namespace = vars(module)
        home, where = type(module).__module__, (type(module).__name__,)
        before = dict(namespace)
        self._before[id(namespace)] = namespace, before
        for name, value in before.items():
            kind = type(value)
            if kind in _PLAIN or (name in _MACHINERY and not value):
                continue
            if kind in _CONTAINERS:
                if name == "_modules" or (name == "_parameters" and not self._written):
                    self._before[id(value)] = value, dict(value)
                else:
                    self._keep(value, home, (*where, name))
            elif (given := self._visit(value, home, (*where, name))) is not value:
                namespace[name] = given

    def _keep(self, container: Any, home: str, where: tuple[Any, ...]) -> None:
        if id(container) in self._before:
            return
        before = dict(container) if isinstance(container, dict) else list(container)
        self._before[id(container)] = container, before
        if len(before) > _MANY_ITEMS:
            return
        for key, value in before.items() if isinstance(before, dict) else enumerate(before):
            kind = type(value)
            if kind in _CONTAINERS:
                self._keep(value, home, (*where, key))
            elif kind not in _PLAIN:
                given = self._visit(value, home, (*where, key))
                if given is not value and not isinstance(container, set):
                    container[key] = given

    def _visit(self, value: Any, home: str, where: tuple[Any, ...]) -> Any:
        """Return the value or the copy that the re-run gets, and save what the value holds."""
        if id(value) in self._twins:
            return self._twins[id(value)]
        if isinstance(value, Tensor):
            return self.tensor(value, *where)
        if isinstance(value, np.ndarray):
            return self._twin(value, value.copy()) if value.nbytes <= _MANY_BYTES else value
        if isinstance(value, tuple):
            for item in value:
                if type(item) in _CONTAINERS:
                    self._keep(item, home, where)
        elif isinstance(value, nn.Module):
            pass
        elif type(value).__module__ == home and _is_plain_object(value):
            self._keep(vars(value), home, where)
        else:
            _keep_stream(self._undo, value)
        return value

    def _twin(self, value: Any, twin: Twin) -> Twin:
        self._twins[id(value)] = twin
        return twin

    def _restore(self) -> None:
        for container, before in self._before.values():
            _refill(container, before)


def _is_unbuilt(module: nn.Module) -> bool:
    """Tell whether a module is lazy and still waits for its first forward, whose changes must stay."""
    return isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _is_plain_object(value: Any) -> bool:
    """Tell whether a value is an object with attributes, none of which is a module or optimizer (as in a trainer)."""
    held = getattr(value, "__dict__", None)
    return type(held) is dict and not any(
        isinstance(item, (nn.Module, torch.optim.Optimizer)) for item in held.values()
    )


def _keep_stream(undo: Undo, value: Any) -> None:
    """Save a random stream, to be restored by `undo`."""
    if isinstance(value, torch.Generator):
        undo.note(partial(value.set_state, value.get_state()))
    elif isinstance(value, random.Random):
        undo.note(partial(value.setstate, value.getstate()))
    elif isinstance(value, np.random.RandomState):
        undo.note(partial(value.set_state, value.get_state()))
    elif isinstance(value, np.random.Generator):
        undo.note(partial(setattr, value.bit_generator, "state", value.bit_generator.state))


def _refill(container: Any, before: Any) -> None:
    """Restore a container's items and their order in place."""
    if isinstance(container, set):
        container.intersection_update(before)
        container.update(before)
    elif isinstance(container, dict):
        if not (_is_same(container, before) and _is_same(container.values(), before.values())):
            for key in [key for key in container if key not in before]:
                del container[key]
            if not _is_same(container, before):
                container.clear()
            if type(container) is dict:
                container.update(before)
            else:  # since Counter.update adds
                for key, value in before.items():
                    container[key] = value
    elif not _is_same(container, before):
        container.clear()
        container.extend(before)


def _is_same(a: Collection[Any], b: Collection[Any]) -> bool:
    """Tell whether two collections hold the same objects in the same order."""
    return len(a) == len(b) and all(map(is_, a, b))
