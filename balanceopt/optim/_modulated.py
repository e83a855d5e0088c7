"""ModulatedOptimizer: wrapper of any optimizer that modulates gradients before each step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, overload

import torch

from balanceopt._method import Listener
from balanceopt._torch import OPTIMIZER_HOOKS
from balanceopt._undo import Before
from balanceopt.modulation import OGM, Modulation
from balanceopt.monitor import ModalityMonitor
from balanceopt.optim._engine import Engine
from balanceopt.optim._state import check_state


class ModulatedOptimizer(torch.optim.Optimizer):
    r"""Drop-in wrapper that balances modalities with any `torch.optim.Optimizer`.

    $$\theta \leftarrow \text{step}(\theta, \text{modulation}(g; \text{scores}))$$

    Before each step of the base optimizer the modulation changes the gradients of the encoders in place, by the
    scores of the passes that made these gradients. A step without scores is the base optimizer's.

    Args:
        optimizer: the base optimizer. Its groups may carry `"modality"` tags; parameters without a tag belong to the
            encoder that holds them.
        monitor: a `ModalityMonitor` on the model that the optimizer trains, with a head unless no modulation
            needs scores.
        modulation: the method, `OGM()` (that is OGM-GE) by default, or several to act in order.
        seed: seed of all randomness, a function of (seed, step, parameter); None for the seed of an earlier wrapper or
            a checkpoint in the groups, else `torch.initial_seed()` of the first rank, read now.
        strict: raise after ten steps in a row without any score; False to only warn.

    Raises:
        TypeError: if `optimizer`, `monitor` or `modulation` has another type.
        ValueError: if the optimizer is modulated already, or does not train the monitor's model; for a bad `seed`.
        KeyError: if groups are tagged with modalities that the monitor does not have.
        NotImplementedError: for differentiable, in-backward and FSDP1 optimizers.

    Example:
        >>> import balanceopt as bo
        >>> model = torch.nn.ModuleDict({m: torch.nn.Linear(2, 3) for m in ("a", "b", "head")})
        >>> encoders = {"a": model["a"], "b": model["b"]}
        >>> optimizer = torch.optim.SGD(bo.modality_groups(model, encoders), lr=0.1)
        >>> monitor = bo.ModalityMonitor(model, encoders, head=model["head"])
        >>> optimizer = bo.ModulatedOptimizer(optimizer, monitor, bo.OGM(noise=False))
        >>> isinstance(optimizer, torch.optim.Optimizer)
        True

    Reference:
        docs/concepts.md; the reference of the method.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        monitor: ModalityMonitor,
        modulation: Modulation | Sequence[Modulation] | None = None,
        *,
        seed: int | None = None,
        strict: bool = True,
    ) -> None:
        # Optimizer.__init__ is not called, because it would create a second set of groups and state.
        chosen = OGM() if modulation is None else modulation
        self._engine = Engine(optimizer, monitor, chosen, seed=seed, strict=strict)
        self.optimizer = optimizer
        _give_hooks(optimizer)
        _give_hooks(self)
        self._warned_capturable_if_run_uncaptured = True

    @property
    def monitor(self) -> ModalityMonitor:
        """The monitor that the scores come from."""
        return self._engine.monitor

    @property
    def modulation(self) -> Modulation | list[Modulation]:
        """The modulation, or the list of modulations in the order of their application."""
        chosen = self._engine.modulations
        return chosen[0] if len(chosen) == 1 else chosen

    @property
    def listeners(self) -> list[Listener]:
        """Functions called with each quantity of a step, such as those of a `Recorder`."""
        return self._engine.listeners

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Param groups of the base optimizer."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """State of the base optimizer."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """Defaults of the base optimizer."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Modulate the gradients, then step the base optimizer.

        Args:
            closure: function that evaluates the model and returns the loss; modulation follows each evaluation.

        Returns:
            The result of the base optimizer's step.

        Raises:
            TypeError: if `closure` is no function.
            RuntimeError: after `remove()`, or after ten steps in a row without any score.
        """
        # Only the wrapper's hooks run here: global hooks run in the base's step, so that each sees a step once.
        engine = self._engine
        args: tuple[Any, ...] = (self,) if closure is None else (self, closure)
        kwargs: dict[str, Any] = {}
        for before in self._optimizer_step_pre_hooks.values():
            changed = before(self, args, kwargs)
            args, kwargs = (args, kwargs) if changed is None else changed
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        try:
            wrapped = engine.begin(closure)
            result = self.optimizer.step() if wrapped is None else self.optimizer.step(wrapped)
        except BaseException:
            engine.cancel()
            raise
        engine.finish()
        for after in self._optimizer_step_post_hooks.values():
            after(self, args, kwargs)
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and discard the scores of the same passes."""
        self._engine.accumulator.discard()
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, tagged with `"modality"` or with parameters of the encoders, to the base optimizer.

        Raises:
            KeyError: for a tag that is no modality of the monitor; the group is not added.
        """
        before = Before(self.optimizer)
        groups = list(self.param_groups)
        try:
            self.optimizer.add_param_group(param_group)
            self._engine.refresh()
        except BaseException:
            before.restore()
            self.param_groups[:] = groups
            raise

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state, with balanceopt's counters and methods' states in its `param_groups`."""
        self._engine.before_save()
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        state = self.optimizer.state_dict()
        for changed in self._optimizer_state_dict_post_hooks.values():
            result = changed(self, state)
            state = state if result is None else result
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this wrapper or of the bare base optimizer. A load that fails changes nothing.

        Args:
            state_dict: result of `state_dict()` of the wrapper or the base optimizer.

        Raises:
            TypeError, KeyError, ValueError: if the state is invalid, or does not fit the base optimizer.
        """
        check_state(self.optimizer, state_dict)
        state_dict = dict(state_dict)  # a copy, as in torch: hooks may change the state
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = hook(self, state_dict)
            state_dict = state_dict if result is None else result
        check_state(self.optimizer, state_dict)
        before = Before(self.optimizer)
        try:
            self.optimizer.load_state_dict(state_dict)
            self._engine.after_load()
            for loaded in self._optimizer_load_state_dict_post_hooks.values():
                loaded(self)
        except BaseException:
            before.restore()
            raise

    def remove(self, *, keep_state: bool = False) -> torch.optim.Optimizer:
        """Stop balancing and return the base optimizer. May be called twice.

        Args:
            keep_state: leave the step counter, the seed and the epoch in `param_groups`, so that a checkpoint written
                later still resumes.
        """
        self._engine.remove(keep_state=keep_state)
        return self.optimizer

    def set_epoch(self, epoch: int) -> None:
        """Set the current epoch, counted from 0, for windows with `unit="epoch"`.

        Raises:
            ValueError: if `epoch` is no whole number of at least 0.
            RuntimeError: after `remove()`.
        """
        self._engine.set_epoch(epoch)

    def stats(self) -> dict[str, int]:
        """Return counts of modulated steps, of steps left to the base optimizer, and of irregularities, by name."""
        return self._engine.stats()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.modulation!r}, {self.optimizer!r})"

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} can't be copied or pickled: its monitor watches one model. Save its "
            "state_dict(), or copy the base optimizer (`.optimizer`). For a copied model build a monitor and a wrapper."
        )


def _give_hooks(optimizer: torch.optim.Optimizer) -> None:
    """Create the hook dictionaries of Optimizer.__init__ on optimizers that never called it."""
    for name in OPTIMIZER_HOOKS:
        optimizer.__dict__.setdefault(name, OrderedDict())
