"""An optimizer around an optimizer: everything a user or a framework asks of one goes through to the base."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, overload

import torch

from balanceopt.modulation import Modulation
from balanceopt.monitor import ModalityMonitor
from balanceopt.optim._checks import note_wrapper
from balanceopt.optim._copies import left_out_of_copies
from balanceopt.optim._engine import Engine, Listener

_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
# Under this name a copy carries what the base's own copy lacks.
_BESIDE = "_balanceopt_beside"


class WrappedOptimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` that modulates gradients and lets a base optimizer step.

    `param_groups`, `state` and `defaults` are the base's, read and written through, so that schedulers, checkpoints
    and frameworks work on either.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        monitor: ModalityMonitor,
        modulation: Modulation | Sequence[Modulation],
        *,
        seed: int | None = None,
        strict: bool = True,
    ) -> None:
        # Optimizer.__init__ is not called: it would make groups and state of its own beside the base's.
        if isinstance(optimizer, torch.optim.Optimizer):
            _give_hooks(optimizer)
        self.optimizer = optimizer
        self._balanceopt_engine = Engine(optimizer, monitor, modulation, seed=seed, strict=strict)
        self._prepare()

    @property
    def monitor(self) -> ModalityMonitor:
        """Where the scores come from."""
        return self._balanceopt_engine.monitor

    @property
    def modulation(self) -> Modulation | list[Modulation]:
        """The method, or the methods in the order in which they act."""
        chosen = self._balanceopt_engine.modulations
        return chosen[0] if len(chosen) == 1 else chosen

    @property
    def listeners(self) -> list[Listener]:
        """Who is told the quantities of each step (a `Recorder`)."""
        return self._balanceopt_engine.listeners

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The base's."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The base's."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Modulate the gradients, then let the base optimizer step.

        Args:
            closure: reevaluates the model and returns the loss; its gradients are modulated each time.

        Returns:
            What the base's step returns.
        """
        engine = self._balanceopt_engine
        try:
            if closure is None:
                engine.before()
                result = self.optimizer.step()
            else:
                result = self.optimizer.step(engine.wrap(closure))
        except BaseException:
            engine.abandon()
            raise
        engine.after()
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and the scores that belong to them."""
        self._balanceopt_engine.discard()
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base; tag it with `"modality"`, or its modality is known by its parameters."""
        self.optimizer.add_param_group(param_group)
        self._balanceopt_engine.refresh()

    def state_dict(self) -> dict[str, Any]:
        """The base's state; what balanceopt keeps is in its `param_groups`."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        state = self.optimizer.state_dict()
        for changed in self._optimizer_state_dict_post_hooks.values():
            result = changed(self, state)
            state = state if result is None else result
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this wrapper or of the bare base optimizer.

        Args:
            state_dict: from `state_dict()` of either.
        """
        state_dict = state_dict.copy()  # as torch does: hooks may change it
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = hook(self, state_dict)
            state_dict = state_dict if result is None else result
        self.optimizer.load_state_dict(state_dict)
        self._balanceopt_engine.after_load()
        for loaded in self._optimizer_load_state_dict_post_hooks.values():
            loaded(self)

    def set_epoch(self, epoch: int) -> None:
        """Tell which epoch it is, counted from 0, for windows with `unit="epoch"`."""
        self._balanceopt_engine.set_epoch(epoch)

    def stats(self) -> dict[str, int]:
        """Steps modulated, left to the base optimizer, and oddities met on the way."""
        return self._balanceopt_engine.stats()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.modulation!r}, {self.optimizer!r})"

    def __getstate__(self) -> dict[str, Any]:
        # A scheduler's patched `step` is bound to this very object: a copy with it would step the original.
        own = {key: value for key, value in self.__dict__.items() if key not in ("step", "_opt_called")}
        return {**own, _BESIDE: left_out_of_copies(self.optimizer)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for name, value in self.__dict__.pop(_BESIDE).items():
            self.optimizer.__dict__.setdefault(name, value)
        self._prepare()

    def _prepare(self) -> None:
        note_wrapper(self.optimizer, self)
        _give_hooks(self)
        self._warned_capturable_if_run_uncaptured = True
        self._patch_step_function()


def _give_hooks(optimizer: torch.optim.Optimizer) -> None:
    """What Optimizer.__init__ makes, for optimizers that never called it."""
    for name in _HOOKS:
        optimizer.__dict__.setdefault(name, OrderedDict())
