"""What a gradient method is to the optimizer wrapper: something that changes gradients, or an update, in a step."""

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
class StepContext:
    """What a modulation may use in one optimizer step.

    Attributes:
        scores: sums over the samples that the gradients come from, of all ranks.
        modalities: names, in the order of the scores.
        slots: each modality's parameters that have a gradient; none for a modality the optimizer does not hold.
        optimizer: the base optimizer.
        seed: of all randomness, the same on every rank.
        number: how many steps came before.
        report: takes what a `Recorder` may want, `(M,)` by name.
        count: takes how often something odd happened, a 0-d tensor by name; `stats()` shows every name.
        scale_update: scales how far this step moves some parameters, by a factor that is 0-d or broadcasts with them.
        monitor: the monitor of the model; None where a modulation is called without one.
        held: the optimizer's parameters, index by id.
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
    monitor: ModalityMonitor | None = None
    held: Mapping[int, int] = field(default_factory=dict)

    def index_of(self, parameter: nn.Parameter) -> int | None:
        """Return a parameter's place in the optimizer's `param_groups`, counted through; None if it is not in them."""
        return self.held.get(id(parameter))

    def params(self, name: str) -> list[nn.Parameter]:
        """Return the parameters of a modality that this optimizer holds and that have a gradient."""
        return [slot.parameter for slot in self.slots.get(name, ())]


class Modulation(Method, ABC):
    """A method that changes the modalities' gradients before a step, or scales what the step does.

    A subclass defines `modulate`; a method that is one factor for each modality is a `GradientScaling`. A method with a
    state acts in one optimizer at a time.

    Args:
        start: first step or epoch in which the method acts, counted from 0.
        end: last one, inclusive; None for no end.
        unit: `"step"`, or `"epoch"` to count the epochs that `set_epoch` is told.

    Attributes:
        needs_entropy: whether `step.scores.feature_entropy` is needed.
        engine: what the method acts in, held weakly; None while it is in no optimizer.

    Raises:
        ValueError: for a window that is none.

    Reference:
        docs/adding.md.
    """

    needs_entropy: ClassVar[bool] = False
    engine: ref[Any] | None = None

    @abstractmethod
    def modulate(self, step: StepContext) -> None:
        """Change gradients in place, or ask for the step's update to be scaled."""

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Warn or raise where the base optimizer does not go with the method."""

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "engine": None}
