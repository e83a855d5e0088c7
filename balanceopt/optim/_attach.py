"""attach: modulate an optimizer by hooks on its step, for frameworks that build the optimizer themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from balanceopt._method import Listener
from balanceopt._removable import Removable
from balanceopt._torch import OPTIMIZER_HOOKS
from balanceopt._undo import Before
from balanceopt.modulation import OGM, Modulation
from balanceopt.monitor import ModalityMonitor
from balanceopt.optim._engine import Engine
from balanceopt.optim._state import check_state


class AttachedModulation(Removable):
    """Handle of the hooks that `attach` registered. The optimizer holds the handle: a reference to it is optional.

    Attributes:
        optimizer: the optimizer whose steps are modulated.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, engine: Engine) -> None:
        """Register the hooks of `engine` on `optimizer`."""
        self.optimizer = optimizer
        self._engine = engine
        self._depth = 0
        self._wrapped: Callable[[], Any] | None = None
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
            optimizer.register_state_dict_pre_hook(self._before_save),
            optimizer.register_load_state_dict_pre_hook(self._before_load),
            optimizer.register_load_state_dict_post_hook(self._after_load),
        ]
        self._before_loading: Before | None = None
        self._zero_grad = optimizer.zero_grad
        # zero_grad is replaced because torch has no hook for it, and scores of cleared gradients must be discarded.
        self._replaced = {name: value for name, value in vars(optimizer).items() if name == "zero_grad"}
        vars(optimizer)["zero_grad"] = self._discarding_zero_grad

    def remove(self, *, keep_state: bool = False) -> torch.optim.Optimizer:
        """Remove all hooks from the optimizer and return the optimizer. May be called twice.

        Args:
            keep_state: leave the step counter, the seed and the epoch in the `param_groups`, so that a checkpoint
                written later still resumes.
        """
        for handle in self._handles:
            handle.remove()
        attributes = vars(self.optimizer)
        if attributes.get("zero_grad") == self._discarding_zero_grad:  # not one that replaced it later
            del attributes["zero_grad"]
            attributes.update(self._replaced)
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

    @property
    def listeners(self) -> list[Listener]:
        """Functions called with each quantity of a step, such as those of a `Recorder`."""
        return self._engine.listeners

    def _before(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # Torch passes the arguments of step, the optimizer first.
        closure: Callable[[], Any] | None = args[1] if len(args) > 1 else kwargs.get("closure")
        if self._is_within_a_step(closure):
            self._depth += 1
            return None
        self._depth = 1
        self._wrapped = wrapped = self._engine.begin(closure)
        if wrapped is None:
            return None
        return (
            tuple(wrapped if value is closure else value for value in args),
            {key: wrapped if value is closure else value for key, value in kwargs.items()},
        )

    def _after(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth -= 1
        if self._depth <= 0:
            self._depth, self._wrapped = 0, None
            self._engine.finish()

    def _before_save(self, optimizer: torch.optim.Optimizer) -> None:
        self._engine.before_save()

    def _before_load(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        check_state(optimizer, state_dict)
        self._before_loading = Before(optimizer)

    def _after_load(self, optimizer: torch.optim.Optimizer) -> None:
        before, self._before_loading = self._before_loading, None
        try:
            self._engine.after_load()
        except BaseException:
            if before is not None:
                before.restore()
            raise

    def _is_within_a_step(self, closure: Callable[[], Any] | None) -> bool:
        """Whether this call is a parent class's step within a subclass's step: torch calls the hooks of both."""
        if closure is not None:
            return closure is self._wrapped
        # Torch calls no hook after an exception; new scores then show that this is another step.
        return self._depth > 0 and self._engine.accumulator.is_empty

    def _discarding_zero_grad(self, set_to_none: bool = True) -> None:
        if not self._engine.removed:
            self._engine.accumulator.discard()
            if self._wrapped is None:  # otherwise a step's closure may be the caller
                self._depth = 0
        self._zero_grad(set_to_none=set_to_none)


def attach(
    optimizer: torch.optim.Optimizer,
    monitor: ModalityMonitor,
    modulation: Modulation | Sequence[Modulation] | None = None,
    *,
    seed: int | None = None,
    strict: bool = True,
) -> AttachedModulation:
    """Modulate the steps of an optimizer by hooks on it, for frameworks that build or wrap the optimizer themselves.

    Equal to `ModulatedOptimizer`, except that under a GradScaler with a fused base the hooks see scaled gradients and
    overflow steps. Copies and pickles of the optimizer carry no hooks.

    Args:
        optimizer: the base optimizer; for Accelerate's wrapper, its `.optimizer`.
        monitor: a `ModalityMonitor` on the model that the optimizer trains, with a head unless no modulation
            needs scores.
        modulation: the method, `OGM()` (that is OGM-GE) by default, or several to act in order.
        seed: seed of all randomness; None for the seed of a checkpoint in the groups, else `torch.initial_seed()` of
            the first rank, read now.
        strict: raise after ten steps in a row without any score; False to only warn.

    Returns:
        A handle with `.remove()`, `.set_epoch()` and `.stats()`; also a context manager.

    Raises:
        TypeError: if the optimizer has no step hooks (it never called `Optimizer.__init__`), or an argument has
            another type.
        ValueError, KeyError, NotImplementedError: as `ModulatedOptimizer`.

    Example:
        >>> import balanceopt as bo
        >>> model = torch.nn.ModuleDict({m: torch.nn.Linear(2, 3) for m in ("a", "b", "head")})
        >>> monitor = bo.ModalityMonitor(model, {"a": "a", "b": "b"}, head="head")
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with bo.attach(optimizer, monitor, bo.OGM(noise=False)) as handle:
        ...     handle.stats()["modulated"]
        0

    Reference:
        docs/integrations.md.
    """
    if isinstance(optimizer, torch.optim.Optimizer) and not hasattr(optimizer, OPTIMIZER_HOOKS[0]):
        raise TypeError(
            f"{type(optimizer).__name__} has no step hooks. Use ModulatedOptimizer, or attach to the optimizer "
            "inside it (`.optimizer`)."
        )
    chosen = OGM() if modulation is None else modulation
    engine = Engine(optimizer, monitor, chosen, seed=seed, strict=strict)
    return AttachedModulation(optimizer, engine)
