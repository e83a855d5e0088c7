"""Registry of the objects that modify an encoder, by which two of one class on one encoder are refused."""

from __future__ import annotations

import gc
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

_ACTORS: WeakKeyDictionary[nn.Module, WeakSet[Any]] = WeakKeyDictionary()


def enter(actor: Any) -> None:
    """Register an object as acting on its monitor's encoders, until `leave` or its garbage collection."""
    for encoder in actor.monitor.encoders.values():
        _ACTORS.setdefault(encoder, WeakSet()).add(actor)


def leave(actor: Any) -> None:
    """Remove an object from the registry. May be called twice."""
    for encoder in actor.monitor.encoders.values():
        _ACTORS.get(encoder, WeakSet()).discard(actor)


def refuse_company(actor: Any, what: str) -> None:
    """Raise if another object of the actor's class acts on the same encoder by another monitor.

    Call this at the actor's first action, not in `__init__`: a notebook cell that is run again builds the new object
    before the old object is released.

    Raises:
        RuntimeError: if there is such an object; the message names the remedy.
    """
    if not _has_company(actor):
        return
    gc.collect()  # the other object may be garbage already
    if _has_company(actor):
        raise RuntimeError(
            f"another {what}, built with another monitor, acts on the same encoders: both together would act twice. "
            "Was the cell of a notebook run again? Call remove() on the first one."
        )


def _has_company(actor: Any) -> bool:
    return any(
        type(other) is type(actor) and other.monitor is not actor.monitor
        for encoder in actor.monitor.encoders.values()
        for other in _ACTORS.get(encoder, ())
    )
