"""Memory that is used again in every step: on the CPU new memory costs more than what is written to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Scratch:
    """Blocks of the CPU's memory, one for each dtype."""

    def __init__(self) -> None:
        """Hold nothing yet."""
        self._blocks: dict[torch.dtype, Tensor] = {}
        self._used: dict[torch.dtype, int] = {}

    def clear(self) -> None:
        """Everything taken may be given again."""
        self._used.clear()

    def take(self, size: int, dtype: torch.dtype) -> Tensor:
        """`size` numbers that nothing else uses until `clear`."""
        start = self._used.get(dtype, 0)
        self._used[dtype] = start + size
        block = self._blocks.get(dtype)
        if block is None:
            self._blocks[dtype] = block = torch.empty(start + size, dtype=dtype)
        elif block.numel() < start + size:
            # What was taken from the old block keeps it alive until it is put back.
            self._blocks[dtype] = block = torch.empty(2 * (start + size), dtype=dtype)
        return block[start : start + size]

    def __getstate__(self) -> dict[str, Any]:
        return {"_blocks": {}, "_used": {}}
