"""OPM and re-learning under a framework that builds the optimizer and writes the checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from balanceopt._method import Listener
from balanceopt._options import check_kind
from balanceopt._warnings import warn_user
from balanceopt.monitor import ModalityMonitor
from balanceopt.prediction import OPM
from balanceopt.relearn import ReLearnScheduler

Prediction = Callable[[ModalityMonitor], OPM]
ReLearn = Callable[[torch.optim.Optimizer, ModalityMonitor], ReLearnScheduler]

# The state is in an optimizer's param groups, the only part that every framework's checkpoints carry.
KEY = "balanceopt_beside"


class Beside:
    """OPM and re-learning for the time of a run, with their state in the optimizer's checkpoints.

    Args:
        prediction: function from the monitor to an `OPM`; None for none.
        relearn: function from the optimizer and the monitor to a `ReLearnScheduler`; None for none.
    """

    def __init__(self, prediction: Prediction | None, relearn: ReLearn | None) -> None:
        self.modulator: OPM | None = None
        self.scheduler: ReLearnScheduler | None = None
        self._prediction = prediction
        self._relearn = relearn
        self._optimizer: torch.optim.Optimizer | None = None
        self._hooks: list[RemovableHandle] = []
        self._ahead: int | None = None

    def start(
        self, monitor: ModalityMonitor, optimizer: torch.optim.Optimizer, listener: Listener, *, resumed: bool
    ) -> None:
        """Build the modulator and the scheduler, and restore their state from a checkpoint in the optimizer."""
        self._ahead = None
        self.modulator = self._prediction(monitor) if self._prediction else None
        self.scheduler = self._relearn(optimizer, monitor) if self._relearn else None
        for built in (self.modulator, self.scheduler):
            if built is not None:
                built.listeners.append(listener)
        self.follow(optimizer)
        if resumed or KEY in optimizer.param_groups[0]:
            self.load(optimizer)

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Save the state in the checkpoints of `optimizer` from now on."""
        self._let_go()
        if self.modulator is None and self.scheduler is None:
            return
        self._optimizer = optimizer
        self._hooks = [
            optimizer.register_state_dict_post_hook(self._save),
            optimizer.register_load_state_dict_pre_hook(self._check),
            optimizer.register_load_state_dict_post_hook(self.load),
        ]
        if self.scheduler is not None:
            self.scheduler.optimizer = optimizer

    def begin_epoch(self, epoch: int) -> None:
        """Set the epoch, and step the scheduler once for each epoch that has ended, also after a resume."""
        if self.modulator is not None:
            self.modulator.set_epoch(epoch)
        if self.scheduler is None:
            return
        if self._ahead is None:  # a second run of the same optimizer counts epochs from 0 again
            self._ahead = max(0, self.scheduler.last_epoch - epoch)
        while self.scheduler.last_epoch < epoch + self._ahead:
            self.scheduler.step()

    def remove(self) -> None:
        """Remove all hooks; the state stays in the optimizer's param groups for later checkpoints."""
        if self._hooks and self._optimizer is not None:
            self._optimizer.param_groups[0][KEY] = self._state()
        self._let_go()
        for built in (self.modulator, self.scheduler):
            if built is not None:
                built.remove()

    def load(self, optimizer: torch.optim.Optimizer) -> None:
        """Restore the state that a checkpoint put into the optimizer's param groups."""
        state = optimizer.param_groups[0].pop(KEY, {})
        self._check_state(state)
        for name, built in self._pairs():
            if name in state:
                built.load_state_dict(state[name])
            else:
                warn_user(f"the checkpoint holds no state of `{name}`: {type(built).__name__} starts anew.")

    def _check(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        """Check a checkpoint's state before the optimizer loads anything, so that no load stops halfway."""
        groups = state_dict.get("param_groups") if isinstance(state_dict, Mapping) else None
        if isinstance(groups, (list, tuple)) and groups and isinstance(groups[0], Mapping):
            self._check_state(groups[0].get(KEY, {}))

    def _check_state(self, state: Any) -> None:
        check_kind(f"the checkpoint's {KEY}", state, Mapping, "a mapping to states")
        for name, built in self._pairs():
            if name in state:
                built.check_state(state[name])

    def _save(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        state_dict["param_groups"][0][KEY] = self._state()

    def _state(self) -> dict[str, Any]:
        return {name: built.state_dict() for name, built in self._pairs()}

    def _pairs(self) -> Iterator[tuple[str, OPM | ReLearnScheduler]]:
        """Yield the modulator and the scheduler, where built, by the names of their arguments."""
        if self.modulator is not None:
            yield "prediction", self.modulator
        if self.scheduler is not None:
            yield "relearn", self.scheduler

    def _let_go(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._optimizer = None
