"""Soft re-initialisation of encoders: their weights, and where asked for the optimizer's state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from balanceopt.functional import soft_reinit_
from balanceopt.relearn._initial import InitialWeights

OptimizerState = Literal["keep", "reset"]


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
    forgotten: list[Tensor] = []
    for modality, alpha in strength.items():
        if alpha <= 0:
            continue
        moves.append((*initial.starts(parameters[modality]), alpha))
        forgotten += [p for p in parameters[modality].values() if p.requires_grad and p in optimizer.state]
    for targets, starts, alpha in moves:
        soft_reinit_(targets, starts, alpha)
    if optimizer_state == "reset":
        for parameter in forgotten:
            del optimizer.state[parameter]
