"""AMSS and AMSS+: update only a part of each encoder's units, a smaller part where the modality dominates."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from balanceopt._deferred import on_host
from balanceopt._method import Unit
from balanceopt._options import check_choice, check_count, check_number
from balanceopt._warnings import warn_user
from balanceopt.functional import check_clamp, keep_ratio
from balanceopt.modulation._base import Modulation, OptimizerHintWarning, StepContext
from balanceopt.modulation._cancelling import cancels_constant_factor
from balanceopt.modulation._masks import Masks, MaskScale, part_of
from balanceopt.modulation._units import UnitRule, check_units, find_units
from balanceopt.monitor import ModalityMonitor

# Number of cached sets of masks: with alternating losses the parameters with a gradient alternate too.
_REMEMBERED = 4


class AMSS(Modulation):
    r"""Adaptive mask subnetworks: a step updates a part of each encoder's units, fewer where the modality dominates.

    $$g_j \leftarrow w_j M_j g_j, \qquad r^m = \operatorname{clamp}(1 - \operatorname{softmax}_m(u / T))$$

    for the units j of each tensor of the encoder of modality m. Of n units \(k = \lceil n r^m \rceil\) are kept
    (\(M_j = 1\)), drawn without replacement in proportion to the squared norms of their gradients; u is the modal
    significance of `functional.modal_significance`. A unit is a filter, a row or an attention head (`MaskUnits`); norms
    and biases are never masked. With `scale="unbiased"` (AMSS+) unit j is kept with probability \(\pi_j\), proportional
    to the norm of its gradient and capped at 1; the probabilities sum to \(n r^m\), and \(w_j = 1 / \pi_j\), so that
    the mean of the masked gradient is the gradient. Masked units have a gradient of 0, and still move by momentum and
    weight decay.

    A mask is a function of (seed, step, index of the parameter) and of the gradient, the same on every device, rank and
    shard. Norms are float32 sums, whose last digits depend on the processor and the number of threads: a mask can
    differ only at a tie within this rounding (`functional.unit_importance`).

    Args:
        temperature: temperature T > 0; a smaller T makes the keep ratios differ more.
        scale: weight w of kept units: `"none"` 1; `"unbiased"` \(1 / \pi_j\); `"official"`
            \(1 / (p_j + 1/n)\) as in the published code, p the share of the importance.
        clamp: lower and upper limit of the keep ratios.
        offset: number added to the information in the significance, in nats.
        units: rule that precedes the default: a mapping from parameters, modules or classes of modules to `MaskUnits`,
            `"whole"` (not masked) or `"element"`, or a function of `(module, name, parameter)` to one of these or None.
        min_ndim: least number of dimensions of masked tensors, other than those that `units` names.
        start: first step or epoch of the window, counted from 0.
        end: last step or epoch of the window, inclusive; None for no end.
        unit: unit of the window: `"step"`, or `"epoch"`, set by `set_epoch`.

    Raises:
        ValueError: for an option outside its range.
        TypeError: for `units` of another type.

    Example:
        >>> modulation = AMSS(temperature=0.5, scale="unbiased", units={torch.nn.Embedding: "whole"})

    Reference:
        Yang et al., Learning to rebalance multi-modal optimization by adaptively masking subnetworks (TPAMI 2024), and
        its published code; unbiased form: Horvitz and Thompson, 1952. See docs/methods/amss.md.
    """

    needs_entropy = True

    def __init__(
        self,
        temperature: float = 0.2,
        *,
        scale: MaskScale = "none",
        clamp: tuple[float, float] = (0.1, 0.9),
        offset: float = 0.5,
        units: UnitRule | None = None,
        min_ndim: int = 2,
        start: int = 0,
        end: int | None = None,
        unit: Unit = "step",
    ) -> None:
        super().__init__(start=start, end=end, unit=unit)
        check_number("temperature", temperature, above=0)
        check_choice("scale", scale, get_args(MaskScale))
        check_clamp(clamp)
        check_number("offset", offset)
        check_units(units)
        check_count("min_ndim", min_ndim)
        self.temperature = temperature
        self.scale: MaskScale = scale
        self.clamp = clamp
        self.offset = offset
        self.units = units
        self.min_ndim = min_ndim
        self._masks: dict[Any, Masks] = {}

    def check(self, optimizer: torch.optim.Optimizer, monitor: ModalityMonitor) -> None:
        """Warn where the base optimizer cancels the masks or the weights of kept units."""
        if isinstance(optimizer, torch.optim.LBFGS):
            warn_user(
                "LBFGS's line search sees another mask each time it evaluates its closure.",
                OptimizerHintWarning,
            )
        if self.scale == "official" and cancels_constant_factor(optimizer):
            warn_user(
                f"{type(optimizer).__name__} divides a constant gradient factor out again, so the factor of "
                "AMSS(scale='official') slows no modality down. scale='none' masks without one.",
                OptimizerHintWarning,
            )

    @torch.no_grad()
    def modulate(self, step: StepContext) -> None:
        """Draw the step's masks and multiply the gradients by the masks."""
        masks = self._masks_of(step)
        ratio, usable = self.ratios(step)
        host_value = on_host(usable)
        if masks.parts and (host_value is None or host_value):
            active = step.scores.present & usable
            nonfinite = masks.apply_(ratio, active, self.scale, step.seed, step.number)
            step.count("nonfinite_gradients", nonfinite)

    def ratios(self, step: StepContext) -> tuple[Tensor, Tensor]:
        """Return the step's `(M,)` keep ratios, and whether the scores are usable, 0-d bool."""
        scores = step.scores
        significance = scores.significance(self.offset)
        usable = scores.usable.any() & ~(significance.isnan() & scores.present).any()
        ratio = keep_ratio(significance, self.temperature, self.clamp, scores.present)
        ratio = torch.where(usable, ratio, 1)
        step.report("significance", significance)
        step.report("keep_ratio", ratio)
        step.count("unusable_scores", ~usable)
        return ratio, usable

    def options(self) -> dict[str, Any]:
        """Return the constructor's arguments for `repr`, with `units` abbreviated."""
        shown = super().options()
        if self.units is not None:
            shown["units"] = "..."
        return shown

    def _masks_of(self, step: StepContext) -> Masks:
        """Return the masks of all parameters with a gradient, cached for each set of such parameters."""
        slots = [step.slots.get(name, ()) for name in step.modalities]
        key = tuple(tuple((slot.index, id(slot.parameter)) for slot in graded) for graded in slots)
        if key not in self._masks:
            if len(self._masks) >= _REMEMBERED:
                self._masks.clear()
            self._masks[key] = self._make_masks(step)
        return self._masks[key]

    def _make_masks(self, step: StepContext) -> Masks:
        if step.monitor is None:
            raise ValueError("AMSS needs the step's monitor, to know the modules that hold the parameters.")
        slots = [
            (index, slot) for index, name in enumerate(step.modalities) for slot in step.slots.get(name, ())
        ]
        units = find_units(
            [slot.parameter for _, slot in slots], step.monitor.model, self.units, self.min_ndim
        )
        masked = [
            (slot, index, view) for (index, slot), view in zip(slots, units, strict=True) if view is not None
        ]
        if any(slot.grad.is_sparse for slot, _, _ in masked):
            raise NotImplementedError(
                "an encoder has sparse gradients, which AMSS can't mask. Use an embedding with sparse=False, or leave "
                "it whole: AMSS(units={embedding: 'whole'})."
            )
        return Masks([part_of(slot, index, view) for slot, index, view in masked])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_masks": {}}
