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

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def plot_rows(
    rows: Sequence[Row],
    path: str | PathLike[str] | None = None,
    *,
    quantities: Sequence[str] | None = None,
    smooth: int = 1,
) -> Any:
    """Plot recorded rows, with one panel for each quantity and one line for each modality.

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
    figure = Figure(figsize=(7, 2.2 * len(shown)), layout="constrained")
    for axes, quantity in zip(np.ravel(figure.subplots(len(shown), 1, sharex=True)), shown, strict=True):
        modalities = list(dict.fromkeys(row.modality for row in rows if row.quantity == quantity))
        lines = []
        for colour, modality in zip(_cycled(COLOURS, len(modalities)), modalities, strict=True):
            points = [(r.step, r.value) for r in rows if (r.quantity, r.modality) == (quantity, modality)]
            steps, values = np.array(points).T
            axes.plot(steps, values, color=colour, alpha=0.3 if smooth > 1 else 1.0, linewidth=1)
            lines += axes.plot(steps, _running_mean(values, smooth), color=colour)
        axes.set_ylabel(quantity, parse_math=False)
        axes.spines[["top", "right"]].set_visible(False)
        # Names are set after the legend is made, because matplotlib parses "$" in a label and hides one with "_".
        legend = axes.legend(lines, [str(i) for i in range(len(lines))], frameon=False, loc="upper right")
        for text, modality in zip(legend.get_texts(), modalities, strict=True):
            text.set_parse_math(False)
            text.set_text(modality)
    axes.set_xlabel("step")
    if path is not None:
        with replacing(path) as beside:
            figure.savefig(beside, dpi=150, format=Path(path).suffix[1:] or "png")
    return figure


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    width = min(width, len(values))
    padded = np.pad(values, (width // 2, width - 1 - width // 2), mode="edge")
    return np.convolve(padded, np.ones(width) / width, mode="valid")


def _cycled(colours: Sequence[str], count: int) -> list[str]:
    return [colours[i % len(colours)] for i in range(count)]
