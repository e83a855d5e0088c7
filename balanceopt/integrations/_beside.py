"""OPM and re-learning beside a modulation, under a framework that builds the optimizer and writes the checkpoints."""

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

# An optimizer's groups are all that every framework's checkpoints carry.
KEY = "balanceopt_beside"


class Beside:
    """Build both when a run starts; let the optimizer's checkpoints carry their state.

    Args:
        prediction: makes the modulator from the monitor.
        relearn: makes the scheduler from the optimizer and the monitor.
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
        """Build what was asked for, from the state that a checkpoint put into the optimizer, if there is one."""
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
        """Let this optimizer's checkpoints carry the state."""
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
        """Re-learn after the epochs that are over, each once: also where a checkpoint was resumed in between."""
        if self.modulator is not None:
            self.modulator.set_epoch(epoch)
        if self.scheduler is None:
            return
        if self._ahead is None:  # a second run of the same optimizer counts its epochs from 0 again
            self._ahead = max(0, self.scheduler.last_epoch - epoch)
        while self.scheduler.last_epoch < epoch + self._ahead:
            self.scheduler.step()

    def remove(self) -> None:
        """Take everything off; the state stays in the optimizer's groups for a checkpoint written later."""
        if self._hooks and self._optimizer is not None:
            self._optimizer.param_groups[0][KEY] = self._state()
        self._let_go()
        for built in (self.modulator, self.scheduler):
            if built is not None:
                built.remove()

    def load(self, optimizer: torch.optim.Optimizer) -> None:
        """Take over what a checkpoint put into the groups."""
        state = optimizer.param_groups[0].pop(KEY, {})
        self._check_state(state)
        for name, built in self._pairs():
            if name in state:
                built.load_state_dict(state[name])
            else:
                warn_user(f"the checkpoint holds no state of `{name}`: {type(built).__name__} starts anew.")

    def _check(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        """Refuse a state that could be loaded in part only, before the optimizer has loaded its own."""
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
        """What was built, by the name of the argument that makes it."""
        if self.modulator is not None:
            yield "prediction", self.modulator
        if self.scheduler is not None:
            yield "relearn", self.scheduler

    def _let_go(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._optimizer = None
