"""Pictures of a comparison: the views, the training over time, what each encoder knows."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from balanceopt.plotting import COLOURS, DASHES, label_ends
from benchmarks.data import MultimodalData
from benchmarks.experiment import Comparison
from benchmarks.extras import need
from benchmarks.report import dominant

_GREY = "#8C8C8C"
# Joint training and the three methods of the first picture: one that slows gradients, one that drops features, and the
# recommended one.
FIRST = ("joint", "OGM-GE", "OPM", "Re-learning + uni-modal losses")


def draw_all(comparison: Comparison, folder: Path) -> list[Path]:
    """Draw every picture into `folder`; returns the files."""
    figures = {
        "views.png": views(comparison.data),
        "training.png": training(comparison),
        "methods.png": methods(comparison),
        "encoders.png": encoders(comparison),
    }
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=150)
    return [folder / name for name in figures]


def views(data: MultimodalData) -> Any:
    """One test sample of each class, a row for each modality."""
    count = len(next(iter(data.examples.values())))
    figure = _figure(figsize=(1.0 * count + 0.3, 1.35 * len(data.modalities) + 0.2))
    rows = figure.subfigures(len(data.modalities), 1, squeeze=False)[:, 0]
    for row, (name, about) in zip(rows, data.about.items(), strict=True):
        row.suptitle(f"{name}: {about}", fontsize=10, x=0.01, ha="left")
        for axes, sample in zip(row.subplots(1, count), data.examples[name], strict=True):
            _show(axes, sample.numpy())
    return figure


def training(comparison: Comparison) -> Any:
    """The discrepancy ratio over time, of joint training and three methods."""
    ahead, names = dominant(comparison), shown(comparison)
    figure = _figure(figsize=(7, 4))
    axes = figure.subplots()
    lines = [_over_epochs(axes, comparison, name, ahead, i) for i, name in enumerate(names)]
    axes.set_title(f"How far the {ahead} encoder is ahead (ratio; 1 is balance)", loc="left", fontsize=11)
    _axes(axes)
    axes.set_xlabel("epoch")
    label_ends(axes, *_present(lines, names))
    return figure


def methods(comparison: Comparison) -> Any:
    """Small multiples: each method's ratio beside that of the first one, and how much it leaves of each gradient."""
    ahead = dominant(comparison)
    first, *others = comparison.methods
    columns = min(4, max(len(others), 1))
    height = max(1, -(-len(others) // columns))
    figure = _figure(figsize=(2.9 * columns, 2.6 * height))
    panels = figure.subplots(height, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, name in zip(panels, others, strict=False):
        _over_epochs(axes, comparison, first, ahead, len(COLOURS) - 1, dash=":")
        _over_epochs(axes, comparison, name, ahead, 0, dash="-")
        axes.set_title(_wrapped(name), loc="left", fontsize=10)
        _axes(axes)
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("epoch")
    for axes in panels[len(others) :]:
        axes.remove()
    figure.suptitle(
        f"How far the {ahead} encoder is ahead; dotted: {first} training", x=0.01, ha="left", fontsize=11
    )
    return figure


def encoders(comparison: Comparison) -> Any:
    """A column for each encoder and one for the whole model, a row for each way to train, a dot for the accuracy."""
    modalities = comparison.data.modalities
    ways = ["each alone", *comparison.methods]
    columns = {
        **{
            f"{m} encoder": [
                [o.probes[m] for o in outs] for outs in (comparison.alone[m], *comparison.methods.values())
            ]
            for m in modalities
        },
        "whole model": [[], *([o.accuracy for o in outs] for outs in comparison.methods.values())],
    }
    figure = _figure(figsize=(1.8 + 2.6 * len(columns), 1.1 + 0.34 * len(ways)))
    for axes, (title, values) in zip(
        figure.subplots(1, len(columns), sharey=True, squeeze=False)[0], columns.items(), strict=True
    ):
        places = [i for i, v in enumerate(values) if v]
        means = [float(np.mean(values[i])) for i in places]
        if comparison.seeds > 1:
            spread = [float(np.std(values[i], ddof=1)) for i in places]
            axes.errorbar(means, places, xerr=spread, fmt="none", ecolor=_GREY, elinewidth=1.2)
        low, high = min(means), max(means)
        # The first method is what the others are compared with.
        axes.axvline(means[places.index(1)], color=_GREY, linestyle=":", linewidth=1, zorder=0)
        axes.plot(means, places, "o", color=COLOURS[0], markersize=5)
        room = max(high - low, 1.0)
        for mean, place in zip(means, places, strict=True):
            axes.text(high + 0.75 * room, place, f"{mean:.1f}", va="center", ha="right", fontsize=9)
        axes.set_xlim(low - 0.15 * room, high + 0.8 * room)
        axes.set_yticks(range(len(ways)), ways)
        axes.set_ylim(len(ways) - 0.5, -0.5)
        axes.set_title(title, loc="left", fontsize=10)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", color="#E6E6E6", linewidth=0.6)
        axes.set_axisbelow(True)
    figure.suptitle(
        "Test accuracy in %: a linear probe on each encoder, and the whole model",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    return figure


def shown(comparison: Comparison) -> list[str]:
    """The few methods of the first picture: those of `FIRST` that were run, else the first four."""
    return [name for name in FIRST if name in comparison.methods] or list(comparison.methods)[:4]


def _over_epochs(
    axes: Any, comparison: Comparison, method: str, modality: str, index: int, *, dash: Any = None
) -> Any:
    """A line of the ratio, with a band of one standard deviation over seeds; None if nothing was recorded."""
    curves = [o.curves.get("ratio", {}).get(modality) for o in comparison.methods[method]]
    means = np.array([_epoch_means(curve, comparison.recipe.epochs) for curve in curves if curve is not None])
    if not means.size:
        return None
    x, y = np.arange(1, means.shape[1] + 1), means.mean(axis=0)
    colour, dash = COLOURS[index % len(COLOURS)], DASHES[index % len(DASHES)] if dash is None else dash
    if len(means) > 1:
        sd = means.std(axis=0, ddof=1)
        axes.fill_between(x, y - sd, y + sd, color=colour, alpha=0.12, linewidth=0)
    return axes.plot(x, y, color=colour, linestyle=dash, linewidth=1.8)[0]


def _axes(axes: Any) -> None:
    """A logarithmic ratio with plain numbers, and balance as a line."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(need("matplotlib.ticker").LogLocator(subs=(1, 1.5, 2, 3, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.axhline(1, color=_GREY, linewidth=0.8, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)


def _present(lines: list[Any], names: list[str]) -> tuple[list[Any], list[str]]:
    kept = [i for i, line in enumerate(lines) if line is not None]
    return [lines[i] for i in kept], [names[i] for i in kept]


def _wrapped(name: str) -> str:
    return "\n".join(textwrap.wrap(name, 22, break_on_hyphens=False))


def _epoch_means(curve: np.ndarray, epochs: int) -> np.ndarray:
    return np.array([part.mean() for part in np.array_split(curve, epochs) if part.size])


def _show(axes: Any, sample: np.ndarray) -> None:
    if sample.ndim < 3:
        axes.plot(sample, color=COLOURS[0], linewidth=0.8)
    elif sample.shape[-2] == sample.shape[-1]:
        axes.imshow(sample[0], cmap="gray_r")
    else:
        # A spectrum: low frequencies at the bottom.
        axes.imshow(sample[0], cmap="magma", origin="lower")
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_color("#CCCCCC")


def _figure(figsize: tuple[float, float]) -> Any:
    """Without pyplot: nothing global, no window, no display needed."""
    return need("matplotlib.figure").Figure(figsize=figsize, layout="constrained")
