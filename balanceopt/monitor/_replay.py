"""Run part of a model once more and leave no trace: what user code may change in a run of its own is put back."""

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
# What nn.Module itself keeps, empty in most modules: the hooks that a forward may add to are hidden, and the rest is no
# business of a forward.
_MACHINERY = frozenset(vars(nn.Module()))
# Of longer lists and dicts the items are kept, but not what the items hold; of larger arrays not even the numbers.
_MANY_ITEMS = 1000
_MANY_BYTES = 2**20


# -- of the process ---------------------------------------------------------------------------------------------------


def keep_random_states(undo: Undo, devices: Iterable[torch.device]) -> None:
    """Leave every global random stream (torch, the devices', numpy, Python) as it is now."""
    undo.note(partial(torch.set_rng_state, torch.get_rng_state()))
    for device in devices:
        if device.type not in ("cpu", "meta"):
            module = torch.get_device_module(device)
            undo.note(partial(module.set_rng_state, module.get_rng_state(device), device))
    undo.note(partial(np.random.set_state, np.random.get_state()))
    undo.note(partial(random.setstate, random.getstate()))


def without_gradients(undo: Undo) -> None:
    """Record no gradients."""
    undo.note(partial(torch.set_grad_enabled, torch.is_grad_enabled()))
    torch.set_grad_enabled(False)


def quieten(undo: Undo, modules: Sequence[nn.Module], device: torch.device) -> None:
    """Record no gradients, call no global hook and no compiled code, draw no global random number.

    Ranks that share parameters of `modules` make them whole together, here.
    """
    without_gradients(undo)
    keep_random_states(undo, [device])
    for module in modules:
        if hasattr(module, "unshard") and any(is_sharded(p) for p in module.parameters()):
            sharded: Any = module  # their own hooks else see to it
            undo.note(sharded.reshard)
            sharded.unshard()
    if has_compiler():  # else nothing was compiled
        undo.note(keep_compiler_stance())
        torch.compiler.set_stance("force_eager")
    for hooks in filter(None, GLOBAL_HOOKS):  # of profilers, counters of operations
        undo.note(partial(_refill, hooks, dict(hooks)))
        hooks.clear()
    checkpoint = sys.modules.get("torch.utils.checkpoint")
    if checkpoint is not None:
        # Reentrant checkpointing complains of inputs without gradients. Not by `warnings.catch_warnings`, which makes
        # every warning that was shown once show again.
        undo.set(vars(checkpoint), "check_backward_validity", _ignore)


def _ignore(inputs: Any) -> None:
    pass


# -- of modules -------------------------------------------------------------------------------------------------------


def evaluate(undo: Undo, modules: Iterable[nn.Module]) -> None:
    """Put `modules` into eval mode."""
    for module in modules:
        if isinstance(module, torch.jit.ScriptModule):  # keeps its mode in C++
            undo.note(partial(setattr, module, "training", module.training))
            module.training = False
        elif module.training:
            # Straight into __dict__: nn.Module's own attribute setter costs more than the whole fusion on small models.
            undo.set(vars(module), "training", False)


class State:
    """What modules keep beside their parameters, as it was before their code runs once more.

    That is their attributes and buffers, and what lists, dicts, sets and the model's own plain objects among these
    hold. The code gets twins of what it may write to: buffers, arrays, tensors that have been written to in place. The
    originals keep their numbers and their graphs.
    """

    def __init__(
        self,
        undo: Undo,
        modules: Iterable[nn.Module],
        written: Collection[int] = (),
        *,
        thorough: bool = False,
    ) -> None:
        """Note in `undo` the way back for `modules`.

        Args:
            undo: the way back.
            modules: whose code runs once more.
            written: ids of parameters to which it writes.
            thorough: make a twin of each tensor among the attributes, but of no buffer: the caller sees to these.
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
        """Put the modules into eval mode, and call only those hooks that are part of the model's function."""
        evaluate(self._undo, (module for module in self._parts if isinstance(module, torch.jit.ScriptModule)))
        for module in self._parts:
            namespace = vars(module)
            for kind in MODULE_HOOKS:
                namespace[kind] = OrderedDict(functional.of(module, kind) if namespace.get(kind) else ())
            namespace["training"] = False

    def tensor(self, tensor: Tensor, *where: Any) -> Tensor:
        """What the code gets for a tensor that stands at `where`: itself, then watched for changes, or a twin."""
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
        """Raise where the code has written to a tensor that it was given no twin of.

        Raises:
            RuntimeError: naming the attribute.
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
        """What the code gets in the place of a value."""
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
    """Whether a first forward is to give a lazy module its parameters, and its class, for good."""
    return isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _is_plain_object(value: Any) -> bool:
    """Whether a value holds attributes of its own, and is not one that holds whole models, as a trainer does."""
    held = getattr(value, "__dict__", None)
    return type(held) is dict and not any(
        isinstance(item, (nn.Module, torch.optim.Optimizer)) for item in held.values()
    )


def _keep_stream(undo: Undo, value: Any) -> None:
    """Leave a random stream as it is."""
    if isinstance(value, torch.Generator):
        undo.note(partial(value.set_state, value.get_state()))
    elif isinstance(value, random.Random):
        undo.note(partial(value.setstate, value.getstate()))
    elif isinstance(value, np.random.RandomState):
        undo.note(partial(value.set_state, value.get_state()))
    elif isinstance(value, np.random.Generator):
        undo.note(partial(setattr, value.bit_generator, "state", value.bit_generator.state))


def _refill(container: Any, before: Any) -> None:
    """Make a container hold what it held before, in the same order."""
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
            else:  # Counter.update adds
                for key, value in before.items():
                    container[key] = value
    elif not _is_same(container, before):
        container.clear()
        container.extend(before)


def _is_same(a: Collection[Any], b: Collection[Any]) -> bool:
    """Whether two collections hold the same objects in the same order."""
    return len(a) == len(b) and all(map(is_, a, b))
