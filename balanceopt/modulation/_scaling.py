"""GradientScaling: methods that are one factor for each modality, on its gradients or on its update."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor

from balanceopt._deferred import on_host
from balanceopt._method import Unit
from balanceopt._options import check_choice, check_count
from balanceopt._warnings import warn_user
from balanceopt.modulation._base import Modulation, OptimizerHintWarning, StepContext
from balanceopt.modulation._bases import cancels_constant_factor
from balanceopt.modulation._gradients import scale_grads_

ApplyTo = Literal["grad", "update"]


class GradientScaling(Modulation):
    r"""A gradient method that is its coefficients: one factor \(k^m\) for the encoder of each modality.

    $$g^m \leftarrow k^m g^m \quad \text{or} \quad \theta^m \leftarrow \theta^m_{\text{before}} + k^m (\theta^m -
    \theta^m_{\text{before}})$$

    A subclass defines `coefficients`. In a step whose scores can't be used, and for coefficients that are not finite,
    the factor is 1; gradients that are not finite are left as they are.

    Args:
        apply_to: `"grad"` scales gradients. Adam and its kin divide a constant factor out again; `"update"` scales what
            the base did in the step instead, on any base.
        min_ndim: only tensors with at least this many dimensions.
        start: first step or epoch in which the method acts, counted from 0.
        end: last one, inclusive; None for no end.
        unit: `"step"`, or `"epoch"` to count the epochs that `set_epoch` is told.

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
        """Return the `(M,)` factors of this step; 1 leaves a modality alone."""

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Warn where scaling gradients does nothing to the base."""
        if self.apply_to == "grad" and cancels_constant_factor(optimizer):
            name = type(self).__name__
            warn_user(
                f"{type(optimizer).__name__} divides a constant gradient factor out again, so {name}'s coefficient "
                f"does little. {name}(apply_to='update') scales what it does in the step instead.",
                OptimizerHintWarning,
            )

    @torch.no_grad()
    def modulate(self, step: StepContext) -> None:
        """Scale each modality by its coefficient."""
        self.scale(step, self.usable_coefficients(step))

    def usable_coefficients(self, step: StepContext) -> Tensor:
        """Return the step's `(M,)` coefficients, 1 where there is nothing to compare."""
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

    def scale(self, step: StepContext, k: Tensor) -> None:
        """Scale the gradients, or the update, of each modality's parameters by its factor in `k` `(M,)`."""
        host_value = on_host(k)
        for index, name in enumerate(step.modalities):
            slots = [slot for slot in step.slots.get(name, ()) if slot.parameter.dim() >= self.min_ndim]
            if not slots or (host_value is not None and host_value[index] == 1):
                continue
            if self.apply_to == "update":
                step.scale_update([slot.parameter for slot in slots], k[index])
            else:
                step.count("nonfinite_gradients", scale_grads_(slots, k[index]))
