"""From runs to what the tables say: each row against its reference, paired by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.evidence.grid import Grid
from benchmarks.evidence.results import Results
from benchmarks.evidence.rows import FIXED_DROPOUT, JOINT, UNIMODAL, Row
from benchmarks.evidence.sets import SETS
from benchmarks.evidence.statistics import Paired, holm, paired, recovery

# Points that an encoder has to lose in joint training before a share of them means anything.
GAP = 1.0

Runs = Mapping[int, Mapping[str, Any]]


@dataclass(frozen=True)
class RowSummary:
    """A row of a set.

    Args:
        row: what it is.
        options: all that was used.
        seeds: of its tests.
        metric: of each seed, percent: accuracy, or what the set's task has in its place.
        tuned: its mean on the data that are kept for choices.
        difference: to the row's reference; None for the reference itself.
        holm: p of the t-test, corrected for all rows of the set that are compared.
        against: the same difference to other rows, by their name.
        probes: modality -> metric of a linear probe, of each seed.
        recovery: modality -> (share, low, high) of the probe's gap that is closed; only where there is one.
        ece: expected calibration error, mean, percent.
        worst_group: accuracy on the person with the lowest one, mean over seeds; NaN where persons are not known.
        missing: modality -> mean metric when its features are zero.
        time: CPU time of the training by that of the reference, median over seeds.
    """

    row: Row
    options: dict[str, Any]
    seeds: tuple[int, ...]
    metric: list[float]
    tuned: float
    difference: Paired | None
    holm: float
    against: dict[str, Paired]
    probes: dict[str, list[float]]
    recovery: dict[str, tuple[float, float, float]]
    ece: float
    worst_group: float
    missing: dict[str, float]
    time: float


@dataclass(frozen=True)
class SetSummary:
    """A data set: its rows, in order, as far as they were run.

    Args:
        name: of the set.
        title: for a reader.
        metric: name of what is measured.
        modalities: their names.
        rows: name -> what came out.
        starved: the modality whose encoder loses most in joint training; None if that is less than `GAP` points, or the
            encoders were not trained alone.
    """

    name: str
    title: str
    metric: str
    modalities: tuple[str, ...]
    rows: dict[str, RowSummary]
    starved: str | None


def summarise(grid: Grid, results: Results) -> list[SetSummary]:
    """All sets of which anything was tested."""
    found = [_set(grid, name, results) for name in grid.rows]
    return [summary for summary in found if summary.rows]


def _set(grid: Grid, name: str, results: Results) -> SetSummary:
    rows = grid.rows[name]
    runs = {row.name: grid.found(name, row, results) for row in rows.values()}
    runs = {row: found for row, found in runs.items() if found}
    modalities = SETS[name].modalities
    gaps = {m: _gap(runs, m) for m in modalities}
    made = {
        row: _row(
            rows[row],
            grid.chosen(name, rows[row], results) or {},
            grid.tuned(name, rows[row], results),
            runs,
            [m for m in modalities if gaps[m] >= GAP],
        )
        for row in runs
    }
    corrected = holm(
        {row: s.difference.t for row, s in made.items() if s.difference and s.row.kind != "alone"}
    )
    made = {row: replace(s, holm=corrected.get(row, float("nan"))) for row, s in made.items()}
    lost = {m: gap for m, gap in gaps.items() if gap >= GAP}
    return SetSummary(
        name,
        SETS[name].title,
        SETS[name].task.metric,
        modalities,
        made,
        max(lost, key=lambda m: lost[m]) if lost else None,
    )


def _row(
    row: Row, options: dict[str, Any], tuned: float, runs: Mapping[str, Runs], with_gap: Sequence[str]
) -> RowSummary:
    found = runs[row.name]
    modalities = list(next(iter(found.values()))["probes"])
    probes = {m: [run["probes"][m] for run in found.values()] for m in modalities}
    worst = [min(run["groups"].values()) for run in found.values() if run["groups"]]
    whole = row.modality is None
    return RowSummary(
        row=row,
        options=options,
        seeds=tuple(found),
        metric=[run["metric"] for run in found.values()],
        tuned=tuned,
        difference=None if row.name == row.reference
        else _against(found, runs.get(row.reference, {})),
        holm=float("nan"),
        against={
            other: difference
            for other in (JOINT, FIXED_DROPOUT, UNIMODAL)
            if whole and other != row.name and (difference := _against(found, runs.get(other, {})))
        },
        probes=probes,
        recovery={m: _recovered(runs, row.name, m) for m in with_gap if whole and row.name != JOINT},
        ece=_mean(run["ece"] for run in found.values()),
        worst_group=_mean(worst),
        missing={m: _mean(run["missing"][m] for run in found.values()) for m in modalities if whole},
        time=_time(found, runs.get(row.reference, {})),
    )  # fmt: skip


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
    """Of the same length: rows that train longer than their reference are told by their epochs."""
    ratios = [found[s]["train_s"] / others[s]["train_s"] for s in found if s in others]
    return float(np.median(ratios)) if ratios else float("nan")


def _mean(values: Any) -> float:
    values = list(values)
    return float(np.mean(values)) if values else float("nan")
