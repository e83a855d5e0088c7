"""Hooks on modules that go with their owner: none outlives it, and none acts in a copy of its module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from inspect import ismethod
from typing import Any, Generic, TypeVar
from weakref import WeakMethod, ref

from torch import nn

from balanceopt.monitor._supported import outside_graphs

Function = TypeVar("Function", bound=Callable[..., Any])


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

    def before(self) -> None:
        """Be called before each forward of the module with `(module, args, kwargs)`."""
        if (module := self._module()) is not None:
            module.register_forward_pre_hook(self, with_kwargs=True)

    def after(self, **options: bool) -> None:
        """Be called after each forward of the module with `(module, args, kwargs, output)`."""
        if (module := self._module()) is not None:
            module.register_forward_hook(self, with_kwargs=True, **options)

    def remove(self) -> None:
        """Take the hook off. May be called twice."""
        attributes = vars(module) if (module := self._module()) is not None else {}
        for kind in ("_forward_pre_hooks", "_forward_hooks"):
            hooks = attributes.get(kind, {})
            for key in [key for key, hook in hooks.items() if hook is self]:
                del hooks[key]
                for options in (f"{kind}_with_kwargs", f"{kind}_always_called"):
                    attributes.get(options, {}).pop(key, None)


def remove_hooks(hooks: Iterable[Hook]) -> None:
    """Take several hooks off."""
    for hook in hooks:
        hook.remove()


class Listeners(Generic[Function]):
    """Functions in the order in which they came. A bound method is held weakly: it goes with its object."""

    def __init__(self) -> None:
        self._references: list[Callable[[], Function | None]] = []

    def add(self, function: Function) -> None:
        """Call `function` from now on."""
        self._references.append(WeakMethod(function) if ismethod(function) else lambda: function)

    def drop(self, function: Function) -> None:
        """Stop calling `function`."""
        self._references = [held for held in self._references if held() not in (None, function)]

    def __iter__(self) -> Iterator[Function]:
        return iter([function for held in self._references if (function := held()) is not None])

    def __len__(self) -> int:
        return sum(1 for _ in self)
