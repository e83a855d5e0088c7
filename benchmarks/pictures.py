"""Pictures of a comparison: the views, the training over time, what each encoder knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from balanceopt.plotting import COLOURS
from benchmarks.data import MultimodalData
from benchmarks.experiment import Comparison, Outcome
from benchmarks.extras import need
from benchmarks.report import dominant

_GREY = "#8C8C8C"


def draw_all(comparison: Comparison, folder: Path) -> list[Path]:
    """Draw every picture into `folder`; returns the files."""
    figures = {
        "views.png": views(comparison.data),
        "training.png": training(comparison),
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
    """The discrepancy ratio and the coefficient over time, means of an epoch's steps."""
    ahead = dominant(comparison)
    figure = _figure(figsize=(10, 3.8))
    left, right = figure.subplots(1, 2)
    _over_time(left, comparison, "ratio", [(name, name, ahead) for name in comparison.methods])
    left.set_title(f"How far the {ahead} encoder is ahead", loc="left", fontsize=11)
    left.set_ylabel("discrepancy ratio")
    _mark_one(left, "balance")
    changed = [name for name in comparison.methods if _ever_below_one(comparison.methods[name])]
    lines = [(f"{name}: {m}", name, m) for name in changed for m in comparison.data.modalities]
    _over_time(right, comparison, "coefficient", lines, colours=COLOURS[2:])
    right.set_ylim(-0.03, 1.1)
    right.set_title("How much of each encoder's gradient is left", loc="left", fontsize=11)
    right.set_ylabel("coefficient")
    _mark_one(right, "untouched")
    return figure


def encoders(comparison: Comparison) -> Any:
    """Bars: what each encoder knows, trained alone and inside the model, and what the whole model gets right."""
    modalities = comparison.data.modalities
    ways = {"trained alone": [[o.probes[m] for o in comparison.alone[m]] for m in modalities]}
    for name, outcomes in comparison.methods.items():
        ways[name] = [[o.probes[m] for o in outcomes] for m in modalities] + [[o.accuracy for o in outcomes]]
    labels = [*(f"{m} encoder" for m in modalities), "whole model"]
    figure = _figure(figsize=(2.0 + 0.8 * len(labels) * len(ways), 3.8))
    axes = figure.subplots()
    width = 0.8 / len(ways)
    for i, (way, values) in enumerate(ways.items()):
        places = np.arange(len(values)) + (i - (len(ways) - 1) / 2) * width
        means = [float(np.mean(v)) for v in values]
        spread = [float(np.std(v, ddof=1)) for v in values] if comparison.seeds > 1 else None
        colour = _GREY if i == 0 else COLOURS[(i - 1) % len(COLOURS)]
        bars = axes.bar(places, means, 0.92 * width, yerr=spread, label=way, color=colour,
                        error_kw={"ecolor": "#333333", "elinewidth": 1})  # fmt: skip
        axes.bar_label(bars, [f"{mean:.1f}" for mean in means], padding=2, fontsize=9)
    # The whole model has no bar for "trained alone": its label goes under the others.
    axes.set_xticks([*range(len(modalities)), len(modalities) + width / 2], labels)
    axes.set_ylabel("test accuracy in %")
    axes.set_ylim(0, 118)
    axes.set_yticks(range(0, 101, 20))
    axes.set_title("What each encoder knows (linear probe), and the whole model", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=len(ways), loc="upper left", fontsize=9)
    return figure


def _over_time(
    axes: Any,
    comparison: Comparison,
    quantity: str,
    lines: list[tuple[str, str, str]],
    colours: tuple[str, ...] = COLOURS,
) -> None:
    """A line for each (label, method, modality); a band of one standard deviation over seeds."""
    epochs = comparison.recipe.epochs
    for i, (label, method, modality) in enumerate(lines):
        curves = [o.curves.get(quantity, {}).get(modality) for o in comparison.methods[method]]
        means = np.array([_epoch_means(curve, epochs) for curve in curves if curve is not None])
        if not means.size:
            continue
        x, y = np.arange(1, means.shape[1] + 1), means.mean(axis=0)
        colour = colours[i % len(colours)]
        axes.plot(x, y, color=colour, label=label, linewidth=2, marker=".", markersize=5)
        if len(means) > 1:
            sd = means.std(axis=0, ddof=1)
            axes.fill_between(x, y - sd, y + sd, color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel("epoch")
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_lines():
        axes.legend(frameon=False, fontsize=9)


def _epoch_means(curve: np.ndarray, epochs: int) -> np.ndarray:
    return np.array([part.mean() for part in np.array_split(curve, epochs) if part.size])


def _ever_below_one(outcomes: list[Outcome]) -> bool:
    return any((curve < 1).any() for o in outcomes for curve in o.curves.get("coefficient", {}).values())


def _mark_one(axes: Any, label: str) -> None:
    axes.axhline(1, color=_GREY, linestyle="--", linewidth=1, zorder=0)
    axes.annotate(label, (1, 1), (-2, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
                  ha="right", fontsize=9, color=_GREY)  # fmt: skip


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
