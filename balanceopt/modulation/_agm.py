"""AGM: slow down a modality whose lead is above its running mean, speed up one whose lead is below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from balanceopt._method import Unit
from balanceopt._options import check_entries, check_flag, check_number, check_tensor
from balanceopt._sharding import local_box
from balanceopt.functional import adaptive_coefficient
from balanceopt.modality import unwrap
from balanceopt.modulation._base import Slot, StepContext
from balanceopt.modulation._scaling import ApplyTo, GradientScaling, all_finite


class AGM(GradientScaling):
    r"""Adaptive gradient modulation: coefficients from each modality's lead relative to the running mean of the lead.

    $$g^m \leftarrow k^m g^m, \qquad k^m = \exp(\alpha \min(r^m(\text{running}) - r^m(\text{CE}), \text{cap}))$$

    with the uni-modal cross-entropies CE of the step, their means over all steps so far, and r of
    `functional.adaptive_coefficient`. The published code scales in backward the gradient of each modality's part of the
    joint logits, a Shapley value; for a linear head over concatenated features that equals scaling the gradients of the
    encoders and of the head's columns. With other heads only encoders are scaled.

    Args:
        alpha: strength, >= 0 (the authors advise 1.5 for CREMA-D, 2.5 for AV-MNIST).
        cap: upper limit of the difference of the two r, >= 0.
        apply_to: `"grad"` to scale gradients, or `"update"` to scale the base optimizer's update (Adam and similar).
        head: scale the columns of a linear head too, and its bias by the mean factor.
        min_ndim: least number of dimensions of the encoders' tensors that are scaled.
        start: first step or epoch of the window, counted from 0.
        end: last step or epoch of the window, inclusive; None for no end.
        unit: unit of the window: `"step"`, or `"epoch"`, set by `set_epoch`.

    Raises:
        ValueError: for an option outside its range.

    Example:
        >>> AGM(alpha=1.5)
        AGM(alpha=1.5, cap=10.0, apply_to='grad', head=True, min_ndim=0, start=0, end=None, unit='step')

    Reference:
        Li et al., Boosting Multi-modal Model Performance with Adaptive Gradient Modulation, ICCV 2023;
        docs/methods/agm.md.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        *,
        cap: float = 10.0,
        apply_to: ApplyTo = "grad",
        head: bool = True,
        min_ndim: int = 0,
        start: int = 0,
        end: int | None = None,
        unit: Unit = "step",
    ) -> None:
        super().__init__(apply_to=apply_to, min_ndim=min_ndim, start=start, end=end, unit=unit)
        check_number("alpha", alpha, at_least=0)
        check_number("cap", cap, at_least=0)
        check_flag("head", head)
        self.alpha = alpha
        self.cap = cap
        self.head = head
        # Sums of the steps' cross-entropies, and numbers of these steps, by modality.
        self._total = torch.zeros(0, dtype=torch.float32, device="cpu")
        self._steps = torch.zeros(0, dtype=torch.float32, device="cpu")

    def coefficients(self, step: StepContext) -> Tensor:
        """Update the running means by the step's cross-entropies and return the `(M,)` coefficients."""
        cross_entropy, usable = step.scores.mean_cross_entropy, step.scores.usable
        counted = usable & torch.isfinite(cross_entropy)
        if len(self._total) == 0:
            self._total, self._steps = torch.zeros_like(cross_entropy), torch.zeros_like(cross_entropy)
        self._total = self._total.to(cross_entropy.device) + torch.where(counted, cross_entropy, 0)
        self._steps = self._steps.to(cross_entropy.device) + counted
        running = torch.where(counted, self._total / self._steps.clamp(min=1), cross_entropy)
        step.report("cross_entropy", cross_entropy)
        return adaptive_coefficient(cross_entropy, running, self.alpha, self.cap, usable)

    def scale(self, step: StepContext, slots: Mapping[str, Sequence[Slot]], k: Tensor) -> None:
        """Scale each modality's `slots`, and the modality's columns of the head, by the coefficients `k` `(M,)`."""
        head, columns = self._linear_head(step)
        super().scale(step, slots, k)
        if head is None:
            return
        by_column = torch.ones(head.in_features, dtype=k.dtype, device=k.device)
        for index, name in enumerate(step.modalities):
            by_column[columns[name]] = k[index]
        for parameter, factor in ((head.weight, by_column), (head.bias, k.mean())):
            if not isinstance(parameter, nn.Parameter) or parameter.grad is None:
                continue  # a parametrized head computes its weight from other parameters
            if id(parameter) in step.held:
                self._scale_one(step, parameter, factor)

    def _scale_one(self, step: StepContext, parameter: nn.Parameter, factor: Tensor) -> None:
        """Scale this rank's shard of a parameter by a factor that is 0-d or has an entry for each column."""
        grad = parameter.grad
        assert grad is not None
        part, offset = local_box(grad)
        if part is None:
            raise NotImplementedError(
                "AGM does not scale the columns of a head whose shards are no slices of it. Use AGM(head=False), which "
                "scales the encoders alone."
            )
        if factor.dim():
            factor = factor[offset[1] : offset[1] + part.shape[1]]
        if self.apply_to == "update":
            step.scale_update([parameter], factor)
            return
        finite = all_finite([grad])
        part.mul_(torch.where(finite, factor, 1).to(part.device))
        step.count("nonfinite_gradients", (~finite).sum())

    def _linear_head(self, step: StepContext) -> tuple[nn.Linear | None, dict[str, slice]]:
        """Return a linear head and each modality's columns of the head; None where any modality has no columns."""
        monitor = step.monitor
        if not self.head or monitor is None or monitor.unimodal is None:
            return None, {}
        head = unwrap(monitor.head) if isinstance(monitor.head, nn.Module) else None
        columns = monitor.unimodal.columns
        if isinstance(head, nn.Linear) and columns.keys() == set(step.modalities):
            return head, columns
        return None, {}

    def state_dict(self) -> dict[str, Any]:
        """Return the running sums and their numbers of steps."""
        return {"total": self._total.clone(), "steps": self._steps.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the running sums of a checkpoint. A load that fails changes nothing.

        Raises:
            TypeError, KeyError, ValueError: if `state` is no state of an AGM.
        """
        check_entries("the state of an AGM", state, ("total", "steps"))
        for name in ("total", "steps"):
            check_tensor(name, state[name], "(M,)", dims=(1,))
        if state["total"].shape != state["steps"].shape:
            raise ValueError(
                "the state's `total` and `steps` should have one entry for each modality. Found "
                f"{len(state['total'])} and {len(state['steps'])}."
            )
        self._total, self._steps = (state[name].detach().clone() for name in ("total", "steps"))
