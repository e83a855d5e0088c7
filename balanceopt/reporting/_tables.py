"""The report's table of encoders, and what methods did to them, as cells of text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from balanceopt.reporting._rules import percent
from balanceopt.reporting._run import Run


@dataclass(frozen=True)
class Quantity:
    """How a recorded quantity is shown.

    Args:
        title: for charts and tables, in a few words.
        means: one sentence for a reader who has not met it.
        share: whether values are shares of 1, shown in percent.
        log: whether charts have a logarithmic axis.
        balance: value at which modalities are even or nothing is changed, marked in charts.
    """

    title: str
    means: str
    share: bool = False
    log: bool = False
    balance: float | None = None

    def format(self, value: float) -> str:
        """Format a value, a dash for none."""
        if not math.isfinite(value):
            return "-"
        return percent(value) if self.share else f"{value:.3g}"


QUANTITIES: dict[str, Quantity] = {
    "score": Quantity(
        "Score", "The probability (or likelihood) that the encoder's part gives the right answer."
    ),
    "ratio": Quantity(
        "Ratio",
        "An encoder's score divided by the others' mean score: above 1 it leads.",
        log=True,
        balance=1.0,
    ),
    "agreement": Quantity(
        "Agrees with the model", "How often the encoder's own answer is the joint one.", share=True
    ),
    "probe": Quantity(
        "Knows (validation)",
        "What a linear classifier reads from the encoder's features, on validation samples.",
        share=True,
    ),
    "probe_train": Quantity("Knows (training)", "The same classifier on training samples.", share=True),
    "gradient_norm": Quantity(
        "Gradient", "Norm of the encoder's gradient: how much it is asked to change.", log=True
    ),
    "gradient_share": Quantity(
        "Share of the gradient", "The encoder's part of all encoders' gradient.", share=True
    ),
    "update_ratio": Quantity(
        "Update / weights", "Norm of a step's update divided by that of the weights.", log=True
    ),
    "feature_norm": Quantity("Feature norm", "Mean norm of the encoder's features."),
    "effective_rank": Quantity("Effective rank", "How many directions the encoder's features really use."),
    "coefficient": Quantity(
        "Gradient kept", "The factor a method put on the encoder's gradient: 1 is untouched.", balance=1.0
    ),
    "drop_probability": Quantity(
        "Features dropped", "Share of samples whose features a method drops.", share=True
    ),
    "keep_ratio": Quantity(
        "Units updated", "Share of the encoder's units that a masking method updates.", share=True
    ),
    "strength": Quantity(
        "Re-initialised", "How far a diagnosis moved the encoder back to its first weights.", share=True
    ),
}
# Columns of the table; those that were not recorded are left out.
COLUMNS = ("probe", "probe_train", "score", "ratio", "agreement", "gradient_share", "effective_rank")
METHODS = ("coefficient", "drop_probability", "keep_ratio", "strength")


def described(quantity: str) -> Quantity:
    """How a quantity is shown; those that the package does not know by their name."""
    return QUANTITIES.get(quantity, Quantity(quantity.replace("_", " "), f"Reported as {quantity}."))


def encoders(run: Run) -> list[list[str]]:
    """A header, then a row for each encoder with its latest values."""
    columns = [q for q in COLUMNS if q in run.series]
    rows = [["encoder", *(described(q).title.lower() for q in columns)]]
    rows += [[name, *(described(q).format(run.now(q, name)) for q in columns)] for name in run.modalities]
    return rows if columns else []


def acts(run: Run) -> list[str]:
    """What methods did, a sentence for each quantity and encoder that was changed."""
    result = []
    for quantity, (sentence, untouched, extreme) in _ACTS.items():
        for name, series in run.series.get(quantity, {}).items():
            values = series.finite.values
            if (values != untouched).any():
                result += [sentence.format(m=name, x=100 * values.mean(), extreme=100 * extreme(values))]
    for name, series in run.series.get("strength", {}).items():
        points = zip(series.finite.steps, series.finite.values, strict=True)
        when = [f"{int(step):,} ({percent(value)})" for step, value in points if value > 0]
        if when:
            result.append(f"{name}: moved back towards its first weights after step {', '.join(when)}.")
    return result


# Quantity -> sentence, value that changes nothing, and the extreme that is told.
_ACTS: dict[str, tuple[str, float, Callable[[np.ndarray], float]]] = {
    "coefficient": (
        "{m}: {x:.0f} % of its gradient kept on average, {extreme:.0f} % at the least.",
        1.0,
        np.min,
    ),
    "drop_probability": (
        "{m}: dropped in {x:.0f} % of the samples on average, {extreme:.0f} % at most.",
        0.0,
        np.max,
    ),
    "keep_ratio": (
        "{m}: {x:.0f} % of its units updated on average, {extreme:.0f} % at the least.",
        1.0,
        np.min,
    ),
}
