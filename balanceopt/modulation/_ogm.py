"""OGM and OGM-GE: slow down the dominant modality's encoder, and add noise to the gradients of all encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

import torch
from torch import Tensor

from balanceopt._deferred import on_host
from balanceopt._method import Unit
from balanceopt._options import check_choice, check_number
from balanceopt.functional import CoefficientForm, RatioReduction, discrepancy_ratio, modulation_coefficient
from balanceopt.modulation._base import Slot, StepContext
from balanceopt.modulation._noise import Noise, scale_and_add_noise_
from balanceopt.modulation._noise_compiled import warm_up
from balanceopt.modulation._scaling import ApplyTo, GradientScaling
from balanceopt.monitor import ModalityMonitor


class OGM(GradientScaling):
    r"""On-the-fly gradient modulation; with `noise=True` also generalization enhancement (OGM-GE).

    $$g^m \leftarrow k^m g^m + h^m, \qquad h^m \sim N(0, \mathrm{noise\_scale}^2 \operatorname{std}(g^m)^2)$$

    for the gradient g of each tensor of the encoder of modality m, with the coefficient \(k^m\) of
    `modulation_coefficient`: below 1 for dominant modalities, 1 for others. The standard deviation is that of the
    unscaled gradient's elements; without noise there is no h.

    Args:
        alpha: strength, >= 0 (published: 0.1 VGGSound, 0.8 CREMA-D).
        form: `"cvpr"`, `"cvpr_v0"` or `"tpami"`, as in `modulation_coefficient`.
        noise: add the noise h (OGM-GE) or not (OGM). `"compiled"` draws other numbers, faster, by a kernel that is
            compiled when the optimizer is built (seconds, once a process).
        noise_scale: factor on the standard deviation of the noise, >= 0.
        apply_to: `"grad"` scales gradients, a factor that Adam and similar cancel; `"update"` scales the update of any
            base optimizer, `p <- before + k (p - before)`, with weight decay, momentum and noise.
        min_ndim: least number of dimensions of modulated tensors (2 skips norms and biases, as published).
        ratio: reduction of three or more modalities, `"mean_of_ratios"` or `"ratio_of_means"`.
        start: first step or epoch of the window, counted from 0.
        end: last step or epoch of the window, inclusive; None for no end.
        unit: unit of the window: `"step"`, or `"epoch"`, set by `set_epoch`.

    Raises:
        ValueError: for an option outside its range.

    Example:
        >>> OGM(alpha=0.8, noise=False)
        OGM(alpha=0.8, form='cvpr', noise=False, noise_scale=1.0, apply_to='grad', min_ndim=2,
            ratio='mean_of_ratios', start=0, end=None, unit='step')

    Reference:
        Peng et al., CVPR 2022, Eq. 10, 11, 16 and Algorithm 1; TPAMI 2024, Eq. 11 (`form="tpami"`).
    """

    def __init__(
        self,
        alpha: float = 0.1,
        *,
        form: CoefficientForm = "cvpr",
        noise: bool | Noise = True,
        noise_scale: float = 1.0,
        apply_to: ApplyTo = "grad",
        min_ndim: int = 2,
        ratio: RatioReduction = "mean_of_ratios",
        start: int = 0,
        end: int | None = None,
        unit: Unit = "step",
    ) -> None:
        super().__init__(apply_to=apply_to, min_ndim=min_ndim, start=start, end=end, unit=unit)
        check_number("alpha", alpha, at_least=0)
        check_choice("form", form, get_args(CoefficientForm))
        if not isinstance(noise, bool):
            check_choice("noise", noise, get_args(Noise), other=", True or False")
        check_number("noise_scale", noise_scale, at_least=0)
        check_choice("ratio", ratio, get_args(RatioReduction))
        self.alpha = alpha
        self.form: CoefficientForm = form
        self.noise: bool | Noise = noise
        self.noise_scale = noise_scale
        self.ratio: RatioReduction = ratio

    def check(self, optimizer: torch.optim.Optimizer, monitor: ModalityMonitor) -> None:
        """Warn where the base optimizer cancels the coefficients; compile the noise's kernel."""
        if self.alpha > 0:
            super().check(optimizer, monitor)
        if self.noise == "compiled" and self.noise_scale > 0:
            for device in {p.device for group in optimizer.param_groups for p in group["params"]}:
                warm_up(device)

    def coefficients(self, step: StepContext) -> Tensor:
        """Return the step's `(M,)` coefficients, 1 for modalities that do not dominate."""
        scores = step.scores
        ratio = discrepancy_ratio(scores.mean_score, self.ratio, scores.present)
        step.report("ratio", ratio)
        return modulation_coefficient(ratio, self.alpha, self.form)

    def scale(self, step: StepContext, slots: Mapping[str, Sequence[Slot]], k: Tensor) -> None:
        """Scale the gradients, or the update, of each modality's `slots` by `k` `(M,)`, and add noise to gradients."""
        if not self.noise or self.noise_scale == 0:
            super().scale(step, slots, k)
            return
        for name, noisy in slots.items():
            if any(slot.grad.is_sparse for slot in noisy):
                raise NotImplementedError(
                    f"modality {name!r} has sparse gradients, to which no noise can be added. "
                    "Use OGM(noise=False), or an embedding with sparse=False."
                )
        if self.apply_to == "update":
            super().scale(step, slots, k)
            k = torch.ones_like(k)
        usable = step.scores.usable.any()
        host_value = on_host(usable)
        if host_value is not None and not host_value:
            return
        sigma = self.noise_scale * usable.to(k.dtype)
        for index, noisy in enumerate(slots.values()):
            if noisy:
                left = scale_and_add_noise_(
                    noisy, k[index], sigma, step.seed, step.number, compiled=self.noise == "compiled"
                )
                step.count("nonfinite_gradients", left)
