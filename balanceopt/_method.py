"""The lifecycle that all balancing methods share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from typing import Any, Literal, get_args

from torch import Tensor

from balanceopt._deferred import DeferredCounts
from balanceopt._options import check_choice, check_count, check_entries
from balanceopt._removable import Removable

Unit = Literal["step", "epoch"]
Listener = Callable[[int, str, tuple[str, ...], Tensor], None]
# Value of a modality without a value, for which no row is recorded. NaN is a value: something went wrong.
ABSENT = -math.inf
_VARIADIC = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


class Method(Removable):
    """The lifecycle of a balancing method: window, reported quantities, counters, state and removal.

    The base of `Modulation` (changes gradients), `ForwardMethod` (changes features) and `EpochMethod` (acts between
    epochs).

    Args:
        start: first step or epoch of the window, at least 0.
        end: last step or epoch of the window, inclusive; None for no end.
        unit: `"step"`, or `"epoch"` for a window in the epochs that `set_epoch` sets.

    Attributes:
        epoch: the epoch that was set last; None before the first call of `set_epoch`.
        removed: whether `remove` was called.
        listeners: functions `(number, quantity, modalities, values (M,))` that get every reported quantity.

    Raises:
        ValueError: if `start`, `end` or `unit` is invalid.

    Reference:
        docs/adding.md.
    """

    def __init__(self, *, start: int = 0, end: int | None = None, unit: Unit = "step") -> None:
        check_count("start", start)
        check_count("end", end, or_none=True)
        if end is not None and end < start:
            raise ValueError(f"`end` should not be less than `start`. Found start = {start} and end = {end}.")
        check_choice("unit", unit, get_args(Unit))
        self.start = start
        self.end = end
        self.unit: Unit = unit
        self.epoch: int | None = None
        self.removed = False
        self.listeners: list[Listener] = []
        self._counts = DeferredCounts()

    # -- the window ----------------------------------------------------------------------------------------------

    def set_epoch(self, epoch: int) -> None:
        """Set the current epoch, counted from 0, for windows with `unit="epoch"`.

        Raises:
            ValueError: if `epoch` is not a whole number of at least 0.
        """
        check_count("epoch", epoch)
        self.epoch = int(epoch)

    def is_open(self, number: int) -> bool:
        """Whether step `number`, in the epoch that was set last, lies in the window.

        Raises:
            RuntimeError: if `unit="epoch"` and no epoch was set.
        """
        if self.unit == "epoch" and self.epoch is None:
            raise RuntimeError(
                "unit='epoch' counts epochs, and none was set yet. Call set_epoch(epoch) when an epoch begins, before "
                "its first step."
            )
        now = number if self.epoch is None or self.unit == "step" else self.epoch
        return self.start <= now and (self.end is None or now <= self.end)

    # -- counters and reports ------------------------------------------------------------------------------------

    def count(self, **counts: Tensor) -> None:
        """Add 0-d tensors by name to the counters of unusual events that `stats()` returns."""
        self._counts.add(**counts)

    def stats(self) -> dict[str, int]:
        """Return the counters of unusual events by name, with a device synchronisation."""
        return self._counts.read()

    def report(self, number: int, quantity: str, modalities: tuple[str, ...], values: Tensor) -> None:
        """Pass the `(M,)` values of a quantity in step `number` to the listeners, such as a `Recorder`."""
        for listener in self.listeners:
            listener(number, quantity, modalities, values)

    # -- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state that resumes a run bit for bit: plain numbers and tensors; empty where stateless."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of a checkpoint; a load that fails should change nothing.

        Args:
            state: from `state_dict()`.

        Raises:
            TypeError, KeyError, ValueError: if `state` is not a state of this method.
        """
        self.check_state(state)

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise where `load_state_dict` would, before anything changes."""
        check_entries(f"the state of {type(self).__name__}", state, ())

    # -- removal -------------------------------------------------------------------------------------------------

    def remove(self) -> None:
        """Stop the method from acting; a second call is a no-op."""
        self.removed = True

    def options(self) -> dict[str, Any]:
        """Return the constructor's named options for `repr`, read from the attributes of the same names."""
        named = [name for name, p in signature(type(self)).parameters.items() if p.kind not in _VARIADIC]
        return {name: getattr(self, name) for name in named if name != "monitor" and hasattr(self, name)}

    def __repr__(self) -> str:
        shown = ", ".join(f"{key}={value!r}" for key, value in self.options().items())
        return f"{type(self).__name__}({shown})"

    def __getstate__(self) -> dict[str, Any]:
        # A copy would report to the original's listeners.
        return {**self.__dict__, "listeners": []}
