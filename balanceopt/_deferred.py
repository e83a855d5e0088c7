"""Read device tensors from the host without synchronising."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor


def on_host(tensor: Tensor) -> np.ndarray | None:
    """Return a CPU tensor's values without a copy; None where reading would synchronise with a device."""
    if tensor.device.type != "cpu":
        return None
    numbers = tensor.detach()
    return (numbers.float() if numbers.dtype == torch.bfloat16 else numbers).numpy()  # numpy has no bfloat16


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to a device without synchronising."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class DeferredCounts:
    """Counters on a device, passed to a callback as soon as the host can read them without synchronising.

    CPU counters are read at once. From another device an asynchronous copy starts, which a later call reads once
    complete.

    Args:
        names: counters that read as 0 before their first count; others are absent until then.
        look: callback that takes the values by name; None for none.
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
        """Return the current values, with a device synchronisation."""
        totals = {name: int(total.cpu().numpy()) for name, total in self._totals.items()}
        return dict.fromkeys(self._names, 0) | totals

    def arrived(self) -> dict[str, int] | None:
        """Return the latest values readable without a device synchronisation; None where no new value is ready."""
        zeros = dict.fromkeys(self._names, 0)
        host_values = {name: on_host(total) for name, total in self._totals.items()}
        readable = {name: int(value) for name, value in host_values.items() if value is not None}
        if len(readable) == len(host_values):
            return zeros | readable
        values = None
        if self._arriving is not None:
            names, copy, event = self._arriving
            if not event.query():
                return None
            values = zeros | dict(zip(names, copy.tolist(), strict=True))
        device = next(iter(self._totals.values())).device
        total = torch.stack([total.to(device) for total in self._totals.values()])
        copy = torch.empty(total.shape, dtype=total.dtype, device="cpu", pin_memory=True)
        copy.copy_(total, non_blocking=True)
        event = torch.Event(device)
        event.record()
        self._arriving = (tuple(self._totals), copy, event)
        return values

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_arriving": None}
