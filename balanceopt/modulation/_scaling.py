"""GradientScaling: base of methods with one coefficient for the gradients, or the update, of each modality."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor

from balanceopt._deferred import on_host
from balanceopt._method import Unit
from balanceopt._options import check_choice, check_count
from balanceopt._warnings import warn_user
from balanceopt.modulation._base import Modulation, OptimizerHintWarning, Slot, StepContext
from balanceopt.modulation._bases import cancels_constant_factor
from balanceopt.modulation._gradients import scale_grads_

ApplyTo = Literal["grad", "update"]


class GradientScaling(Modulation):
    r"""Base of gradient methods with one coefficient \(k^m\) for the encoder of each modality.

    $$g^m \leftarrow k^m g^m \quad \text{or} \quad \theta^m \leftarrow \theta^m_{\text{before}} + k^m (\theta^m -
    \theta^m_{\text{before}})$$

    A subclass defines `coefficients`. For unusable scores and non-finite coefficients the factor is 1; non-finite
    gradients stay unchanged.

    Args:
        apply_to: `"grad"` scales gradients, a factor that Adam and similar cancel; `"update"` scales the update of any
            base optimizer.
        min_ndim: least number of dimensions of tensors that are scaled.
        start: first step or epoch of the window, counted from 0.
        end: last step or epoch of the window, inclusive; None for no end.
        unit: unit of the window: `"step"`, or `"epoch"`, set by `set_epoch`.

    Raises:
        ValueError: for an option outside its range.

    Example:
        >>> class Halved(GradientScaling):
        ...     def coefficients(self, step):
        ...         return torch.full_like(step.scores.mean_score, 0.5)
        >>> Halved(apply_to="update")
        Halved(apply_to='update', min_ndim=0, start=0, end=None, unit='step')

    Reference:
        docs/adding.md.
    """

    def __init__(
        self,
        *,
        apply_to: ApplyTo = "grad",
        min_ndim: int = 0,
        start: int = 0,
        end: int | None = None,
        unit: Unit = "step",
    ) -> None:
        super().__init__(start=start, end=end, unit=unit)
        check_choice("apply_to", apply_to, ("grad", "update"))
        check_count("min_ndim", min_ndim)
        self.apply_to: ApplyTo = apply_to
        self.min_ndim = min_ndim

    @abstractmethod
    def coefficients(self, step: StepContext) -> Tensor:
        """Return the `(M,)` coefficients of this step; 1 leaves a modality unchanged."""

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Warn where the base optimizer cancels the coefficients."""
        if self.apply_to == "grad" and cancels_constant_factor(optimizer):
            name = type(self).__name__
            warn_user(
                f"{type(optimizer).__name__} divides a constant gradient factor out again, so {name}'s coefficient "
                f"does little. {name}(apply_to='update') scales what it does in the step instead.",
                OptimizerHintWarning,
            )

    @torch.no_grad()
    def modulate(self, step: StepContext) -> None:
        """Scale the gradients, or the update, of each modality by the step's coefficients."""
        self.scale(step, self.usable_coefficients(step))

    def usable_coefficients(self, step: StepContext) -> Tensor:
        """Return the step's `(M,)` coefficients, 1 where scores are unusable or the coefficient is non-finite."""
        scores = step.scores
        step.report("score", scores.mean_score)
        k = self.coefficients(step)
        if k.shape != scores.score.shape:
            raise ValueError(
                f"{type(self).__name__}.coefficients should return one factor for each of {step.modalities}. "
                f"Found shape {tuple(k.shape)}."
            )
        k = torch.where(scores.usable & torch.isfinite(k), k, 1)
        step.report("coefficient", k)
        return k

    def scaled_slots(self, step: StepContext, name: str) -> list[Slot]:
        """Return the slots of modality `name` whose parameters have at least `min_ndim` dimensions."""
        return [slot for slot in step.slots.get(name, ()) if slot.parameter.dim() >= self.min_ndim]

    def scale(self, step: StepContext, k: Tensor) -> None:
        """Scale the gradients, or the update, of each modality's parameters by the coefficients `k` `(M,)`."""
        host_value = on_host(k)
        for index, name in enumerate(step.modalities):
            slots = self.scaled_slots(step, name)
            if not slots or (host_value is not None and host_value[index] == 1):
                continue
            if self.apply_to == "update":
                step.scale_update([slot.parameter for slot in slots], k[index])
            else:
                step.count("nonfinite_gradients", scale_grads_(slots, k[index]))
