"""Method: the life that all balancing methods share, whatever they act on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from types import TracebackType
from typing import Any, Literal, TypeVar, get_args

from torch import Tensor

from balanceopt._deferred import DeferredCounts
from balanceopt._options import check_choice, check_count, check_entries

Unit = Literal["step", "epoch"]
Listener = Callable[[int, str, tuple[str, ...], Tensor], None]
Self = TypeVar("Self", bound="Method")


class Method:
    """A balancing method: a window in which it acts, numbers that it reports and counts, a state, an end.

    The base of `Modulation` (changes gradients), `ForwardMethod` (changes features) and `EpochMethod` (acts between
    epochs).

    Args:
        start: first step or epoch in which the method acts, counted from 0.
        end: last one, inclusive; None for no end.
        unit: `"step"`, or `"epoch"` to count the epochs that `set_epoch` is told.

    Attributes:
        epoch: the epoch that was set last; None before the first one.
        removed: whether `remove` was called.
        listeners: functions `(number, quantity, modalities, values (M,))` that are told what the method computes.

    Raises:
        ValueError: for a window that is none.

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
        """Tell which epoch it is, counted from 0; for windows with `unit="epoch"`.

        Raises:
            ValueError: if `epoch` is no whole number of at least 0.
        """
        check_count("epoch", epoch)
        self.epoch = int(epoch)

    def is_open(self, number: int) -> bool:
        """Whether step `number`, in the epoch that was set last, lies in the window.

        Raises:
            RuntimeError: if epochs are counted and none was set.
        """
        if self.unit == "epoch" and self.epoch is None:
            raise RuntimeError(
                "unit='epoch' counts epochs, and none was set yet. Call set_epoch(epoch) when an epoch begins, before "
                "its first step."
            )
        now = number if self.epoch is None or self.unit == "step" else self.epoch
        return self.start <= now and (self.end is None or now <= self.end)

    # -- what the method tells -----------------------------------------------------------------------------------

    def on_counts(self, counts: dict[str, int]) -> None:
        """Look at the counts so far, as soon as they can be read without waiting for a device; to warn or raise."""

    def count(self, **counts: Tensor) -> None:
        """Count how often something odd happened: 0-d tensors by name, which `stats()` shows."""
        self._counts.add(**counts)
        values = self._counts.arrived()
        if values is not None:
            self.on_counts(values)

    def stats(self) -> dict[str, int]:
        """Return how often something odd happened, by name; waits for the device."""
        return self._counts.read()

    def report(self, number: int, quantity: str, modalities: tuple[str, ...], values: Tensor) -> None:
        """Tell listeners such as a `Recorder` the `(M,)` values of a quantity in step `number`."""
        for listener in self.listeners:
            listener(number, quantity, modalities, values)

    # -- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on bit for bit: plain numbers and tensors; empty for no state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint. A load that fails should change nothing.

        Args:
            state: from `state_dict()`.

        Raises:
            TypeError, KeyError, ValueError: if it is none of this method.
        """
        check_entries(f"the state of {type(self).__name__}", state, ())

    # -- the end -------------------------------------------------------------------------------------------------

    def remove(self) -> None:
        """Act no more. May be called twice."""
        self.removed = True

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def options(self) -> dict[str, Any]:
        """Return what `repr` shows: the constructor's arguments, which have attributes of their names."""
        return {name: getattr(self, name) for name in signature(type(self)).parameters}

    def __repr__(self) -> str:
        shown = ", ".join(f"{key}={value!r}" for key, value in self.options().items())
        return f"{type(self).__name__}({shown})"

    def __getstate__(self) -> dict[str, Any]:
        # Who listens is no part of a copy.
        return {**self.__dict__, "listeners": []}
