"""Who acts on an encoder: two of a kind, which know nothing of each other, would act on it twice."""

from __future__ import annotations

import gc
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

_ACTORS: WeakKeyDictionary[nn.Module, WeakSet[Any]] = WeakKeyDictionary()


def enter(actor: Any) -> None:
    """Note that an object with a `monitor` acts on the encoders of that, as long as it lives or until `leave`."""
    for encoder in actor.monitor.encoders.values():
        _ACTORS.setdefault(encoder, WeakSet()).add(actor)


def leave(actor: Any) -> None:
    """Forget it. May be called twice."""
    for encoder in actor.monitor.encoders.values():
        _ACTORS.get(encoder, WeakSet()).discard(actor)


def refuse_company(actor: Any, what: str) -> None:
    """Raise where another of its class acts on one of its encoders, by another monitor.

    To be asked when it first acts, not when it is made: a notebook's cell that is run again makes the new one before
    its name lets go of the old.

    Raises:
        RuntimeError: saying what to do.
    """
    if not _has_company(actor):
        return
    gc.collect()  # the other may be garbage already
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
