"""What a copy of an optimizer lacks: Optimizer.__getstate__ keeps `param_groups`, `state` and `defaults` alone."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from balanceopt._warnings import warn_user


def left_out_of_copies(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Attributes that the optimizer keeps for itself, without which a copy or a pickle of it can't step.

    Functions are not among them: a scheduler's `step` is bound to the original.
    """
    if type(optimizer).__getstate__ is not torch.optim.Optimizer.__getstate__:
        return {}  # it takes care of itself
    own = {name: value for name, value in vars(optimizer).items() if name not in _of_every_optimizer()}
    if any(isinstance(value, torch.optim.Optimizer) for value in own.values()):
        # It shares things with the one inside it: rather no copy than a wrong one.
        warn_user(
            f"copies of {type(optimizer).__name__} can't step: it is around another optimizer. "
            "Build a new one and load this one's state_dict()."
        )
        return {}
    return {name: value for name, value in own.items() if value is None or not callable(value)}


@cache
def _of_every_optimizer() -> frozenset[str]:
    plain = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    return frozenset(vars(plain)) | {"_opt_called"}
