"""Keep masked units where they are through a step of any optimizer: the parameter, and the state of its shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from balanceopt.modulation._base import Undo
from balanceopt.modulation._parts import Part, masked_rows

Restore = Callable[[Tensor], None]

# State that a base makes in its first step is zero before it, in units that have not moved, but for these.
_COPIES_OF_PARAMETER = frozenset(
    {
        "ax", "slow_buffer", "slow_param", "x0", "z",  # ASGD, Ranger, Lookahead, MADGRAD, schedule-free
        "lookahead_params", "p0", "prev_param", "x_k",  # pytorch_optimizer: Ranger21, Prodigy, AdaSmooth, A2Grad
    }
)  # fmt: skip
# One matrix for each dimension, of a square parameter's shape: Shampoo; Kron and SOAP; Alice; LoRARite; SPlus.
_OF_A_DIMENSION = frozenset({"precond", "inv_precond", "Q", "GG", "U", "basis", "v_r", "sides", "q_sides"})
# The same under a name for each dimension: both packages' Shampoo, LoRARite.
_OF_DIMENSION_ = ("precond_", "inv_precond_", "pre_cond_", "inv_pre_cond_", "basis_")
# A zero gradient leaves it what it was made as: Rprop; pytorch_optimizer's Kate, Adai, VSGD, SPAM and SaRA.
_LEFT_BY_ZERO = frozenset({"step_size", "b", "beta1_prod", "bg", "bhg", "mask"})


class Scratch:
    """Memory that is used again in every step: on the CPU new memory costs more than what is written to it."""

    def __init__(self) -> None:
        """Hold nothing yet."""
        self._blocks: dict[torch.dtype, Tensor] = {}
        self._used: dict[torch.dtype, int] = {}

    def clear(self) -> None:
        """Everything taken may be given again."""
        self._used.clear()

    def take(self, size: int, dtype: torch.dtype) -> Tensor:
        """`size` numbers of the CPU's memory that nothing else uses until `clear`."""
        start = self._used.get(dtype, 0)
        self._used[dtype] = start + size
        block = self._blocks.get(dtype)
        if block is None or block.numel() < start + size:
            # What was taken from the old block keeps it alive until it is put back.
            self._blocks[dtype] = block = torch.empty(2 * (start + size), dtype=dtype)
        return block[start : start + size]

    def __getstate__(self) -> dict[str, Any]:
        return {"_blocks": {}, "_used": {}}


@torch.no_grad()
def freeze(
    parts: Sequence[Part],
    kept: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    scratch: Scratch,
) -> Undo:
    """Remember the units that are not kept; returns what puts them back after the step.

    Args:
        parts: what is masked.
        kept: bool `(n,)` by part.
        optimizer: the base.
        scratch: memory to remember them in.
    """
    scratch.clear()
    states = _states(optimizer)
    restores = []
    for part, own in zip(parts, kept, strict=True):
        rows = masked_rows(part, own)
        if rows is None or rows.numel() > 0:
            restores.append(_freeze_part(part, own, rows, states, scratch))

    def put_back() -> None:
        with torch.no_grad():
            for restore in restores:
                restore()

    return put_back


def _freeze_part(part: Part, kept: Tensor, rows: Tensor | None, states: list[Any], scratch: Scratch) -> Undo:
    parameter = part.slot.parameter

    def keep(tensor: Tensor) -> Restore:
        return _keep_all(part, kept, tensor) if rows is None else _keep_rows(part, rows, tensor, scratch)

    own = keep(parameter)
    before = [{keys: keep(value) for keys, value in _shaped(state, parameter)} for state in states]

    def put_back() -> None:
        own(parameter)
        for state, saved in zip(states, before, strict=True):
            for keys, value in _shaped(state, parameter):
                if keys in saved:
                    saved[keys](value)
                elif keys[0] in _COPIES_OF_PARAMETER:
                    own(value)
                elif keys[0] not in _LEFT_BY_ZERO:
                    part.of(value).masked_fill_(part.spread(~kept), 0)

    return put_back


def _keep_rows(part: Part, rows: Tensor, tensor: Tensor, scratch: Scratch) -> Restore:
    """What puts some units of a tensor back as they are now."""
    dim = part.rows
    assert dim is not None
    view = part.of(tensor)
    shape = [*view.shape[:dim], rows.numel(), *view.shape[dim + 1 :]]
    size = view.numel() // view.shape[dim] * rows.numel()
    saved = torch.index_select(view, dim, rows, out=scratch.take(size, tensor.dtype).view(shape))

    def restore(now: Tensor) -> None:
        part.of(now).index_copy_(dim, rows, saved)

    return restore


def _keep_all(part: Part, kept: Tensor, tensor: Tensor) -> Restore:
    """The same where an index would have a size that only the device knows."""
    saved = part.of(tensor).clone()
    keeps = part.spread(kept)

    def restore(now: Tensor) -> None:
        view = part.of(now)
        view.copy_(torch.where(keeps, view, saved))

    return restore


def _states(optimizer: torch.optim.Optimizer) -> list[Any]:
    """The state of the optimizer, and of those that it holds in turn (Lookahead, ZeroRedundancyOptimizer)."""
    found: list[Any] = []
    waiting = [optimizer]
    while waiting:
        one = waiting.pop()
        if all(one.state is not other for other in found):
            found.append(one.state)
            waiting += [value for value in vars(one).values() if isinstance(value, torch.optim.Optimizer)]
    return found


def _shaped(state: Any, parameter: Tensor) -> list[tuple[tuple[str, ...], Tensor]]:
    """What the state holds for each element of the parameter, with the keys that lead there."""
    return [
        (keys, value)
        for keys, value in _tensors(state.get(parameter, {}))
        if value.shape == parameter.shape
        and keys[0] not in _OF_A_DIMENSION
        and not keys[0].startswith(_OF_DIMENSION_)
    ]


def _tensors(value: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Every tensor in nested containers (AggMo keeps several momenta)."""
    if isinstance(value, Tensor):
        yield keys, value
    elif isinstance(value, (Mapping, list, tuple)):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, inner in items:
            yield from _tensors(inner, (*keys, str(key)))
