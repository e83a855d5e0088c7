"""What can be chosen of OPM, checked."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import get_args

from balanceopt.functional._scores import RatioReduction
from balanceopt.prediction._drop import Rescale


@dataclass(frozen=True)
class Options:
    """As in `OPM`.

    Raises:
        ValueError: for an option outside its range.
    """

    q_base: float
    lam: float
    p_exe: float
    rescale: Rescale
    warmup: int
    end: int | None
    ratio: RatioReduction

    def __post_init__(self) -> None:
        for name in ("q_base", "p_exe"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"`{name}` should lie in [0, 1]. Found {name} = {value}.")
        if not self.lam >= 0:
            raise ValueError(f"`lam` should be non-negative. Found lam = {self.lam}.")
        if self.rescale not in get_args(Rescale):
            raise ValueError(f"`rescale` should be one of {get_args(Rescale)}. Found {self.rescale!r}.")
        if self.ratio not in get_args(RatioReduction):
            raise ValueError(f"`ratio` should be one of {get_args(RatioReduction)}. Found {self.ratio!r}.")
        if self.warmup < 0 or (self.end is not None and self.end < self.warmup):
            raise ValueError(
                f"`warmup` and `end` should satisfy 0 <= warmup <= end. Found {self.warmup} and {self.end}."
            )

    def acts_at(self, clock: int) -> bool:
        """Whether the window is open."""
        return self.warmup <= clock and (self.end is None or clock <= self.end)

    def __str__(self) -> str:
        return ", ".join(f"{field.name}={getattr(self, field.name)!r}" for field in fields(self))
