"""Training that the contract tests share: a method on a base, and the steps that the base needs."""

from __future__ import annotations

from collections.abc import Iterable

import torch

import balanceopt as bo
from tests.contract.bases import Base
from tests.models import Multimodal, watch
from tests.training import backward, batch, groups_of, small_model


def build(base: Base, modulation: bo.Modulation) -> tuple[Multimodal, bo.ModulatedOptimizer]:
    model = small_model()
    optimizer = bo.ModulatedOptimizer(base.make(groups_of(model)), watch(model), modulation, seed=3)
    optimizer.set_epoch(0)
    return model, optimizer


def advance(
    model: Multimodal, optimizer: torch.optim.Optimizer, base: Base, numbers: Iterable[int]
) -> list[float]:
    """Step on the batches `numbers`; returns each closure's loss."""
    losses = []
    for number in numbers:
        torch.manual_seed(number)  # for bases that draw from the global stream

        def closure(number: int = number) -> torch.Tensor:
            optimizer.zero_grad()
            return backward(model, batch(number, model), create_graph=base.create_graph)

        if base.closure:
            losses.append(float(optimizer.step(closure)))  # type: ignore[arg-type]
        else:
            closure()
            optimizer.step()
    return losses
