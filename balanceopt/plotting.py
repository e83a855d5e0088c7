"""Figures of recorded quantities over time."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from balanceopt._files import check_path, replacing
from balanceopt._options import check_count, check_kind

if TYPE_CHECKING:
    from balanceopt.recording import Row

# Six colours that colour-blind readers can tell apart, dark enough for text on white. With the dashes they make 30
# lines; neighbours differ in grey, too.
COLOURS = ("#005f99", "#b34700", "#00694a", "#96357a", "#735600", "#4d4d4d")
DASHES = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (7, 2, 1.5, 2)), (0, (3, 1.5, 1, 1.5, 1, 1.5)))
# More panels than this are drawn in two columns.
_ONE_COLUMN = 3
_FONT = 9


def plot_rows(
    rows: Sequence[Row],
    path: str | PathLike[str] | None = None,
    *,
    quantities: Sequence[str] | None = None,
    smooth: int = 1,
) -> Any:
    """Plot recorded rows, with one panel for each quantity and one line for each modality, named at its end.

    Args:
        rows: rows of a `Recorder`.
        path: file to save the figure to; None to only return the figure.
        quantities: quantities to plot, in this order; None for all.
        smooth: width in steps of a running mean, at least 1, drawn over the faint raw line.

    Returns:
        The `matplotlib.figure.Figure`.

    Raises:
        ImportError: without matplotlib (extra `plot`).
        ValueError: if there is nothing to draw, or `smooth` is not a whole number of at least 1.
        TypeError: if `path` is not a path, or `quantities` not a list.
    """
    check_count("smooth", smooth, at_least=1)
    if quantities is not None:
        check_kind("`quantities`", quantities, (list, tuple), "a list of names")
    if path is not None:
        check_path(path)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'balanceopt[plot]'") from error
    found = list(dict.fromkeys(row.quantity for row in rows))
    shown = [q for q in (found if quantities is None else quantities) if q in found]
    if not shown:
        raise ValueError(f"nothing to draw: asked for {quantities or 'everything'}, recorded {found}.")
    columns = 1 if len(shown) <= _ONE_COLUMN else 2
    height = -(-len(shown) // columns)
    figure = Figure(figsize=(7 if columns == 1 else 11, 2.4 * height), layout="constrained")
    panels = np.ravel(figure.subplots(height, columns, sharex=True, squeeze=False))
    for axes, quantity in zip(panels, shown, strict=False):
        _panel(axes, [row for row in rows if row.quantity == quantity], smooth)
        axes.set_title(quantity, parse_math=False, loc="left", fontsize=_FONT + 1)
    for axes in panels[len(shown) :]:
        axes.remove()
    for axes in panels[max(len(shown) - columns, 0) : len(shown)]:
        axes.set_xlabel("step")
        axes.tick_params(labelbottom=True)
    if path is not None:
        with replacing(path) as beside:
            figure.savefig(beside, dpi=150, format=Path(path).suffix[1:] or "png")
    return figure


def _panel(axes: Any, rows: Sequence[Row], smooth: int) -> None:
    """Draw the rows of one quantity, a line for each modality."""
    modalities = list(dict.fromkeys(row.modality for row in rows))
    lines = []
    for i, modality in enumerate(modalities):
        steps, values = np.array([(row.step, row.value) for row in rows if row.modality == modality]).T
        interval = float(np.median(np.diff(steps))) if len(steps) > 1 else 1.0
        width = max(1, round(smooth / max(interval, 1.0)))
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]
        if width > 1:
            axes.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8)
        lines += axes.plot(steps, _running_mean(values, width), color=colour, linestyle=dash, linewidth=1.5)
    axes.spines[["top", "right"]].set_visible(False)
    label_ends(axes, lines, modalities)


def label_ends(axes: Any, lines: Sequence[Any], names: Sequence[str]) -> None:
    """Write each line's name beside its end, in its colour, moved up or down where names would overlap.

    Args:
        axes: matplotlib axes, whose limits are not changed afterwards.
        lines: the lines; one without a finite value gets no name.
        names: their names, written as they are.
    """
    size = axes.get_position(original=True).height * axes.figure.get_size_inches()[1] * 72
    gap = 1.4 * _FONT / size
    axes.get_ylim()  # computes the limits, which the transform below does not
    ends = []
    for line, name in zip(lines, names, strict=True):
        points = np.asarray(line.get_xydata(), dtype=float)
        points = points[np.isfinite(points).all(axis=1)]
        if len(points):
            end = axes.transAxes.inverted().transform(axes.transData.transform(points[-1]))
            ends.append((float(end[1]), points[-1], line, name))
    ends.sort(key=lambda end: end[0])
    for (_, point, line, name), y in zip(ends, _apart([end[0] for end in ends], gap), strict=True):
        axes.annotate(
            "", (1.03, y), point, xycoords="axes fraction", textcoords="data", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": line.get_color(), "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip
        axes.text(
            1.04, y, name, transform=axes.transAxes, color=line.get_color(), fontsize=_FONT, va="center",
            parse_math=False,
        )  # fmt: skip


def _apart(places: Sequence[float], gap: float) -> list[float]:
    """Move sorted heights from 0 to 1 apart by at least `gap`, around where they were."""
    result: list[float] = []
    for height in places:
        result.append(max(height, result[-1] + gap if result else 0.0))
    limit = max(1.0, gap * (len(places) - 1))
    for i in reversed(range(len(result))):
        result[i] = min(result[i], limit)
        limit = result[i] - gap
    return result


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    width = min(width, len(values))
    padded = np.pad(values, (width // 2, width - 1 - width // 2), mode="edge")
    return np.convolve(padded, np.ones(width) / width, mode="valid")
