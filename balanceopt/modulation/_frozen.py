"""Keep masked units where they are through a step of any optimizer: the parameter, and the state of its shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from balanceopt.modulation._base import Undo
from balanceopt.modulation._parts import MaskedPart
from balanceopt.modulation._scratch import Scratch

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


@torch.no_grad()
def freeze(parts: Sequence[MaskedPart], optimizer: torch.optim.Optimizer, scratch: Scratch) -> Undo:
    """Remember the units that are not kept, or all of a part where they are not known; returns what puts them back.

    Args:
        parts: what is masked.
        optimizer: the base.
        scratch: memory to remember them in.
    """
    states = _states(optimizer)
    frozen = [_Frozen(own, states, scratch) for own in parts if own.masked is None or own.masked.numel() > 0]

    def put_back() -> None:
        with torch.no_grad():
            for part in frozen:
                part.put_back()

    return put_back


class _Frozen:
    """The masked units of one part, as they are now."""

    __slots__ = ("_before", "_keeps", "_own", "_part", "_rows", "_states")

    def __init__(self, own: MaskedPart, states: Sequence[Any], scratch: Scratch) -> None:
        self._part = own.part
        self._rows = own.masked
        self._keeps = own.part.spread(own.kept)
        self._states = states
        parameter = own.part.slot.parameter
        self._own = self._saved(parameter, scratch)
        self._before = [
            {keys: self._saved(value, scratch) for keys, value in _shaped(state, parameter)}
            for state in states
        ]

    def put_back(self) -> None:
        """In the parameter, and in what the states have of its shape by now."""
        parameter = self._part.slot.parameter
        self._restore(parameter, self._own)
        for state, before in zip(self._states, self._before, strict=True):
            for keys, value in _shaped(state, parameter):
                if keys in before:
                    self._restore(value, before[keys])
                elif keys[0] in _COPIES_OF_PARAMETER:
                    self._restore(value, self._own)
                elif keys[0] not in _LEFT_BY_ZERO:
                    self._part.of(value).masked_fill_(~self._keeps, 0)

    def _saved(self, tensor: Tensor, scratch: Scratch) -> Tensor:
        view, dim, rows = self._part.of(tensor), self._part.rows, self._rows
        if rows is None or dim is None:
            # Small, or an index would have a size that only the device knows: all of it.
            return view.clone()
        shape = [*view.shape[:dim], rows.numel(), *view.shape[dim + 1 :]]
        size = view.numel() // view.shape[dim] * rows.numel()
        return torch.index_select(view, dim, rows, out=scratch.take(size, tensor.dtype).view(shape))

    def _restore(self, tensor: Tensor, saved: Tensor) -> None:
        view, dim, rows = self._part.of(tensor), self._part.rows, self._rows
        if rows is None or dim is None:
            torch.where(self._keeps, view, saved, out=view)
        else:
            view.index_copy_(dim, rows, saved)


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
