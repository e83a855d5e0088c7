"""A recorded run as arrays, and the few numbers that the report draws conclusions from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from balanceopt.recording import Row

# Re-learning counts epochs: its rows are placed at the step that was recorded before them.
_OF_EPOCHS = ("train_purity", "val_purity", "gap", "strength")
# Below this ratio of its score to the others' no modality is said to lead.
LEAD = 1.2
# The lead is judged on means over so many parts of the run.
_BUCKETS = 40


@dataclass(frozen=True)
class Series:
    """The values of one quantity for one modality; values may be NaN, steps increase."""

    steps: np.ndarray
    values: np.ndarray

    @property
    def finite(self) -> Series:
        """The series without values that are not finite."""
        keep = np.isfinite(self.values)
        return Series(self.steps[keep], self.values[keep])

    def part(self, first: float, last: float) -> float:
        """Mean of the finite values between two shares of the series, such as 0.8 and 1; NaN if there are none."""
        count = len(self.steps)
        low = min(int(count * first), max(count - 1, 0))
        values = self.values[low : max(low + 1, math.ceil(count * last))]
        values = values[np.isfinite(values)]
        return float(values.mean()) if len(values) else math.nan

    @property
    def now(self) -> float:
        """Mean over the last fifth."""
        return self.part(0.8, 1)

    @property
    def last(self) -> float:
        """The last finite value; NaN if there is none."""
        values = self.finite.values
        return float(values[-1]) if len(values) else math.nan

    def smooth(self, buckets: int) -> Series:
        """Means of at most `buckets` runs of neighbouring values."""
        if len(self.steps) <= buckets:
            return self
        parts = np.array_split(np.arange(len(self.steps)), buckets)
        values = [float(np.nanmean(v)) if np.isfinite(v := self.values[p]).any() else math.nan for p in parts]
        return Series(np.array([self.steps[p].mean() for p in parts]), np.array(values))


@dataclass(frozen=True)
class Run:
    """What was recorded.

    Args:
        modalities: names, in the order of recording.
        series: quantity -> modality -> values over the steps.
        alone: what each encoder reaches when it is trained alone, in the unit of the probes.
    """

    modalities: tuple[str, ...]
    series: dict[str, dict[str, Series]]
    alone: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Iterable[Row], alone: Mapping[str, float] | None = None) -> Run:
        """Collect rows by quantity and modality; a later row replaces an earlier one of the same step."""
        values: dict[str, dict[str, dict[int, float]]] = {}
        latest = 0
        for step, quantity, modality, value in rows:
            if quantity not in _OF_EPOCHS:
                latest = max(latest, step)
            at = latest if quantity in _OF_EPOCHS else step
            values.setdefault(quantity, {}).setdefault(modality, {})[at] = value
        series = {
            quantity: {
                modality: Series(np.array(sorted(points)), np.array([points[s] for s in sorted(points)]))
                for modality, points in by_modality.items()
            }
            for quantity, by_modality in values.items()
        }
        modalities = tuple(dict.fromkeys(name for by_modality in series.values() for name in by_modality))
        return cls(modalities, series, dict(alone or {}))

    @property
    def steps(self) -> int:
        """Number of recorded steps."""
        return max((len(s.steps) for by in self.series.values() for s in by.values()), default=0)

    @property
    def last_step(self) -> int:
        """The last recorded step."""
        return max((int(s.steps[-1]) for by in self.series.values() for s in by.values()), default=0)

    def get(self, quantity: str, modality: str) -> Series:
        """One series; empty if it was not recorded."""
        return self.series.get(quantity, {}).get(modality, Series(np.array([]), np.array([])))

    def now(self, quantity: str, modality: str) -> float:
        """Mean over the last fifth of the run; of the probes the last value."""
        series = self.get(quantity, modality)
        return series.last if quantity.startswith("probe") else series.now

    def probes(self) -> dict[str, float]:
        """The last finite probe of each modality that has one."""
        last = {name: self.now("probe", name) for name in self.modalities}
        return {name: value for name, value in last.items() if math.isfinite(value)}

    def ratios(self) -> dict[str, Series]:
        """Each modality's ratio over time: as recorded, else its score to the mean of the others' scores."""
        recorded = {name: s for name, s in self.series.get("ratio", {}).items() if len(s.finite.steps)}
        if recorded or len(self.series.get("score", {})) < 2:
            return recorded
        scores = self.series["score"]
        steps = sorted(set.intersection(*(set(s.steps.tolist()) for s in scores.values())))
        table = np.array([s.values[np.isin(s.steps, steps)] for s in scores.values()], dtype=float)
        rest = (table.sum(axis=0) - table) / (len(table) - 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = table / rest
        return {name: Series(np.array(steps), r) for name, r in zip(scores, ratios, strict=True)}

    def leaders(self) -> list[tuple[int, str | None]]:
        """Which modality led, as `(from step, name or None)`, one entry for each change of the lead."""
        raw = self.ratios()
        ratios = {name: series.smooth(_BUCKETS) for name, series in raw.items()}
        if len(ratios) < 2 or len({len(s.steps) for s in ratios.values()}) > 1:
            return []
        names, table = list(ratios), np.array([s.values for s in ratios.values()])
        steps = next(iter(raw.values())).steps
        starts = [part[0] for part in np.array_split(steps, min(_BUCKETS, len(steps)))]
        changes: list[tuple[int, str | None]] = []
        for step, column in zip(starts, table.T, strict=True):
            if not np.isfinite(column).any():
                continue
            best = int(np.nanargmax(column))
            leader = names[best] if column[best] >= LEAD else None
            if not changes or changes[-1][1] != leader:
                changes.append((int(step), leader))
        return changes
