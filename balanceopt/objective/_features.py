"""Features of the latest forward, attached to its graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from balanceopt.monitor import ModalityMonitor
from balanceopt.monitor._pass import Pass
from balanceopt.monitor._supported import in_backward


class LiveFeatures:
    """Each modality's clean features, of the latest forward with gradients and of the latest one without."""

    def __init__(self, monitor: ModalityMonitor) -> None:
        """Listen to `monitor`."""
        self.monitor = monitor
        self.forget()
        monitor.add_tap(self._tap)

    def of_latest(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Features by modality, and which samples have the modality, where the user told.

        Raises:
            RuntimeError: if there was no forward, or gradients can't go back through the features.
        """
        found = self._with if torch.is_grad_enabled() else self._without
        if not found:
            raise RuntimeError(
                "no features came by: call the model on a batch before the objective, with the monitor's hooks on."
            )
        for name, z in found.items():
            if torch.is_grad_enabled() and not z.requires_grad and self._trainable(name):
                raise RuntimeError(
                    f"the features of {name!r} carry no gradient to their encoder, as under reentrant activation "
                    "checkpointing. Use checkpoint(..., use_reentrant=False), or inject=True."
                )
        present = {} if self._pass is None or not torch.is_grad_enabled() else self._pass.present
        return dict(found), dict(present)

    def forget(self) -> None:
        """Let go of all features."""
        self._with: dict[str, Tensor] = {}
        self._without: dict[str, Tensor] = {}
        self._pass: Pass | None = None

    def remove(self) -> None:
        """Stop listening."""
        self.monitor.drop_tap(self._tap)
        self.forget()

    def _tap(self, name: str, output: Any, current: Pass | None) -> None:
        if in_backward():
            return
        # A copy: what comes after the encoder may work in place.
        z = self.monitor.features(name, output).clone()
        if current is None and not torch.is_grad_enabled():
            if name in self._without:
                self._without = {}
            self._without[name] = z
            return
        if current is not self._pass or (current is None and name in self._with):
            self._with, self._pass = {}, current
        self._with[name] = z

    def _trainable(self, name: str) -> bool:
        return any(p.requires_grad for p in self.monitor.encoders[name].parameters())

    def __getstate__(self) -> dict[str, Any]:
        # Features in a graph can neither be copied nor pickled.
        return {"monitor": self.monitor, "_with": {}, "_without": {}, "_pass": None}
