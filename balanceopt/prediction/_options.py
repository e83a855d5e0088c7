"""What can be chosen of OPM, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    batch_dim: int | Mapping[str, int]

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

    def batch_dims(self, modalities: Sequence[str]) -> dict[str, int]:
        """The dimension of samples in each modality's outputs.

        Raises:
            ValueError: if it is negative, or given for an unknown modality.
        """
        if isinstance(self.batch_dim, Mapping):
            unknown = self.batch_dim.keys() - set(modalities)
            if unknown:
                raise ValueError(
                    f"`batch_dim` should be given for {tuple(modalities)}. Found also {sorted(unknown)}."
                )
            dims = {name: self.batch_dim.get(name, 0) for name in modalities}
        else:
            dims = dict.fromkeys(modalities, self.batch_dim)
        if min(dims.values()) < 0:
            raise ValueError(f"`batch_dim` should be non-negative. Found {self.batch_dim}.")
        return dims

    def acts_at(self, clock: int) -> bool:
        """Whether the window is open."""
        return self.warmup <= clock and (self.end is None or clock <= self.end)

    def __str__(self) -> str:
        return ", ".join(f"{field.name}={getattr(self, field.name)!r}" for field in fields(self))
