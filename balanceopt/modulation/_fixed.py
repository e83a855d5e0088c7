"""FixedModulation: the same coefficients in every step, chosen by the user; frozen encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from balanceopt._method import Unit
from balanceopt._options import check_flag, check_kind, check_number, names_of
from balanceopt.modulation._base import Slot, StepContext
from balanceopt.modulation._hiding import refuse_unhidden
from balanceopt.modulation._scaling import ApplyTo, GradientScaling
from balanceopt.monitor import ModalityMonitor


class FixedModulation(GradientScaling):
    r"""Constant coefficients on the modalities' gradients, without any score.

    $$g^m \leftarrow k^m g^m$$

    With `functional.priority_coefficients` this is PDMP, which speeds up the modality that is best alone; with
    `frozen=True` and a window it is SMP, which trains one modality after the other; and it is the control that every
    adaptive method has to beat. The monitor needs no head.

    Args:
        coefficients: coefficient of each modality, >= 0; 1 for modalities that are not named.
        apply_to: `"grad"` to scale gradients, or `"update"` to scale the base optimizer's update (Adam and similar).
        min_ndim: least number of dimensions of the encoders' tensors that are scaled.
        frozen: leave the encoders of modalities with coefficient 0 as they are, with momentum and all other state of
            the base optimizer; a gradient of 0 alone would still let momentum and weight decay move them.
        start: first step or epoch of the window, counted from 0.
        end: last step or epoch of the window, inclusive; None for no end.
        unit: unit of the window: `"step"`, or `"epoch"`, set by `set_epoch`.

    Raises:
        ValueError: for an option outside its range, or `frozen=True` without a coefficient of 0.
        TypeError: if `coefficients` is no mapping.
        KeyError: when the optimizer is built, for a modality that the monitor does not have.
        NotImplementedError: when the optimizer is built, for `frozen=True` on a base that moves parameters without a
            gradient (LBFGS, Lookahead).

    Example:
        >>> FixedModulation({"audio": 0.5})
        FixedModulation(coefficients={'audio': 0.5}, apply_to='grad', min_ndim=0, frozen=False, start=0, end=None,
            unit='step')

    Reference:
        Wei et al., Rethinking Balanced Multimodal Learning via Performance-Dominant Modality Prioritization, 2026
        (PDMP); Rakib and Bagavathi, G2D, ICCV 2025 (SMP); docs/methods/fixed.md.
    """

    needs_scores = False

    def __init__(
        self,
        coefficients: Mapping[str, float],
        *,
        apply_to: ApplyTo = "grad",
        min_ndim: int = 0,
        frozen: bool = False,
        start: int = 0,
        end: int | None = None,
        unit: Unit = "step",
    ) -> None:
        super().__init__(apply_to=apply_to, min_ndim=min_ndim, start=start, end=end, unit=unit)
        check_kind("`coefficients`", coefficients, Mapping, "a mapping from modality to its coefficient")
        for name, value in coefficients.items():
            check_number(f"coefficients[{name!r}]", value, at_least=0)
        check_flag("frozen", frozen)
        self.factors = dict(coefficients)
        self.frozen = frozen
        if frozen and 0 not in self.factors.values():
            raise ValueError(
                "`frozen=True` freezes the encoders of modalities with coefficient 0. Found coefficients = "
                f"{self.factors}."
            )
        self._k = torch.ones(0, dtype=torch.float32, device="cpu")

    def check(self, optimizer: torch.optim.Optimizer, monitor: ModalityMonitor) -> None:
        """Raise for unknown modalities; warn where the base optimizer cancels the coefficients."""
        unknown = self.factors.keys() - set(monitor.modalities)
        if unknown:
            raise KeyError(
                f"`coefficients` should name modalities of {list(monitor.modalities)}. Found {names_of(unknown)}."
            )
        if self.frozen:
            refuse_unhidden(optimizer, "FixedModulation(frozen=True)")
        if not set(self.factors.values()) <= {0, 1}:  # no optimizer cancels these
            super().check(optimizer, monitor)

    def coefficients(self, step: StepContext) -> Tensor:
        """Return the `(M,)` coefficients, the same in every step."""
        device = step.scores.score.device
        if len(self._k) != len(step.modalities) or self._k.device != device:  # cached, as a copy synchronises
            values = [self.factors.get(name, 1.0) for name in step.modalities]
            self._k = torch.tensor(values, dtype=torch.float32, device=device)
        return self._k

    def scale(self, step: StepContext, slots: Mapping[str, Sequence[Slot]], k: Tensor) -> None:
        """Scale the slots of modalities with another coefficient than 1; hide frozen ones from the base optimizer."""
        changed = {name: own if self.factors.get(name, 1) != 1 else () for name, own in slots.items()}
        if self.frozen:
            for name in [name for name in changed if self.factors.get(name) == 0]:
                step.hide([slot.parameter for slot in changed[name]])
                changed[name] = ()
        super().scale(step, changed, k)

    def options(self) -> dict[str, Any]:
        """Return the options for `repr`."""
        return {**super().options(), "coefficients": self.factors}
