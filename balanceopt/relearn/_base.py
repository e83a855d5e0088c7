"""Base class of methods that act between epochs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any

from balanceopt._method import Method
from balanceopt._options import check_count, check_entries, check_kind
from balanceopt._undo import Attempt
from balanceopt.monitor import ModalityMonitor


class EpochMethod(Method, ABC):
    """A method that acts between epochs, stepped once an epoch like a learning-rate scheduler.

    A subclass defines `run`.

    Args:
        monitor: a `ModalityMonitor` on the model; `head=None` is enough.
        start: first epoch after which the method acts, at least 0.
        end: last epoch after which the method acts, inclusive; None for no end.

    Attributes:
        last_epoch: number of epochs that have ended.
        attempt: undo steps of the running `step`, called after an exception. `run` records a function before
            each change: `self.attempt.note(function)`.

    Raises:
        TypeError: if `monitor` is not a `ModalityMonitor`.
        ValueError: if `start` or `end` is invalid.

    Reference:
        docs/adding.md.
    """

    def __init__(self, monitor: ModalityMonitor, *, start: int = 0, end: int | None = None) -> None:
        check_kind("`monitor`", monitor, ModalityMonitor, "a ModalityMonitor")
        super().__init__(start=start, end=end, unit="epoch")
        self.monitor = monitor
        self.last_epoch = 0
        self.attempt = Attempt()

    @abstractmethod
    def run(self, epoch: int) -> Any:
        """Act after an epoch, counted from 0, and return the result of `step`."""

    def step(self, *args: Any, **given: Any) -> Any:
        """Count an epoch that has ended, and act if the epoch lies in the window.

        Args:
            *args: further positional arguments of `run`.
            **given: further keyword arguments of `run`.

        Returns:
            The result of `run`; None outside the window and after `remove()`.
        """
        epoch = self.last_epoch
        self.set_epoch(epoch)
        self.attempt = attempt = Attempt()
        with attempt, attempt:
            attempt.note(partial(vars(self).update, last_epoch=epoch))
            result = None if self.removed or not self.is_open(epoch) else self.run(epoch, *args, **given)
            self.last_epoch = epoch + 1
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return the state that resumes a run bit for bit, as plain numbers and tensors."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of a checkpoint; a load that fails changes nothing.

        Args:
            state: from `state_dict()`.

        Raises:
            TypeError, KeyError, ValueError: if `state` is not a state of this method.
        """
        self.check_state(state)
        self.last_epoch = int(state["last_epoch"])

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise where `load_state_dict` would, before anything changes."""
        check_entries(f"the state of {type(self).__name__}", state, ("last_epoch",))
        check_count("last_epoch", state["last_epoch"])
