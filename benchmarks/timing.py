"""Time alternatives side by side: interleaved in one process, forwards and backwards, medians with spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Run = Callable[[], None]


@dataclass(frozen=True)
class Contender:
    """One alternative.

    Attributes:
        run: what is timed.
        prepare: called before each run, not timed.
    """

    run: Run
    prepare: Run = lambda: None


@dataclass(frozen=True)
class Timing:
    """Seconds of one alternative: the median, and the quartiles on either side of it."""

    median: float
    low: float
    high: float

    def ratio_to(self, other: Timing) -> float:
        """How many times the other's median."""
        return self.median / other.median


def measure(
    contenders: Mapping[str, Contender], repetitions: int, device: torch.device, *, warm_up: int = 2
) -> dict[str, Timing]:
    """Time each contender `repetitions` times, in turn: A B C, C B A, A B C, ...

    The machines are shared: what disturbs one round disturbs all contenders of it alike.

    Args:
        contenders: by name.
        repetitions: rounds.
        device: waited for before the clock is read.
        warm_up: rounds before, which do not count.

    Returns:
        Timings by name.
    """
    seconds = _rounds(contenders, repetitions, device, warm_up, time.perf_counter)
    return {name: summary(values) for name, values in seconds.items()}


def processor_seconds(
    contenders: Mapping[str, Contender],
    repetitions: int,
    device: torch.device,
    *,
    warm_up: int = 2,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, list[float]]:
    """Measure processor time, of this process or by another clock, in the same order, and return all rounds by name."""
    return _rounds(contenders, repetitions, device, warm_up, clock)


def _rounds(
    contenders: Mapping[str, Contender],
    repetitions: int,
    device: torch.device,
    warm_up: int,
    clock: Callable[[], float],
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    for round_ in range(repetitions + warm_up):
        for name in order if round_ % 2 == 0 else reversed(order):
            contender = contenders[name]
            contender.prepare()
            _wait(device)
            start = clock()
            contender.run()
            _wait(device)
            if round_ >= warm_up:
                seconds[name].append(clock() - start)
    return seconds


def summary(values: list[float]) -> Timing:
    """Median and quartiles."""
    if len(values) == 1:
        return Timing(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, low, high)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
