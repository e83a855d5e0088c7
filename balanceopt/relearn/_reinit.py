"""Soft re-initialisation of encoders: their weights, and where asked for the optimizer's state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from balanceopt.functional import soft_reinit_
from balanceopt.relearn._initial import InitialWeights
from balanceopt.relearn._sharded import local

OptimizerState = Literal["keep", "reset", "scale"]

# Their state is no running mean of gradients that starts from zero.
_NO_RUNNING_MEANS = ("Rprop", "ASGD", "LBFGS")


def check_optimizer_state(option: OptimizerState, optimizer: torch.optim.Optimizer) -> None:
    """Refuse an option that is unknown, or does not go with the optimizer.

    Raises:
        ValueError: naming the alternative.
    """
    if option not in get_args(OptimizerState):
        raise ValueError(f"`optimizer_state` should be one of {get_args(OptimizerState)}. Found {option!r}.")
    base = optimizer
    while isinstance(getattr(base, "optimizer", None), torch.optim.Optimizer):
        base = base.optimizer  # type: ignore[attr-defined]
    if option == "scale" and type(base).__name__ in _NO_RUNNING_MEANS:
        raise ValueError(
            f"`optimizer_state='scale'` scales running means of gradients, and {type(base).__name__} keeps something "
            "else. Use 'reset' or 'keep'."
        )


@torch.no_grad()
def reinitialise(
    strength: Mapping[str, float],
    initial: InitialWeights,
    optimizer: torch.optim.Optimizer,
    optimizer_state: OptimizerState,
) -> None:
    """Move each modality's encoder towards its initial weights by its own strength, in place.

    Everything that could fail is done before the first change.
    """
    parameters = initial.parameters()
    moves: list[tuple[list[Tensor], list[Tensor], float]] = []
    states: list[tuple[Any, float]] = []
    for modality, alpha in strength.items():
        if alpha <= 0:
            continue
        moves.append((*initial.starts(parameters[modality]), alpha))
        trainable = [p for p in parameters[modality].values() if p.requires_grad]
        states += [(p, alpha) for p in trainable if p in optimizer.state]
    scaled = [(t, alpha) for p, alpha in states for t in _running_means(optimizer.state[p])]
    for targets, starts, alpha in moves:
        soft_reinit_(targets, starts, alpha)
    if optimizer_state == "reset":
        for parameter, _ in states:
            del optimizer.state[parameter]
    elif optimizer_state == "scale":
        for tensor, alpha in scaled:
            tensor.mul_(1 - alpha)


def _running_means(state: Any) -> list[Tensor]:
    """The tensors of a parameter's state, without step counts."""
    tensors = (
        [value for value in state.values() if isinstance(value, Tensor)] if isinstance(state, Mapping) else []
    )
    return [local(t) for t in tensors if t.is_floating_point() and t.dim() > 0]
