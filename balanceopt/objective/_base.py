"""Base of the losses on encoders' features: their hooks, their end, and copies without hooks."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from balanceopt._removable import Removable
from balanceopt.monitor import CallWatch, ModalityMonitor
from balanceopt.objective._live import LiveFeatures


class Objective(Removable, nn.Module):
    """Base of losses on the features of the latest forward, which hooks of a monitor record."""

    monitor: ModalityMonitor

    def __init__(self, monitor: ModalityMonitor, *, trains: bool = True) -> None:
        """Start without hooks.

        Args:
            monitor: monitor on the encoders.
            trains: whether features of training passes are recorded, for a loss of them.
        """
        super().__init__()
        # Set past nn.Module.__setattr__, because the user's model must not become a submodule.
        self.__dict__["monitor"] = monitor
        self._live = LiveFeatures(monitor, trains=trains)

    def remove(self) -> None:
        """Remove every hook. May be called twice."""
        self.monitor.hooks.outputs.drop(self._live.on_output)
        self._live.forget()
        if self._live.watch is not None:
            self._live.watch.remove()

    def _hook(self, *, uncalled: str | None) -> None:
        """Record features from now on; the last statement of a constructor, so that one that raises leaves no hook.

        Args:
            uncalled: what is lost where the loop never calls the objective, for a warning; None for no warning.
        """
        self.monitor.hooks.outputs.add(self._live.on_output)
        if uncalled is not None:
            self._live.watch = CallWatch(self.monitor, None, uncalled)
            weakref.finalize(self, self._live.watch.remove).atexit = False

    def __getstate__(self) -> dict[str, Any]:
        # A copy is inert, because hooks exist on the original monitor's model only.
        return {**self.__dict__, "_live": LiveFeatures(self.monitor)}
