"""Each modality's own part of the classification layer, masked weight by weight."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from balanceopt.modality import unwrap
from balanceopt.modulation._base import Slot, Step
from balanceopt.modulation._parts import Part
from balanceopt.modulation._units import UnitView
from balanceopt.monitor import ModalityMonitor


def head_parts(step: Step, monitor: ModalityMonitor) -> list[Part]:
    """The weights of the linear head that each modality alone feeds, where the optimizer holds them.

    Raises:
        ValueError: if the head is not linear.
    """
    slots = _slots(step.optimizer)
    parts = []
    for position, name in enumerate(step.modalities):
        if monitor.head_columns and name not in monitor.head_columns:
            continue  # no pass has had this modality yet
        weight, columns = _weight(monitor, name)
        slot = slots.get(id(weight))
        if slot is None:
            continue
        width = weight.shape[1] if columns is None else len(range(weight.shape[1])[columns])
        units = UnitView(((weight.shape[0],), (width,)), (0, 1))
        parts.append(Part(slot, position, units, columns))
    return parts


def _weight(monitor: ModalityMonitor, name: str) -> tuple[Tensor, slice | None]:
    head, columns = monitor.head, None
    if isinstance(head, Mapping):
        own: nn.Module | None = unwrap(head[name])
        known = True
    else:
        own, columns = head and unwrap(head), monitor.head_columns.get(name)
        known = columns is not None
    if not (known and isinstance(own, nn.Linear)):
        raise ValueError(
            "`mask_head=True` needs a linear head on concatenated features, or one for each modality. "
            f"Found {type(own).__name__}, with scores made by {monitor.stats()['scores']!r}."
        )
    return own.weight, columns


def _slots(optimizer: torch.optim.Optimizer) -> dict[int, Slot]:
    """Every parameter with a gradient, by identity, with its place in the groups."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    return {id(p): Slot(index, p) for index, p in enumerate(held) if p.grad is not None}
