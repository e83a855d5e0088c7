"""Hooks on modules: those of this package, which go with their owner, and which of others' are part of the model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any
from weakref import WeakMethod, finalize, ref

from torch import nn

from balanceopt._torch import AFTER_FORWARD, BEFORE_FORWARD, SHARDING_HOOKS, version_of
from balanceopt.monitor._outputs import tensors_in
from balanceopt.monitor._supported import outside_graphs


class WeakHook:
    """A bound method as a hook that does not keep its object alive; a no-op once that is gone.

    A deep copy or a pickle of it is a no-op too: a copied module is not the one that the object watches.
    """

    def __init__(self, method: Callable[..., Any] | None = None, *args: Any) -> None:
        """Call `method` with `args` before what torch gives; None for a no-op."""
        self._method = None if method is None else WeakMethod(method)
        self._args = args

    @outside_graphs
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        method = None if self._method is None else self._method()
        return None if method is None else method(*self._args, *args, **kwargs)

    def __reduce__(self) -> tuple[type[WeakHook], tuple[()]]:
        return WeakHook, ()


class Hook(WeakHook):
    """A weak hook on a module, taken off by identity and not by torch's handle, which an interrupt may lose."""

    def __init__(self, module: nn.Module, method: Callable[..., Any], *args: Any) -> None:
        """Prepare a hook on `module`."""
        super().__init__(method, *args)
        self._module = ref(module)

    def before(self, **options: bool) -> None:
        """Be called before each forward of the module with `(module, args, kwargs)`."""
        if (module := self._module()) is not None:
            module.register_forward_pre_hook(self, with_kwargs=True, **options)

    def after(self, **options: bool) -> None:
        """Be called after each forward of the module with `(module, args, kwargs, output)`."""
        if (module := self._module()) is not None:
            module.register_forward_hook(self, with_kwargs=True, **options)

    def remove(self) -> None:
        """Take the hook off. May be called twice."""
        attributes = vars(module) if (module := self._module()) is not None else {}
        for kind in (BEFORE_FORWARD, AFTER_FORWARD):
            hooks = attributes.get(kind, {})
            for key in [key for key, hook in hooks.items() if hook is self]:
                del hooks[key]
                for options in (f"{kind}_with_kwargs", f"{kind}_always_called"):
                    attributes.get(options, {}).pop(key, None)


def remove_hooks(hooks: Iterable[Hook]) -> None:
    """Take several hooks off."""
    for hook in hooks:
        hook.remove()


class FunctionalHooks:
    """Tell forward hooks that are part of the model's function from those of an observer (a logger, a counter).

    Part of the function are hooks whose code is the model's own or that of an installed library which made one of its
    modules (torch's `weight_norm`, Transformers' collecting of hidden states), and hooks that change what a module gets
    or gives, as probes around them see in a pass. Hooks of this package never are.
    """

    def __init__(self) -> None:
        """Know of no hook yet."""
        self.probes: list[Hook] = []
        self._of_code: dict[int, bool] = {}
        self._changing: set[int] = set()
        self._looking: set[int] = set()
        self._around: dict[tuple[int, str], tuple[Hook, Hook]] = {}
        self._before: dict[tuple[int, str], tuple[list[Any], list[int]]] = {}
        finalize(self, remove_hooks, self.probes).atexit = False

    def probe(self, modules: Iterable[nn.Module]) -> None:
        """Put probes around those hooks on `modules` whose code does not tell what they are."""
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
        """Note that this package itself has exchanged a module's output."""
        if (id(module), AFTER_FORWARD) in self._before:
            self._before[id(module), AFTER_FORWARD] = _shown((output,))

    def of(self, module: nn.Module, kind: str) -> dict[int, Callable[..., Any]]:
        """The hooks of one kind on a module that are part of the model's function, by their number."""
        hooks = vars(module).get(kind, {}) if kind in (BEFORE_FORWARD, AFTER_FORWARD) else {}
        return {
            key: hook
            for key, hook in hooks.items()
            if not _is_plumbing(hook) and (self._of_code.get(key) or key not in self._looking)
        }

    def remove(self) -> None:
        """Take the probes off."""
        remove_hooks(self.probes)
        self.probes.clear()
        self._around.clear()
        self._before.clear()

    def _is_of_model(self, key: int, hook: Callable[..., Any], classes: set[type[nn.Module]]) -> bool:
        """Whether a hook need not be probed, since its code tells that it is the model's, or this package's."""
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
        """Have a probe before and one after the doubtful hooks; new ones, where hooks came since."""
        first, last = self._around.get((id(module), kind), (None, None))
        if first in hooks and last in hooks:
            if hooks.index(first) < hooks.index(doubtful[0]) and hooks.index(doubtful[-1]) < hooks.index(
                last
            ):
                return
            first.remove()
            last.remove()
        pair = Hook(module, self._on_first, kind), Hook(module, self._on_last, kind)
        self.probes += pair  # before they are put on: an interrupt leaves none behind that is not listed
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
    """What hooks may exchange or change: `(args, kwargs)`, or the output, which is the last; and tensors' versions."""
    items = [values[0], *values[1].values()] if len(values) == 2 else [values[-1]]
    return items, [version_of(tensor) for tensor in tensors_in(items) if not tensor.is_inference()]


def _is_plumbing(hook: Callable[..., Any]) -> bool:
    """Whether a hook is this package's, or sees to shards."""
    code = _code(hook)
    return isinstance(code, WeakHook) or str(getattr(code, "__module__", "")).startswith(SHARDING_HOOKS)


def _is_code_of(hook: Callable[..., Any], classes: set[type[nn.Module]]) -> bool:
    """Whether a hook is code of these classes of modules, or of an installed library which some of them are from."""
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
