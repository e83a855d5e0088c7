"""Hooks on modules: weak hooks of this package, and detection of hooks that are part of the model's function."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import partial, wraps
from typing import Any, TypeVar, cast
from weakref import WeakMethod, finalize, ref

from torch import nn

from balanceopt._torch import (
    AFTER_FORWARD,
    BEFORE_FORWARD,
    SHARDING_HOOKS,
    exclude_from_graphs,
    is_traced,
    uncompiled,
    version_of,
)
from balanceopt.monitor._outputs import tensors_in

# Shown by torch if a hook breaks the graph under fullgraph=True.
_NO_FULL_GRAPH = "balanceopt's ModalityMonitor looks at the numbers: compile the model without fullgraph=True"

Function = TypeVar("Function", bound=Callable[..., Any])


def outside_graphs(function: Function) -> Function:
    """Exclude a hook, which reads tensor values, from compiled graphs; a no-op hook while `is_traced`."""

    @wraps(function)
    def hook(*args: Any, **kwargs: Any) -> Any:
        return None if is_traced() else function(*args, **kwargs)

    return cast("Function", uncompiled(_NO_FULL_GRAPH)(hook))


class WeakHook:
    """Hook of a bound method that does not keep the method's object alive; a no-op once the object is collected.

    A deep copy or a pickle of the hook is a no-op too, since the object does not watch the copied module.
    """

    def __init__(self, method: Callable[..., Any] | None = None, *args: Any) -> None:
        """Hold `method` weakly, to call with `args` before torch's arguments; None for a no-op."""
        exclude_from_graphs()
        self._method = None if method is None else WeakMethod(method)
        self._args = args

    @outside_graphs
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        method = None if self._method is None else self._method()
        return None if method is None else method(*self._args, *args, **kwargs)

    def __reduce__(self) -> tuple[type[WeakHook], tuple[()]]:
        return WeakHook, ()


class Hook(WeakHook):
    """Weak hook on a module, removed by identity and not by torch's handle, which an interrupt may lose."""

    def __init__(self, module: nn.Module, method: Callable[..., Any], *args: Any) -> None:
        """Prepare a hook on `module` without registering the hook."""
        super().__init__(method, *args)
        self._module = ref(module)

    def before(self, **options: bool) -> None:
        """Register as a forward pre-hook, called with `(module, args, kwargs)`."""
        if (module := self._module()) is not None:
            module.register_forward_pre_hook(self, with_kwargs=True, **options)

    def after(self, **options: bool) -> None:
        """Register as a forward hook, called with `(module, args, kwargs, output)`."""
        if (module := self._module()) is not None:
            module.register_forward_hook(self, with_kwargs=True, **options)

    def remove(self) -> None:
        """Remove the hook. May be called twice."""
        attributes = vars(module) if (module := self._module()) is not None else {}
        for kind in (BEFORE_FORWARD, AFTER_FORWARD):
            hooks = attributes.get(kind, {})
            for key in [key for key, hook in hooks.items() if hook is self]:
                del hooks[key]
                for options in (f"{kind}_with_kwargs", f"{kind}_always_called"):
                    attributes.get(options, {}).pop(key, None)


def remove_hooks(hooks: Iterable[Hook]) -> None:
    """Remove several hooks."""
    for hook in hooks:
        hook.remove()


class FunctionalHooks:
    """Separate forward hooks that are part of the model's function from an observer's hooks (a logger, a counter).

    Part of the function are hooks with code of the model, or of an installed library that defines one of its modules
    (torch's `weight_norm`, Transformers' collecting of hidden states), and hooks that change a module's input or
    output, as probes before and after the hooks see in a pass. Hooks of this package never are.
    """

    def __init__(self) -> None:
        """Start without any classified hook."""
        self.probes: list[Hook] = []
        self._of_code: dict[int, bool] = {}
        self._changing: set[int] = set()
        self._looking: set[int] = set()
        self._around: dict[tuple[int, str], tuple[Hook, Hook]] = {}
        self._before: dict[tuple[int, str], tuple[list[Any], list[int]]] = {}
        finalize(self, remove_hooks, self.probes).atexit = False

    def probe(self, modules: Iterable[nn.Module]) -> None:
        """Register probes around the hooks on `modules` that can't be classified by code."""
        modules = list(modules)
        hooked = [
            module
            for module in modules
            if vars(module).get(BEFORE_FORWARD) or vars(module).get(AFTER_FORWARD)
        ]
        classes = {type(module) for module in modules} if hooked else set()
        for module in hooked:
            for kind in (BEFORE_FORWARD, AFTER_FORWARD):
                hooks = vars(module).get(kind, {})
                doubtful = [hook for key, hook in hooks.items() if not self._is_of_model(key, hook, classes)]
                if doubtful:
                    self._surround(module, kind, list(hooks.values()), doubtful)

    def resent(self, module: nn.Module, output: Any) -> None:
        """Record that this package has replaced a module's output."""
        if (id(module), AFTER_FORWARD) in self._before:
            self._before[id(module), AFTER_FORWARD] = _shown((output,))

    def of(self, module: nn.Module, kind: str) -> dict[int, Callable[..., Any]]:
        """Return the hooks of one kind on a module that are part of the model's function, by torch's hook number."""
        hooks = vars(module).get(kind, {}) if kind in (BEFORE_FORWARD, AFTER_FORWARD) else {}
        return {
            key: hook
            for key, hook in hooks.items()
            if not _is_plumbing(hook) and (self._of_code.get(key) or key not in self._looking)
        }

    def remove(self) -> None:
        """Remove the probes."""
        remove_hooks(self.probes)
        self.probes.clear()
        self._around.clear()
        self._before.clear()

    def _is_of_model(self, key: int, hook: Callable[..., Any], classes: set[type[nn.Module]]) -> bool:
        """Tell whether a hook needs no probe, because its code is the model's or this package's."""
        if key not in self._of_code:
            self._of_code[key] = _is_plumbing(hook) or _is_code_of(hook, classes)
        return self._of_code[key]

    def _surround(
        self,
        module: nn.Module,
        kind: str,
        hooks: list[Callable[..., Any]],
        doubtful: list[Callable[..., Any]],
    ) -> None:
        """Keep probes before and after the doubtful hooks, and replace the probes if a hook is outside."""
        first, last = self._around.get((id(module), kind), (None, None))
        if first in hooks and last in hooks:
            if hooks.index(first) < hooks.index(doubtful[0]) and hooks.index(doubtful[-1]) < hooks.index(
                last
            ):
                return
            first.remove()
            last.remove()
        pair = Hook(module, self._on_first, kind), Hook(module, self._on_last, kind)
        self.probes += pair  # before registration, so that an interrupt leaves no unlisted hook
        self._around[id(module), kind] = pair
        for probe, prepend in zip(pair, (True, False), strict=True):
            put_on = probe.before if kind == BEFORE_FORWARD else probe.after
            put_on(prepend=prepend)

    def _on_first(self, kind: str, module: nn.Module, *values: Any) -> None:
        self._before[id(module), kind] = _shown(values)

    def _on_last(self, kind: str, module: nn.Module, *values: Any) -> None:
        items, versions = self._before.pop((id(module), kind), ([], []))
        now, new_versions = _shown(values)
        same = len(items) == len(now) and all(a is b for a, b in zip(items, now, strict=True))
        keys = {key for key, hook in vars(module)[kind].items() if not _is_plumbing(hook)}
        if not same or versions != new_versions:
            self._changing |= keys
        self._looking = (self._looking | keys) - self._changing


def _shown(values: tuple[Any, ...]) -> tuple[list[Any], list[int]]:
    """Return the values that hooks may replace (`args` and `kwargs`, or the output), and the versions of tensors."""
    items = [values[0], *values[1].values()] if len(values) == 2 else [values[-1]]
    return items, [version_of(tensor) for tensor in tensors_in(items) if not tensor.is_inference()]


def _is_plumbing(hook: Callable[..., Any]) -> bool:
    """Tell whether a hook is of this package, or of torch's sharding."""
    code = _code(hook)
    return isinstance(code, WeakHook) or str(getattr(code, "__module__", "")).startswith(SHARDING_HOOKS)


def _is_code_of(hook: Callable[..., Any], classes: set[type[nn.Module]]) -> bool:
    """Tell whether a hook is code of these module classes, or of an installed library that defines some of these."""
    code = _code(hook)
    if isinstance(getattr(code, "__self__", None), nn.Module):
        return True
    code = code if hasattr(code, "__qualname__") else type(code)
    where, name = str(code.__module__), str(code.__qualname__)
    bases = {base for c in classes for base in c.__mro__}
    if any(where == base.__module__ and name.startswith(f"{base.__qualname__}.") for base in bases):
        return True
    library = where.split(".")[0]
    file = getattr(sys.modules.get(library), "__file__", None) or ""
    installed = "site-packages" in file or "dist-packages" in file
    return installed and any(library == base.__module__.split(".")[0] for base in bases)


def _code(hook: Callable[..., Any]) -> Any:
    while isinstance(hook, partial):
        hook = hook.func
    return hook
