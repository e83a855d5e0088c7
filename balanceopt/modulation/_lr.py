"""Scale the learning rate of some parameters for one step of any optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from balanceopt.modulation._base import Slot, Undo


def check_lr(optimizer: torch.optim.Optimizer) -> None:
    """Raise where the learning rate does not say how far each parameter moves.

    Raises:
        ValueError: for a base without learning rates, or LBFGS, which has a single one.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("`apply_to='lr'` should not be used with LBFGS: it has one learning rate for all.")
    for group in optimizer.param_groups:
        lr = group.get("lr")
        if not isinstance(lr, (int, float, torch.Tensor)):
            raise ValueError(
                f"`apply_to='lr'` needs a learning rate. Found lr = {lr!r} in {type(optimizer).__name__}'s groups."
            )


def scale_lr(
    optimizer: torch.optim.Optimizer, slots: Mapping[str, Sequence[Slot]], factors: Mapping[str, float]
) -> Undo | None:
    """Multiply the learning rate of each modality's parameters; returns what puts everything back.

    Groups that hold parameters of several factors are split for the time of the step: state is kept by parameter, so
    the base does not notice. What the base writes into a group during the step is carried back.
    """
    factor_of = {
        id(slot.parameter): factors[name]
        for name, own in slots.items()
        for slot in own
        if factors[name] != 1.0
    }
    if not factor_of:
        return None
    whole = list(optimizer.param_groups)
    parts = [_split(group, factor_of) for group in whole]
    optimizer.param_groups[:] = [part for pieces in parts for part in pieces]

    def put_back() -> None:
        for group, pieces in zip(whole, parts, strict=True):
            for key, value in pieces[0].items():
                if key not in ("params", "lr"):
                    group[key] = value
        optimizer.param_groups[:] = whole

    return put_back


def _split(group: dict[str, Any], factor_of: Mapping[int, float]) -> list[dict[str, Any]]:
    """The group as one group for each factor among its parameters, in the parameters' order."""
    params_of: dict[float, list[Any]] = {}
    for parameter in group["params"]:
        params_of.setdefault(factor_of.get(id(parameter), 1.0), []).append(parameter)
    if not params_of:
        return [group]
    return [{**group, "params": params, "lr": group["lr"] * factor} for factor, params in params_of.items()]
