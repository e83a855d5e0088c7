"""MaskedSubnetworkSGD: torch's SGD with AMSS before each step."""

from __future__ import annotations

from collections.abc import Iterable
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from balanceopt._options import check_flag, check_kind, check_number, names_of
from balanceopt.modulation import AMSS, MaskScale
from balanceopt.monitor import ModalityMonitor
from balanceopt.optim._modulated import ModulatedOptimizer


class MaskedSubnetworkSGD(ModulatedOptimizer):
    r"""SGD that updates a part of each encoder's units in a step, fewer where the modality dominates (AMSS, AMSS+).

    $$b_j \leftarrow \mu b_j + (1 - \tau)(w_j M_j g_j + \lambda \theta_j),
    \qquad \theta_j \leftarrow \theta_j - \eta b_j$$

    for the units j of each tensor of an encoder, with momentum \(\mu\), dampening \(\tau\), weight decay
    \(\lambda\), the mask M and the weights w of `AMSS`. A step without masks is that of
    `torch.optim.SGD`, bit for bit.

    Args:
        params: parameters or groups, such as `modality_groups(model, encoders)`.
        monitor: a `ModalityMonitor` on the model, built with a head.
        lr: learning rate, >= 0.
        momentum: momentum factor of SGD, >= 0.
        dampening: dampening of the momentum.
        weight_decay: factor of the L2 penalty, >= 0.
        nesterov: use Nesterov's momentum.
        temperature: temperature T of the keep ratios, > 0.
        scale: `"none"` (AMSS), `"unbiased"` (AMSS+) or `"official"`.
        seed: seed of the masks, which are a function of (seed, step, parameter); None for `torch.initial_seed()` of
            the first rank, read now.
        maximize: maximize the objective instead of minimizing.
        foreach: use torch's implementation on lists of tensors; None for torch's choice.
        fused: use torch's fused implementation, the fastest; None for torch's choice.
        strict: raise after ten steps in a row without any score; False to only warn.
        **options: further options of `AMSS`: `clamp`, `offset`, `units`, `min_ndim`, `start`, `end`, `unit`.

    Raises:
        ValueError: for an option outside its range, or parameters that are not those of the monitor's model.
        TypeError: for an argument of another type, or an unknown option.
        KeyError: if groups are tagged with modalities that the monitor does not have.

    Example:
        >>> import balanceopt as bo
        >>> model = torch.nn.ModuleDict({m: torch.nn.Linear(2, 3) for m in ("a", "b", "head")})
        >>> encoders = {"a": model["a"], "b": model["b"]}
        >>> monitor = bo.ModalityMonitor(model, encoders, head=model["head"])
        >>> groups = bo.modality_groups(model, encoders)
        >>> optimizer = bo.MaskedSubnetworkSGD(groups, monitor, lr=0.01, momentum=0.9)
        >>> optimizer.modulation.scale
        'none'

    Reference:
        Yang et al., AMSS (TPAMI 2024). See docs/methods/amss.md.
    """

    def __init__(
        self,
        params: Any,
        monitor: ModalityMonitor,
        lr: float | Tensor,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        temperature: float = 0.2,
        scale: MaskScale = "none",
        seed: int | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        strict: bool = True,
        **options: Any,
    ) -> None:
        if not isinstance(lr, Tensor):
            check_number("lr", lr, at_least=0)
        check_number("momentum", momentum, at_least=0)
        check_number("dampening", dampening)
        check_number("weight_decay", weight_decay, at_least=0)
        check_flag("nesterov", nesterov)
        check_flag("maximize", maximize)
        check_flag("foreach", foreach, or_none=True)
        check_flag("fused", fused, or_none=True)
        check_kind(
            "`params`", params, Iterable, "parameters or param groups, such as modality_groups(...) makes"
        )
        unknown = options.keys() - signature(AMSS).parameters.keys()
        if unknown:
            raise TypeError(f"options should be those of SGD and of AMSS. Found {names_of(unknown)}.")
        if nesterov and (momentum == 0 or dampening != 0):
            raise ValueError(
                "`nesterov` needs a momentum above 0 and a dampening of 0. Found "
                f"momentum = {momentum} and dampening = {dampening}."
            )
        modulation = AMSS(temperature, scale=scale, **options)
        base = torch.optim.SGD(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            fused=fused,
        )
        super().__init__(base, monitor, modulation, seed=seed, strict=strict)
