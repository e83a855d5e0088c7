"""Look at numbers on a device without waiting for it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def on_host(tensor: Tensor) -> np.ndarray | None:
    """The numbers of a CPU tensor, read in place; None where reading would wait for a device."""
    if tensor.device.type != "cpu":
        return None
    numbers = tensor.detach()
    return (numbers.float() if numbers.dtype == torch.bfloat16 else numbers).numpy()  # numpy has no bfloat16


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class DeferredCounts:
    """Counters kept on their device, shown to a function as soon as they can be read without waiting.

    On the CPU that is at once. Elsewhere a copy is started, and looked at on a later call, when it has arrived.
    """

    def __init__(self, names: tuple[str, ...], look: Callable[[dict[str, int]], None]) -> None:
        """Keep a counter for each of `names` and call `look` with their values."""
        self.names = names
        self._look = look
        self._total: Tensor | None = None
        self._arriving: tuple[Tensor, torch.Event] | None = None

    def add(self, *counts: Tensor) -> None:
        """Add 0-d `counts`, one for each name."""
        with torch.no_grad():
            new = torch.stack([count.to(torch.int64) for count in counts])
            self._total = new if self._total is None else self._total.to(new.device) + new
        host = on_host(self._total)
        if host is not None:
            self._look(self._named(host))
        else:
            self._look_when_arrived(self._total)

    def read(self) -> dict[str, int]:
        """The values now; waits for the device."""
        if self._total is None:
            return dict.fromkeys(self.names, 0)
        return self._named(self._total.cpu().numpy())

    def _look_when_arrived(self, total: Tensor) -> None:
        if self._arriving is not None:
            copy, event = self._arriving
            if not event.query():
                return
            self._arriving = None
            self._look(self._named(copy.numpy()))
        copy = torch.empty(total.shape, dtype=total.dtype, device="cpu", pin_memory=True).copy_(
            total, non_blocking=True
        )
        event = torch.Event(total.device)
        event.record()
        self._arriving = (copy, event)

    def _named(self, values: np.ndarray) -> dict[str, int]:
        return {name: int(value) for name, value in zip(self.names, values, strict=True)}

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_arriving": None}
