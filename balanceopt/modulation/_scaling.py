"""GradientScaling: one coefficient for the gradients, or the update, of each modality; and how both are scaled."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from balanceopt._deferred import on_host
from balanceopt._method import Unit
from balanceopt._options import check_choice, check_count
from balanceopt._sharding import local_part, summed_over_shards
from balanceopt._torch import foreach_add_, foreach_lerp_, foreach_mul_, foreach_sub, uncompiled
from balanceopt._warnings import warn_user
from balanceopt.modulation._base import Modulation, OptimizerHintWarning, Slot, StepContext
from balanceopt.modulation._cancelling import cancels_constant_factor
from balanceopt.monitor import ModalityMonitor

ApplyTo = Literal["grad", "update"]
Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]


class GradientScaling(Modulation):
    r"""Base of gradient methods with one coefficient \(k^m\) for the encoder of each modality.

    $$g^m \leftarrow k^m g^m \quad \text{or} \quad \theta^m \leftarrow \theta^m_{\text{before}} + k^m (\theta^m -
    \theta^m_{\text{before}})$$

    A subclass defines `coefficients`. The factor is 1 for non-finite coefficients, and for unusable scores if it
    needs scores; non-finite gradients stay unchanged.

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

    def check(self, optimizer: torch.optim.Optimizer, monitor: ModalityMonitor) -> None:
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
        """Scale by the step's coefficients, 1 where scores are unusable or the coefficient is non-finite."""
        scores = step.scores
        if self.needs_scores:
            step.report("score", scores.mean_score)
        k = self.coefficients(step)
        if k.shape != scores.score.shape:
            raise ValueError(
                f"{type(self).__name__}.coefficients should return one factor for each of {step.modalities}. "
                f"Found shape {tuple(k.shape)}."
            )
        scaled = torch.isfinite(k)
        k = torch.where(scaled & scores.usable if self.needs_scores else scaled, k, 1)
        step.report("coefficient", k)
        slots = {
            name: [slot for slot in step.slots.get(name, ()) if slot.parameter.dim() >= self.min_ndim]
            for name in step.modalities
        }
        self.scale(step, slots, k)

    def scale(self, step: StepContext, slots: Mapping[str, Sequence[Slot]], k: Tensor) -> None:
        """Scale the gradients, or the update, of each modality's `slots` by the coefficients `k` `(M,)`."""
        host_value = on_host(k)
        for index, scaled in enumerate(slots.values()):
            if not scaled or (host_value is not None and host_value[index] == 1):
                continue
            if self.apply_to == "update":
                step.scale_update([slot.parameter for slot in scaled], k[index])
            else:
                step.count("nonfinite_gradients", scale_grads_(scaled, k[index]))


# -- gradients, in place ----------------------------------------------------------------------------------------------


@torch.no_grad()
def scale_grads_(slots: Sequence[Slot], coefficient: Tensor) -> Tensor:
    """Multiply finite gradients by a 0-d `coefficient` in place; return the number of non-finite ones, 0-d."""
    left = torch.zeros_like(coefficient, dtype=torch.int64)
    for device, there in by_device(slots).items():
        grads = [slot.grad for slot in there]
        finite, k = all_finite(grads), coefficient.to(device)
        left += (~finite).sum().to(left.device)
        parts = [local_part(grad) for grad in grads]  # an operation on a DTensor takes many times as long
        host_value = on_host(finite)
        if host_value is None:
            for part, factor in zip(parts, torch.where(finite, k, 1), strict=True):
                part.mul_(factor)
        elif host_value.any():
            foreach_mul_([part for part, ok in zip(parts, host_value, strict=True) if ok], k)
    return left


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Return bool `(n,)`, whether the sum of each tensor, and so every element, is finite."""
    parts = [local_part(t.coalesce().values() if t.is_sparse else t) for t in tensors]
    sums = [part.sum(dtype=torch.promote_types(part.dtype, torch.float32)).view(1) for part in parts]
    return torch.isfinite(torch.cat(summed_over_shards(tensors, sums)))


def by_device(slots: Sequence[Slot]) -> dict[torch.device, list[Slot]]:
    """Group slots by the device of their gradients."""
    groups: dict[torch.device, list[Slot]] = {}
    for slot in slots:
        groups.setdefault(slot.grad.device, []).append(slot)
    return groups


# -- the update -------------------------------------------------------------------------------------------------------


class UpdateScaling:
    """Scale the updates of one step: `p <- before + k (p - before)`, after the base optimizer has stepped.

    `before` is copied once in a step, at the first `scale` of a parameter. Where a closure is evaluated several times,
    the factors of the last evaluation count. On the CPU the copies' memory is reused in the next step, because
    allocating it again would take longer than the step.
    """

    def __init__(self) -> None:
        self._before: dict[nn.Parameter, Tensor] = {}
        self._spare: dict[Layout, list[Tensor]] = {}
        self._factors: list[tuple[list[nn.Parameter], Tensor]] = []
        self._has_closure = False

    def reset(self, *, has_closure: bool = False) -> None:
        """Discard copies and factors; parameters stay as the base optimizer left them.

        Args:
            has_closure: whether the next step has a closure. Parameters are then copied even for a factor of 1, because
                a later evaluation may scale them.
        """
        self._before.clear()
        self._factors.clear()
        self._has_closure = has_closure

    def restart(self) -> None:
        """Discard the factors of the closure's previous evaluation."""
        self._factors.clear()

    @torch.no_grad()
    def scale(self, params: Sequence[nn.Parameter], factor: Tensor) -> None:
        """Scale the step's update of `params` by `factor`, 0-d or broadcastable with each parameter.

        Non-finite elements of the factor leave the update unchanged.
        """
        host_value = on_host(factor)
        has_effect = host_value is None or bool(((host_value != 1) & np.isfinite(host_value)).any())
        if has_effect or self._has_closure:
            for p in params:
                if p not in self._before:
                    self._before[p] = self._copy(p)
        if has_effect:
            self._factors.append((list(params), factor))

    @uncompiled()
    @torch.no_grad()
    def finish(self) -> None:
        """Scale the update of the finished step by the recorded factors."""
        for params, factor in self._factors:
            _scale_differences(
                [local_part(p.detach()) for p in params], [self._before[p] for p in params], factor
            )
        if self._before:
            self._spare = {}
            for before in self._before.values():
                if before.device.type == "cpu":
                    self._spare.setdefault(_layout_of(before), []).append(before)
        self.reset()

    def _copy(self, p: nn.Parameter) -> Tensor:
        values = local_part(p.detach())
        spare = self._spare.get(_layout_of(values))
        return spare.pop().copy_(values) if spare and values.device.type == "cpu" else values.clone()


def _layout_of(x: Tensor) -> Layout:
    return x.shape, x.stride(), x.dtype


def _scale_differences(values: list[Tensor], before: list[Tensor], factor: Tensor) -> None:
    """Set `values` to `before + factor (values - before)` in place, exact for equal elements and for a factor of 1."""
    host_value = on_host(factor)
    if host_value is not None and factor.dim() == 0:
        foreach_lerp_(values, before, 1 - float(host_value))
        return
    rest = torch.where(torch.isfinite(factor), 1 - factor, 0)
    if factor.dim():
        for x, earlier in zip(values, before, strict=True):
            x.add_((earlier - x).mul_(rest.to(x.device, x.dtype.to_real())))
        return
    by_kind: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, x in enumerate(values):
        by_kind.setdefault((x.device, x.dtype), []).append(index)
    for (device, dtype), indices in by_kind.items():
        chosen = [values[i] for i in indices]
        differences = foreach_sub([before[i] for i in indices], chosen)
        foreach_mul_(differences, rest.to(device, dtype.to_real()))
        foreach_add_(chosen, differences)
