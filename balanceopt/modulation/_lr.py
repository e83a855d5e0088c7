"""Scale the learning rate of some parameters for one step of any optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from balanceopt.modulation._base import Slot, Undo

# They take a learning rate and never read it; ApolloDQN warms up to one of its own.
_IGNORE_LR = frozenset({"A2GradExp", "A2GradInc", "A2GradUni", "ApolloDQN"})


def check_lr(optimizer: torch.optim.Optimizer) -> None:
    """Raise where scaling a group's learning rate would not scale how far its parameters move.

    Raises:
        ValueError: saying what is in the way.
    """
    name, groups = type(optimizer).__name__, optimizer.param_groups
    numbers = (int, float, torch.Tensor)
    beside = [
        key
        for key, value in vars(optimizer).items()
        if isinstance(value, list) and value is not groups and len(value) == len(groups)
    ]
    if isinstance(optimizer, torch.optim.LBFGS):
        why = "it has one learning rate for all parameters"
    elif name in _IGNORE_LR or any(group.get("relative_step") for group in groups):
        why = "it does not use the learning rate of its groups"
    elif not all(isinstance(group.get("lr"), numbers) for group in groups):
        why = "its groups have no learning rate"
    elif _steps_others(optimizer):
        why = "the optimizer inside it has groups of its own"
    elif beside:
        why = f"groups are split for the time of a step, and its `{beside[0]}` has an entry for each of them"
    else:
        return
    raise ValueError(f"`apply_to='lr'` does not work with {name}: {why}. Use apply_to='grad'.")


def _steps_others(optimizer: torch.optim.Optimizer) -> bool:
    """Whether another optimizer inside this one steps by groups of its own (ZeroRedundancyOptimizer)."""
    inside = [getattr(optimizer, name, None) for name in ("optimizer", "optim")]
    return any(
        isinstance(inner, torch.optim.Optimizer) and inner.param_groups is not optimizer.param_groups
        for inner in inside
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
    if _steps_others(optimizer):  # a load can part an outer optimizer's groups from those inside it
        raise RuntimeError(
            f"`apply_to='lr'` no longer reaches the optimizer inside {type(optimizer).__name__}: loading gave it "
            "groups of its own. Use apply_to='grad'."
        )
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
