"""What a method is to the optimizer wrapper: something that changes gradients before a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from balanceopt._window import Unit, Window
from balanceopt.monitor import ModalityMonitor, ModalitySums

Report = Callable[[str, Tensor], None]
ScaleUpdate = Callable[[Sequence[nn.Parameter], Tensor], None]


class OptimizerHintWarning(UserWarning):
    """Nothing is wrong, but another setting would do more."""


@dataclass(frozen=True)
class Slot:
    """One parameter with a gradient.

    Attributes:
        index: its place in the optimizer's `param_groups`, counted through.
        parameter: the parameter; `.grad` is set.
    """

    index: int
    parameter: nn.Parameter

    @property
    def grad(self) -> Tensor:
        """Its gradient."""
        assert self.parameter.grad is not None
        return self.parameter.grad


@dataclass(frozen=True)
class Step:
    """What a modulation may use in one optimizer step.

    Attributes:
        sums: over the samples that the gradients come from, all ranks.
        modalities: names, in the order of the sums.
        slots: each modality's parameters that have a gradient; none for a modality the optimizer does not hold.
        optimizer: the base optimizer.
        seed: of all randomness, the same on every rank.
        number: how many steps came before.
        report: takes what a `Recorder` may want, `(M,)` by name.
        count: takes how often something odd happened, a 0-d tensor by name.
        scale_update: scales how far this step moves some parameters, by a 0-d factor.
        monitor: who watches the model; None where a modulation is called without one.
    """

    sums: ModalitySums
    modalities: tuple[str, ...]
    slots: Mapping[str, Sequence[Slot]]
    optimizer: torch.optim.Optimizer
    seed: int
    number: int
    report: Report = field(default=lambda name, values: None)
    count: Report = field(default=lambda name, values: None)
    scale_update: ScaleUpdate = field(default=lambda params, factor: None)
    monitor: ModalityMonitor | None = None


class Modulation(ABC):
    """A method: from the sums of a step to a change of the modalities' gradients.

    Args:
        start: first step or epoch in which it acts, counted from 0.
        end: last one, inclusive; None for no end.
        unit: `"step"`, or `"epoch"` to count the epochs that `set_epoch` is told.
    """

    needs_entropy: ClassVar[bool] = False

    def __init__(self, *, start: int = 0, end: int | None = None, unit: Unit = "step") -> None:
        """Check the window."""
        self.window = Window(start, end, unit)
        self.start = start
        self.end = end
        self.unit: Unit = unit

    @abstractmethod
    def modulate(self, step: Step) -> None:
        """Change gradients in place, or ask for the step's update to be scaled."""

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Warn or raise where the base optimizer does not go with the method."""

    def options(self) -> dict[str, Any]:
        """What `repr` shows: the constructor's arguments, which have attributes of their names."""
        return {name: getattr(self, name) for name in signature(type(self)).parameters}

    def __repr__(self) -> str:
        shown = ", ".join(f"{key}={value!r}" for key, value in self.options().items())
        return f"{type(self).__name__}({shown})"
