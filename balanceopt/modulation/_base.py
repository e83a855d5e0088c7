"""Modulation: the interface of gradient methods, which change gradients or the update of a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar
from weakref import ref

import torch
from torch import Tensor, nn

from balanceopt._method import Method
from balanceopt.monitor import ModalityMonitor, Scores

Tell = Callable[[str, Tensor], None]
ScaleUpdate = Callable[[Sequence[nn.Parameter], Tensor], None]
Hide = Callable[[Sequence[nn.Parameter]], None]


class OptimizerHintWarning(UserWarning):
    """Warning that a valid setting has little effect with the base optimizer."""


@dataclass(frozen=True)
class Slot:
    """Parameter with a gradient, and its index.

    Attributes:
        index: index of the parameter among all parameters of the optimizer, in the order of `param_groups`.
        parameter: the parameter; `.grad` is set.
    """

    index: int
    parameter: nn.Parameter

    @property
    def grad(self) -> Tensor:
        """Gradient of the parameter."""
        assert self.parameter.grad is not None
        return self.parameter.grad


@dataclass(frozen=True)
class StepContext:
    """Inputs and callbacks of a modulation in one optimizer step.

    Attributes:
        scores: scores of the samples of all ranks that the gradients come from; of no samples in a step without scores.
        modalities: names of the modalities, in the order of the scores.
        slots: parameters with a gradient, by modality; empty where the optimizer holds none of the encoder's.
        optimizer: the base optimizer.
        seed: seed of all randomness, the same on every rank.
        number: number of earlier steps.
        report: function that passes a quantity `(M,)`, by name, to the recorders.
        count: function that adds a 0-d count of an irregularity, by name, to `stats()`.
        scale_update: function that scales this step's update of parameters by a factor, 0-d or broadcastable.
        hide: function that hides parameters from the base optimizer in this step, after all methods have acted.
        monitor: monitor of the model; None where a modulation is called without a monitor.
        held: index of each parameter of the optimizer, by id.
    """

    scores: Scores
    modalities: tuple[str, ...]
    slots: Mapping[str, Sequence[Slot]]
    optimizer: torch.optim.Optimizer
    seed: int
    number: int
    report: Tell = field(default=lambda name, values: None)
    count: Tell = field(default=lambda name, count: None)
    scale_update: ScaleUpdate = field(default=lambda params, factor: None)
    hide: Hide = field(default=lambda params: None)
    monitor: ModalityMonitor | None = None
    held: Mapping[int, int] = field(default_factory=dict)

    def params(self, name: str) -> list[nn.Parameter]:
        """Return the optimizer's parameters with a gradient of the modality `name`."""
        return [slot.parameter for slot in self.slots.get(name, ())]


class Modulation(Method, ABC):
    """Base of methods that change the modalities' gradients before a step, or scale the step's update.

    A subclass defines `modulate`; a method with one coefficient for each modality is a `GradientScaling`. A method with
    a state acts in one optimizer at a time.

    Args:
        start: first step or epoch of the window, counted from 0.
        end: last step or epoch of the window, inclusive; None for no end.
        unit: unit of the window: `"step"`, or `"epoch"`, set by `set_epoch`.

    Attributes:
        needs_scores: whether a step without scores is left to the base optimizer. A method without need acts in every
            step of its window, also with a single modality and with a monitor without a head.
        needs_entropy: whether `step.scores.feature_entropy` is needed.
        engine: weak reference to the engine of the modulated optimizer; None outside of an optimizer.

    Raises:
        ValueError: for an invalid window.

    Reference:
        docs/adding.md.
    """

    needs_scores: ClassVar[bool] = True
    needs_entropy: ClassVar[bool] = False
    engine: ref[Any] | None = None

    @abstractmethod
    def modulate(self, step: StepContext) -> None:
        """Change gradients in place, or scale the update by `step.scale_update`."""

    def check(self, optimizer: torch.optim.Optimizer, monitor: ModalityMonitor) -> None:
        """Warn or raise where the base optimizer or the monitor is incompatible with the method."""

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "engine": None}
