"""Look at numbers on a device without waiting for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

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

    Args:
        names: counters that are read as 0 before anything was counted; others begin with the first count.
        look: called with the values by name.
    """

    def __init__(
        self, names: Iterable[str] = (), look: Callable[[dict[str, int]], None] | None = None
    ) -> None:
        self._names = tuple(names)
        self._look = look
        self._totals: dict[str, Tensor] = {}
        self._arriving: tuple[tuple[str, ...], Tensor, torch.Event] | None = None

    @torch.no_grad()
    def add(self, **counts: Tensor) -> None:
        """Add 0-d counts of one device by name."""
        for name, count in counts.items():
            new = count.to(torch.int64)
            earlier = self._totals.get(name)
            self._totals[name] = new if earlier is None else earlier.to(new.device) + new
        if self._look is not None and (values := self.arrived()) is not None:
            self._look(values)

    def read(self) -> dict[str, int]:
        """The values now; waits for the device."""
        return {
            **dict.fromkeys(self._names, 0),
            **{name: int(total.cpu().numpy()) for name, total in self._totals.items()},
        }

    def arrived(self) -> dict[str, int] | None:
        """The latest values that can be read without waiting for a device; None where there are no new ones."""
        if self._on_host():
            return self.read()
        values = None
        if self._arriving is not None:
            names, copy, event = self._arriving
            if not event.query():
                return None
            values = {**dict.fromkeys(self._names, 0), **dict(zip(names, copy.tolist(), strict=True))}
        device = next(iter(self._totals.values())).device
        total = torch.stack([total.to(device) for total in self._totals.values()])
        copy = torch.empty(total.shape, dtype=total.dtype, device="cpu", pin_memory=True)
        copy.copy_(total, non_blocking=True)
        event = torch.Event(device)
        event.record()
        self._arriving = (tuple(self._totals), copy, event)
        return values

    def _on_host(self) -> bool:
        return all(total.device.type == "cpu" for total in self._totals.values())

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_arriving": None}
