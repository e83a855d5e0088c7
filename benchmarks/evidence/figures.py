"""Pictures: each row's difference to joint training with its interval, and what the encoders get back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from balanceopt.plotting import COLOURS
from benchmarks.evidence.rows import JOINT
from benchmarks.evidence.summary import RowSummary, SetSummary
from benchmarks.extras import need

_GREY = "#8C8C8C"
_BLUE, _RED = "#0072B2", "#D55E00"


def draw_sets(sets: Sequence[SetSummary], folder: Path) -> dict[str, Path]:
    """A picture for each set; returns name -> file."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for found in sets:
        files[found.name] = folder / f"evidence_{found.name}.png"
        differences(found).savefig(files[found.name], dpi=110, bbox_inches="tight")
    return files


def draw_recoveries(sets: Sequence[SetSummary], folder: Path) -> Path:
    """A picture of all probes; returns its file."""
    file = folder / "evidence_recovery.png"
    recoveries(sets).savefig(file, dpi=110, bbox_inches="tight")
    return file


def differences(found: SetSummary) -> Any:
    """A point and an interval for each row, in the table's order; blue above zero, red below, grey if it holds zero."""
    rows = [row for row in found.rows.values() if row.difference is not None and row.row.kind != "alone"]
    figure = _figure((7.5, 0.8 + 0.26 * max(1, len(rows))))
    axes = figure.subplots()
    for place, row in enumerate(rows):
        d = row.difference
        assert d is not None
        colour = _BLUE if d.low > 0 else _RED if d.high < 0 else _GREY
        axes.plot([d.low, d.high], [place, place], color=colour, linewidth=2)
        axes.plot(d.mean, place, "o", color=colour, markersize=5)
    _names(axes, rows)
    axes.axvline(0, color="#333333", linewidth=0.8)
    # One that diverged would make all others a dot.
    low = min((row.difference.low for row in rows if row.difference), default=0)
    if low < -15:
        axes.set_xlim(left=-15)
    axes.set_xlabel(f"points of {found.metric} against joint training (95 % interval)")
    axes.set_title(found.title, loc="left", fontsize=11)
    return figure


def recoveries(sets: Sequence[SetSummary]) -> Any:
    """Share of the starved encoder's gap that each row closes, a colour for each set that has one."""
    starved = [found for found in sets if found.starved is not None]
    names = list(dict.fromkeys(n for found in starved for n, row in found.rows.items() if row.recovery))
    figure = _figure((8.5, 1.5 + 0.3 * max(1, len(names))))
    axes = figure.subplots()
    for i, found in enumerate(starved):
        assert found.starved is not None
        offset = 0.5 * ((i + 0.5) / len(starved) - 0.5)
        for place, name in enumerate(names):
            row = found.rows.get(name)
            if row is None or found.starved not in row.recovery:
                continue
            share, low, high = (100 * value for value in row.recovery[found.starved])
            colour = COLOURS[i % len(COLOURS)]
            axes.plot([low, high], [place + offset] * 2, color=colour, linewidth=1.2)
            axes.plot(share, place + offset, "o", color=colour, markersize=4)
        axes.plot([], [], "o-", color=COLOURS[i % len(COLOURS)], label=f"{found.name}: {found.starved}")
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(-110, 210)
    for x in (0, 100):
        axes.axvline(x, color="#333333", linewidth=0.8, linestyle=":" if x else "-")
    axes.set_xlabel("part of the gap that is closed, % (100: trained alone)")
    axes.spines[["top", "right"]].set_visible(False)
    if starved:
        figure.legend(frameon=False, fontsize=8, loc="outside upper center", ncols=3)
    return figure


def _names(axes: Any, rows: Sequence[RowSummary]) -> None:
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="x", color="#E5E5E5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _label(row: RowSummary) -> str:
    """The row's name, and what it is compared with if that is not joint training with SGD."""
    return row.row.name if row.row.reference == JOINT else f"{row.row.name} (against {row.row.reference})"


def _figure(size: tuple[float, float]) -> Any:
    """Without pyplot: nothing global, no window, no display needed."""
    return need("matplotlib.figure").Figure(figsize=size, layout="constrained")
