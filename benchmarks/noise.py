"""`python -m benchmarks.noise`: OGM-GE with exact noise and with noise from the pool, on the same seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

import balanceopt as bo
from benchmarks.command import compare_rows
from benchmarks.experiment import Comparison
from benchmarks.extras import need
from benchmarks.methods import METHODS, Build, Context, Method
from benchmarks.models import MultimodalClassifier
from benchmarks.report import mean_and_spread

EXACT, POOL = "OGM-GE, exact", "OGM-GE, pool"
# OGM-GE's strength is the demo's; without noise, how much the noise does at all.
OPTIONS: dict[str, dict[str, Any]] = {
    EXACT: {"alpha": 0.8},
    POOL: {"alpha": 0.8, "noise": "pool"},
    "OGM, no noise": {"alpha": 0.8, "noise": False},
}


def modulated(options: dict[str, Any], model: MultimodalClassifier, context: Context) -> Method:
    """SGD with OGM."""
    encoders = dict(model.encoders.items())
    monitor = bo.ModalityMonitor(model, encoders, head=model.head)
    groups = bo.modality_groups(model, encoders)
    base = torch.optim.SGD(groups, lr=context.lr, momentum=context.momentum)
    optimizer = bo.ModulatedOptimizer(base, monitor, bo.OGM(**options), seed=context.seed)
    return Method(optimizer, bo.Recorder(optimizer), removes=(monitor.remove,))


ROWS: dict[str, Build] = {
    "joint": METHODS["joint"],
    **{name: partial(modulated, options) for name, options in OPTIONS.items()},
}


def table(comparison: Comparison) -> str:
    """Markdown: accuracy, its paired difference to exact noise with a 95 % interval, probes of the encoders."""
    modalities = comparison.data.modalities
    exact = comparison.methods[EXACT]
    header = ["", "accuracy", "against exact", "95 % interval", *(f"{m} probe" for m in modalities)]
    rows = [header, ["---"] * len(header)]
    for name, outcomes in comparison.methods.items():
        difference = [o.accuracy - e.accuracy for o, e in zip(outcomes, exact, strict=True)]
        rows.append(
            [
                name,
                mean_and_spread([o.accuracy for o in outcomes]),
                *(["", ""] if name == EXACT else [mean_and_spread(difference), interval(difference)]),
                *(mean_and_spread([o.probes[m] for o in outcomes]) for m in modalities),
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def interval(values: Sequence[float]) -> str:
    """The 95 % interval of the mean, by Student's t; a dash for a single value."""
    if len(values) < 2:
        return "-"
    t = need("scipy.stats").t.ppf(0.975, len(values) - 1)
    mean, half = np.mean(values), t * np.std(values, ddof=1) / math.sqrt(len(values))
    return f"{mean - half:.2f} to {mean + half:.2f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Train every row on every seed, then print and save."""
    compare_rows("noise", __doc__, ROWS, table, arguments, seeds=10)


if __name__ == "__main__":
    main()
