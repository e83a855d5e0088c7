"""Hooks that go with the object they belong to."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from balanceopt.monitor._supported import outside_graphs


class WeakHook:
    """A bound method as a hook that does not keep its object alive, and does nothing once that is gone.

    A deep copy or a pickle of it does nothing either: a copied module is not the one that its object watches.
    """

    def __init__(self, method: Callable[..., Any] | None = None) -> None:
        """Call `method`; None for a hook that does nothing."""
        self._method = None if method is None else weakref.WeakMethod(method)

    @property
    def alive(self) -> bool:
        """Whether the object still exists."""
        return self._method is not None and self._method() is not None

    @outside_graphs
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        method = None if self._method is None else self._method()
        return None if method is None else method(*args, **kwargs)

    def __reduce__(self) -> tuple[type[WeakHook], tuple[()]]:
        return type(self), ()
