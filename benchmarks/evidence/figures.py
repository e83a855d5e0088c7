"""Pictures: each row's difference to joint training with its interval, and what the encoders get back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from balanceopt.plotting import COLOURS
from benchmarks.evidence.rows import VOTES
from benchmarks.evidence.summary import SetSummary
from benchmarks.extras import need

_GREY = "#8C8C8C"
_BLUE, _RED = "#0072B2", "#D55E00"
# Where the axis begins at the least: one row that diverged would make all others a dot.
_FAR = -15


def draw_sets(sets: Mapping[str, SetSummary], folder: Path) -> list[Path]:
    """A picture for each set; returns their files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / picture_of(name) for name in sets}
    for name, found in sets.items():
        differences(found).savefig(files[name], dpi=110, bbox_inches="tight")
    return list(files.values())


def picture_of(name: str) -> str:
    """The file of a set's picture."""
    return f"evidence_{name}.png"


def draw_recoveries(sets: Mapping[str, SetSummary], folder: Path) -> Path:
    """A picture of all probes; returns its file."""
    file = folder / picture_of("recovery")
    recoveries(sets).savefig(file, dpi=110, bbox_inches="tight")
    return file


def differences(found: SetSummary) -> Any:
    """A point and an interval for each row, in the table's order; blue above zero, red below, grey if it holds zero."""
    rows = {n: row for n, row in found.rows.items() if row.difference is not None and row.kind != "alone"}
    figure = _figure((7.5, 0.8 + 0.26 * max(1, len(rows))))
    axes = figure.subplots()
    for place, row in enumerate(rows.values()):
        d = row.difference
        assert d is not None
        colour = _BLUE if d.low > 0 else _RED if d.high < 0 else _GREY
        axes.plot([d.low, d.high], [place, place], color=colour, linewidth=2)
        axes.plot(d.mean, place, "o", color=colour, markersize=5)
        if d.mean < _FAR:
            axes.text(
                _FAR, place, f" \N{LEFTWARDS ARROW} {d.mean:.1f}", va="center", fontsize=9, color=colour
            )
    axes.set_yticks(range(len(rows)), list(rows), fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="x", color="#E5E5E5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.axvline(0, color="#333333", linewidth=0.8)
    low = min((row.difference.low for row in rows.values() if row.difference), default=0)
    if low < _FAR:
        axes.set_xlim(left=_FAR)
    axes.set_xlabel(f"points of {found.metric} against joint training (95 % interval)")
    figure.suptitle(found.title, fontsize=11)
    return figure


def recoveries(sets: Mapping[str, SetSummary]) -> Any:
    """Share of the starved encoder's gap that each row closes, a colour for each set that has one."""
    starved = {name: found for name, found in sets.items() if found.starved is not None}
    rows = [(n, row) for found in starved.values() for n, row in found.rows.items()]
    names = list(dict.fromkeys(n for n, row in rows if row.recovery and not n.endswith(VOTES)))
    figure = _figure((8.5, 1.5 + 0.3 * max(1, len(names))))
    axes = figure.subplots()
    for i, (set_name, found) in enumerate(starved.items()):
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
        axes.plot([], [], "o-", color=COLOURS[i % len(COLOURS)], label=f"{set_name}: {found.starved}")
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


def _figure(size: tuple[float, float]) -> Any:
    """Without pyplot: nothing global, no window, no display needed."""
    return need("matplotlib.figure").Figure(figsize=size, layout="constrained")
