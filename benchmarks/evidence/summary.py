"""From runs to what the tables say: each row against joint training, paired by seed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

import balanceopt as bo
from benchmarks.evidence.grid import Grid
from benchmarks.evidence.results import Results
from benchmarks.evidence.rows import JOINT, Kind, Row
from benchmarks.evidence.running import PROTOCOL
from benchmarks.evidence.sets import SETS
from benchmarks.evidence.statistics import Paired, holm, paired, recovery

# Points that an encoder has to lose in joint training before a share of them means anything.
GAP = 1.0

Runs = Mapping[int, Mapping[str, Any]]


@dataclass(frozen=True)
class RowSummary:
    """A row of a set.

    Args:
        kind: what it is in the table.
        options: all that was used.
        seeds: of its tests.
        metric: of each seed, percent: accuracy, or what the set's task has in its place.
        tuned: its mean on the data that are kept for choices.
        difference: to joint training; None for joint training itself.
        holm: p of the t-test, corrected for all rows of the set that are compared.
        probes: modality -> metric of a linear probe, of each seed.
        recovery: modality -> (share, low, high) of the probe's gap that is closed; only where there is one.
        ece: expected calibration error, mean, percent.
        worst_group: accuracy on the person with the lowest one, mean over seeds; NaN where persons are not known.
        missing: modality -> mean metric when its features are zero.
        time: CPU time of the training by that of joint training, median over seeds.
    """

    kind: Kind
    options: dict[str, Any]
    seeds: tuple[int, ...]
    metric: tuple[float, ...]
    tuned: float
    difference: Paired | None
    holm: float
    probes: dict[str, tuple[float, ...]]
    recovery: dict[str, tuple[float, float, float]]
    ece: float
    worst_group: float
    missing: dict[str, float]
    time: float


@dataclass(frozen=True)
class SetSummary:
    """A data set: its rows, in order, as far as they were run.

    Args:
        title: for a reader.
        metric: name of what is measured.
        modalities: their names.
        rows: name -> what came out.
        starved: the modality whose encoder loses most in joint training; None if that is less than `GAP` points, or the
            encoders were not trained alone.
        runs: trainings that the numbers rest on, each counted once.
        cpu_minutes: that they took, with all that was measured.
    """

    title: str
    metric: str
    modalities: tuple[str, ...]
    rows: dict[str, RowSummary]
    starved: str | None
    runs: int
    cpu_minutes: float


@dataclass(frozen=True)
class Summary:
    """All that the pages say.

    Args:
        sets: by name, in order.
        versions: of what was run, by name.
        minutes: of the clock in which at least one training ran; NaN where sets were run apart.
    """

    sets: dict[str, SetSummary]
    versions: dict[str, str]
    minutes: float

    def keeping(self, before: Summary) -> Summary:
        """Return these sets and those of `before` that were not run again."""
        sets = {name: self.sets.get(name) or before.sets.get(name) for name in SETS}
        there = {name: found for name, found in sets.items() if found is not None}
        whole = there.keys() == self.sets.keys()
        return replace(self, sets=there, minutes=self.minutes if whole else float("nan"))


def summarise(grid: Grid, results: Results) -> Summary:
    """All sets of which anything was tested."""
    runs = {name: grid.runs(name, results) for name in grid.rows}
    sets = {name: _set(grid, name, results, runs[name]) for name in grid.rows}
    spans = [tuple(run["clock"]) for found in runs.values() for run in found]
    return Summary(
        {name: found for name, found in sets.items() if found.rows},
        {"balanceopt": bo.__version__, "torch": torch.__version__, "protocol": str(PROTOCOL)},
        _covered(spans) / 60,
    )


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of (begin, end)."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def _set(grid: Grid, name: str, results: Results, trainings: Sequence[Mapping[str, Any]]) -> SetSummary:
    rows = grid.rows[name]
    runs = {row.name: grid.found(name, row, results) for row in rows.values()}
    runs = {row: found for row, found in runs.items() if found}
    modalities = SETS[name].modalities
    gaps = {m: _gap(runs, m) for m in modalities}
    lost = {m: gap for m, gap in gaps.items() if gap >= GAP}
    made = {
        row: _row(
            rows[row],
            grid.chosen(name, rows[row], results) or {},
            grid.tuned(name, rows[row], results),
            runs,
            tuple(lost),
        )
        for row in runs
    }
    corrected = holm({row: s.difference.t for row, s in made.items() if s.difference and s.kind != "alone"})
    made = {row: replace(s, holm=corrected.get(row, float("nan"))) for row, s in made.items()}
    starved = max(lost, key=lambda m: lost[m]) if lost else None
    return SetSummary(
        SETS[name].title,
        SETS[name].task.metric,
        modalities,
        made,
        starved,
        len(trainings),
        sum(run["all_s"] for run in trainings) / 60,
    )


def _row(
    row: Row, options: dict[str, Any], tuned: float, runs: Mapping[str, Runs], with_gap: Sequence[str]
) -> RowSummary:
    found, joint = runs[row.name], runs.get(JOINT, {})
    modalities = list(next(iter(found.values()))["probes"])
    worst = [min(run["groups"].values()) for run in found.values() if run["groups"]]
    whole = row.modality is None
    return RowSummary(
        kind=row.kind,
        options=options,
        seeds=tuple(found),
        metric=tuple(run["metric"] for run in found.values()),
        tuned=tuned,
        difference=None if row.name == JOINT else _against(found, joint),
        holm=float("nan"),
        probes={m: tuple(run["probes"][m] for run in found.values()) for m in modalities},
        recovery={m: _recovered(runs, row.name, m) for m in with_gap if whole and row.name != JOINT},
        ece=_mean(run["ece"] for run in found.values()),
        worst_group=_mean(worst),
        missing={m: _mean(run["missing"][m] for run in found.values()) for m in modalities if whole},
        time=_time(found, joint),
    )


def _against(found: Runs, others: Runs) -> Paired | None:
    differences = [found[s]["metric"] - others[s]["metric"] for s in found if s in others]
    return paired(differences) if differences else None


def _gap(runs: Mapping[str, Runs], modality: str) -> float:
    """Points that the encoder's probe loses in joint training."""
    joint, alone = runs.get(JOINT, {}), runs.get(f"{modality} alone", {})
    return _mean(alone[s]["probes"][modality] - joint[s]["probes"][modality] for s in joint if s in alone)


def _recovered(runs: Mapping[str, Runs], row: str, modality: str) -> tuple[float, float, float]:
    three = [runs[name] for name in (row, JOINT, f"{modality} alone")]
    seeds = [seed for seed in three[0] if all(seed in found for found in three)]
    if not seeds:
        return (float("nan"),) * 3
    probes, joint, alone = ([found[seed]["probes"][modality] for seed in seeds] for found in three)
    return recovery(probes, joint, alone)


def _time(found: Runs, others: Runs) -> float:
    ratios = [found[s]["train_s"] / others[s]["train_s"] for s in found if s in others]
    return float(np.median(ratios)) if ratios else float("nan")


def _mean(values: Any) -> float:
    values = list(values)
    return float(np.mean(values)) if values else float("nan")
