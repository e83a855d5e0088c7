"""The window in which a method acts: from a first step or epoch to a last one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from balanceopt._options import check_choice, check_count

Unit = Literal["step", "epoch"]


@dataclass(frozen=True)
class Window:
    """Steps or epochs from `start` to `end`, both inclusive and counted from 0.

    Args:
        start: the first one.
        end: the last one; None for no end.
        unit: what is counted, `"step"` or `"epoch"`.

    Raises:
        ValueError: for an option that is not such a number or unit, or an end before the start.
    """

    start: int = 0
    end: int | None = None
    unit: Unit = "step"

    def __post_init__(self) -> None:
        check_count("start", self.start)
        check_count("end", self.end, or_none=True)
        if self.end is not None and self.end < self.start:
            raise ValueError(
                f"`end` should not be less than `start`. Found start = {self.start} and end = {self.end}."
            )
        check_choice("unit", self.unit, get_args(Unit))

    def is_open(self, step: int, epoch: int | None) -> bool:
        """Whether a step of an epoch lies in it.

        Raises:
            RuntimeError: if epochs are counted and none was set.
        """
        if self.unit == "epoch" and epoch is None:
            raise RuntimeError(
                "unit='epoch' counts epochs, and none was set yet. Call set_epoch(epoch) when an epoch begins, before "
                "its first step."
            )
        now = step if epoch is None or self.unit == "step" else epoch
        return self.start <= now and (self.end is None or now <= self.end)
