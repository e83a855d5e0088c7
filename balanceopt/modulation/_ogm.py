"""OGM and OGM-GE: slow the dominant modality's encoder down, and add noise to all of them."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from balanceopt._deferred import on_host
from balanceopt._options import check_choice, check_count, check_number
from balanceopt._warnings import warn_user
from balanceopt._window import Unit
from balanceopt.functional import discrepancy_ratio, modulation_coefficient
from balanceopt.functional._coefficients import CoefficientForm
from balanceopt.functional._scores import RatioReduction
from balanceopt.modulation._base import Modulation, OptimizerHintWarning, Slot, Step
from balanceopt.modulation._bases import cancels_constant_factor
from balanceopt.modulation._gradients import scale_and_add_noise_, scale_grads_
from balanceopt.modulation._noise import Noise
from balanceopt.modulation._noise_compiled import warm_up
from balanceopt.monitor import ModalitySums


class OGM(Modulation):
    r"""On-the-fly gradient modulation; with `noise=True` also generalization enhancement (OGM-GE).

    $$g^m \leftarrow k^m g^m + h^m, \qquad h^m \sim N(0, \text{noise\_scale}^2 \operatorname{std}(g^m)^2)$$

    for each tensor g of the encoder of modality m, with the coefficient \(k^m\) of `modulation_coefficient`: 1 for
    the modalities that do not dominate, less for those that do. The standard deviation is that of the unscaled
    gradient's elements; without noise there is no h.

    Args:
        alpha: strength, >= 0 (published: 0.1 VGGSound, 0.8 CREMA-D).
        form: `"cvpr"`, `"cvpr_v0"` or `"tpami"`, as in `modulation_coefficient`.
        noise: add the noise h (OGM-GE) or not (OGM). `"compiled"` makes other numbers, faster, by a kernel that is
            compiled when the optimizer is built (seconds, once a process).
        noise_scale: factor on its standard deviation.
        apply_to: `"grad"` scales gradients. Adam and its kin divide a constant factor out again; `"update"`
            scales what the base did in the step instead, `p <- before + k (p - before)`, on any base: weight decay,
            momentum and noise with the rest.
        min_ndim: only tensors with at least this many dimensions (2 leaves norms and biases alone, as published).
        ratio: `"mean_of_ratios"` or `"ratio_of_means"`, for three modalities or more.
        start: first step or epoch in which it acts, counted from 0.
        end: last one, inclusive; None for no end.
        unit: `"step"`, or `"epoch"` to count the epochs that `set_epoch` is told.

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
        apply_to: Literal["grad", "update"] = "grad",
        min_ndim: int = 2,
        ratio: RatioReduction = "mean_of_ratios",
        start: int = 0,
        end: int | None = None,
        unit: Unit = "step",
    ) -> None:
        super().__init__(start=start, end=end, unit=unit)
        check_number("alpha", alpha, at_least=0)
        check_choice("form", form, get_args(CoefficientForm))
        if not isinstance(noise, bool):
            check_choice("noise", noise, get_args(Noise), other=", True or False")
        check_number("noise_scale", noise_scale, at_least=0)
        check_choice("apply_to", apply_to, ("grad", "update"))
        check_count("min_ndim", min_ndim)
        check_choice("ratio", ratio, get_args(RatioReduction))
        self.alpha = alpha
        self.form: CoefficientForm = form
        self.noise: bool | Noise = noise
        self.noise_scale = noise_scale
        self.apply_to = apply_to
        self.min_ndim = min_ndim
        self.ratio: RatioReduction = ratio

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Warn where scaling gradients does nothing to the base; get the noise ready."""
        if self.alpha > 0 and self.apply_to == "grad" and cancels_constant_factor(optimizer):
            warn_user(
                f"{type(optimizer).__name__} divides a constant gradient factor out again, so OGM's coefficient does "
                "little. OGM(apply_to='update') scales what it does in the step instead.",
                OptimizerHintWarning,
            )
        if self.noise == "compiled" and self.noise_scale > 0:
            for device in {p.device for group in optimizer.param_groups for p in group["params"]}:
                warm_up(device)

    def modulate(self, step: Step) -> None:
        """Scale by the step's coefficients and add noise."""
        slots = {
            name: [slot for slot in own if slot.parameter.dim() >= self.min_ndim]
            for name, own in step.slots.items()
        }
        noisy = self.noise and self.noise_scale > 0
        if noisy:
            _refuse_sparse(slots)
        coefficient, usable = self.coefficient(step)
        step.count("unusable_scores", ~usable)
        if self.apply_to == "update" and self.alpha > 0:
            for k, name in zip(coefficient, step.modalities, strict=True):
                step.scale_update([slot.parameter for slot in slots.get(name, [])], k)
        known_usable = on_host(usable)
        if known_usable is not None and not known_usable:
            return
        scaled = coefficient if self.apply_to == "grad" else torch.ones_like(coefficient)
        known = on_host(scaled)
        for position, name in enumerate(step.modalities):
            own = slots.get(name, [])
            if not own:
                continue
            if noisy:
                scale = self.noise_scale * usable.to(coefficient.dtype)
                left = scale_and_add_noise_(
                    own, scaled[position], scale, step.seed, step.number, compiled=self.noise == "compiled"
                )
            elif self.apply_to == "grad" and (known is None or known[position] != 1):
                left = scale_grads_(own, scaled[position])
            else:
                continue
            step.count("nonfinite_gradients", left)

    def coefficient(self, step: Step) -> tuple[Tensor, Tensor]:
        """The step's `(M,)` coefficients, and whether its scores can be used at all, 0-d bool."""
        sums = step.sums
        usable = scores_usable(sums)
        ratio = discrepancy_ratio(sums.mean_score, self.ratio, sums.present)
        k = torch.where(usable, modulation_coefficient(ratio, self.alpha, self.form), 1)
        step.report("score", sums.mean_score)
        step.report("ratio", ratio)
        step.report("coefficient", k)
        return k, usable


def scores_usable(sums: ModalitySums) -> Tensor:
    """Whether there is something to compare, 0-d bool: two modalities present, scores finite and not all zero."""
    return (sums.present.sum() > 1) & torch.isfinite(sums.score).all() & (sums.score > 0).any()


def _refuse_sparse(slots: dict[str, list[Slot]]) -> None:
    for name, own in slots.items():
        if any(slot.grad.is_sparse for slot in own):
            raise NotImplementedError(
                f"modality {name!r} has sparse gradients, to which no noise can be added. "
                "Use OGM(noise=False), or an embedding with sparse=False."
            )
