"""Modality of each parameter of an optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from balanceopt._options import shown
from balanceopt.modulation import Slot
from balanceopt.monitor import ModalityMonitor
from balanceopt.optim._checks import refuse_groups


class Owners:
    """Modality by parameter: the tag of the parameter's group, else the encoder that holds the parameter.

    Args:
        optimizer: the base optimizer.
        monitor: the monitor, whose encoders have the modalities' names.

    Attributes:
        held: index of each parameter of the optimizer, by id.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, monitor: ModalityMonitor) -> None:
        self._optimizer = optimizer
        self._monitor = monitor
        self._tags: list[str | None] = []
        self._slots: list[tuple[str | None, Slot]] = []
        self._seen: list[tuple[int, list[int]]] = []
        self.held: dict[int, int] = {}

    def changed(self) -> bool:
        """Whether groups or parameters were replaced since the last `refresh`."""
        return self._seen != _identities(self._optimizer)

    def refresh(self) -> None:
        """Update the modality of each parameter from the groups.

        Raises:
            KeyError: for a tag that is no modality of the monitor.
            NotImplementedError: for groups that can't be modulated.
        """
        groups = self._optimizer.param_groups
        refuse_groups(groups)
        # Tags are stored, because loading a checkpoint without tags removes them from the groups.
        known = self._tags[: len(groups)]
        self._tags = known + [group.get("modality") for group in groups[len(known) :]]
        modality_of = self._modalities(groups)
        parameters = [p for group in groups for p in group["params"]]
        self._slots = [(modality_of.get(id(p)), Slot(index, p)) for index, p in enumerate(parameters)]
        self.held = {id(p): index for index, p in enumerate(parameters)}
        self._seen = _identities(self._optimizer)

    def restore_tags(self) -> None:
        """Restore this optimizer's tags, or their absence, in groups that a checkpoint changed."""
        tagged = any(tag is not None for tag in self._tags)
        for group, tag in zip(self._optimizer.param_groups, self._tags, strict=False):
            if tagged:
                group["modality"] = tag
            else:
                group.pop("modality", None)

    def slots(self) -> tuple[dict[str, list[Slot]], list[Tensor]]:
        """Return the parameters with a gradient by modality, and all gradients."""
        slots: dict[str, list[Slot]] = {name: [] for name in self._monitor.modalities}
        gradients: list[Tensor] = []
        for modality, slot in self._slots:
            parameter = slot.parameter
            gradient = parameter.grad
            if gradient is None:
                continue
            gradients.append(gradient)
            if modality is not None and parameter.numel() > 0:
                slots[modality].append(slot)
        return slots, gradients

    def _modalities(self, groups: Sequence[dict[str, Any]]) -> dict[int, str]:
        known = self._monitor.modalities
        found = {id(p): name for name, own in self._monitor.parameters.items() for p in own}
        for group, tag in zip(groups, self._tags, strict=True):
            if tag is None:
                continue
            if tag not in known:
                raise KeyError(
                    f"param groups are tagged with modality {shown(tag)}, the monitor has {list(known)}. "
                    "Give both the same names, and None to parameters of no modality."
                )
            found.update({id(p): tag for p in group["params"]})
        return found


def _identities(optimizer: torch.optim.Optimizer) -> list[tuple[int, list[int]]]:
    # Parameters are compared too, because Accelerate puts sharded ones into the same groups.
    return [(id(group), [id(p) for p in group["params"]]) for group in optimizer.param_groups]
