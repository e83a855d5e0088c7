"""Keep masked units where they are through a step of any optimizer: the parameter, and the state of its shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from balanceopt._deferred import on_host
from balanceopt.modulation._base import Undo
from balanceopt.modulation._parts import Part

Restore = Callable[[Tensor], None]

# State that a base makes in its first step is zero before it, in units that have not moved, but for these.
_COPIES_OF_PARAMETER = frozenset(
    {"ax", "slow_buffer", "slow_param", "x0", "z"}
)  # ASGD, Ranger, Lookahead, MADGRAD
_SET_BY_OPTION = frozenset({"step_size"})  # Rprop: a zero gradient leaves it what it was made as


@torch.no_grad()
def freeze(parts: Sequence[Part], kept: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> Undo:
    """Remember the units that are not kept; returns what puts them back after the step.

    Args:
        parts: what is masked.
        kept: bool `(n,)` by part.
        optimizer: the base.
    """
    states = _states(optimizer)
    restores = [_freeze_part(part, own, states) for part, own in zip(parts, kept, strict=True)]

    def put_back() -> None:
        with torch.no_grad():
            for restore in restores:
                restore()

    return put_back


def _states(optimizer: Any) -> list[Any]:
    """The state of the optimizer, and of those that it wraps in turn."""
    found: list[Any] = []
    while isinstance(optimizer, torch.optim.Optimizer):
        if all(optimizer.state is not other for other in found):
            found.append(optimizer.state)
        optimizer = getattr(optimizer, "optimizer", None)
    return found


def _freeze_part(part: Part, kept: Tensor, states: list[Any]) -> Undo:
    parameter = part.slot.parameter
    keep = _keeper(part, kept)
    own = keep(parameter)
    before = [{key: keep(value) for key, value in _shaped(state, parameter)} for state in states]

    def put_back() -> None:
        own(parameter)
        for state, saved in zip(states, before, strict=True):
            for key, value in _shaped(state, parameter):
                if key in saved:
                    saved[key](value)
                elif key in _COPIES_OF_PARAMETER:
                    own(value)
                elif key not in _SET_BY_OPTION:
                    part.of(value).masked_fill_(part.spread(~kept), 0)

    return put_back


def _shaped(state: Any, parameter: Tensor) -> list[tuple[str, Tensor]]:
    """What the state holds for each element of the parameter."""
    own = state.get(parameter, {})
    return [(k, v) for k, v in own.items() if isinstance(v, Tensor) and v.shape == parameter.shape]


def _keeper(part: Part, kept: Tensor) -> Callable[[Tensor], Restore]:
    """From a tensor to what puts its masked units back as they are now."""
    dim = part.rows
    if dim is not None and on_host(kept) is not None:
        masked = (~kept).nonzero().squeeze(1)

        def keep_rows(tensor: Tensor) -> Restore:
            saved = part.of(tensor).index_select(dim, masked)

            def restore_rows(now: Tensor) -> None:
                part.of(now).index_copy_(dim, masked, saved)

            return restore_rows

        return keep_rows
    keeps = part.spread(kept)  # an index would have a size that only the device knows

    def keep_all(tensor: Tensor) -> Restore:
        saved = part.of(tensor).clone()

        def restore(now: Tensor) -> None:
            view = part.of(now)
            view.copy_(torch.where(keeps, view, saved))

        return restore

    return keep_all
