"""How many features each modality has: the weights of the published rescaling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from balanceopt.monitor import ModalityMonitor


class Widths:
    """Columns of a linear head where they are known, else what the encoders return.

    Attributes:
        seen: by modality, the features of its encoder's output.
    """

    def __init__(self, monitor: ModalityMonitor) -> None:
        """Nothing is seen yet."""
        self.monitor = monitor
        self.seen: dict[str, int] = {}
        self._listed: list[int] = []
        self._tensor = torch.zeros(0)

    def note(self, name: str, output: Any) -> None:
        """Look at an encoder's output, once."""
        if name not in self.seen:
            self.seen[name] = width_of(self.monitor.features(name, output))

    def on(self, device: torch.device) -> Tensor:
        """`(M,)` on `device`; 1 for those not seen yet."""
        columns = self.monitor.head_columns
        listed = [
            columns[name].stop - columns[name].start if name in columns else self.seen.get(name, 1)
            for name in self.monitor.modalities
        ]
        if listed != self._listed or self._tensor.device != device:  # a copy to the device waits for it
            self._listed, self._tensor = listed, torch.tensor(listed, dtype=torch.float32, device=device)
        return self._tensor


def width_of(features: Tensor) -> int:
    """Channels of a map `(B, C, H, W)`, else the last dimension: of vectors `(B, D)` and tokens `(B, T, D)`."""
    if features.dim() < 2:
        return 1
    return features.shape[1] if features.dim() > 3 else features.shape[-1]
