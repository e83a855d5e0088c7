"""`python -m benchmarks.amss`: AMSS and the scales of AMSS+ against joint training, on the same seeds."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

import balanceopt as bo
from benchmarks.command import compare_rows
from benchmarks.experiment import Comparison
from benchmarks.methods import METHODS, Build, Context, Method
from benchmarks.models import MultimodalClassifier
from benchmarks.report import mean_and_spread

OPTIONS: dict[str, dict[str, Any]] = {
    "AMSS": {},
    'AMSS+ `"unbiased"`': {"scale": "unbiased"},
    'AMSS+ `"official"`': {"scale": "official"},
    # The published weight multiplies the mean step by r n / 2, which is about 16 here.
    'AMSS+ `"official"`, lr / 16': {"scale": "official", "lr_factor": 1 / 16},
}


def masked(options: dict[str, Any], model: MultimodalClassifier, context: Context) -> Method:
    """SGD with masks, at the learning rate of joint training times `lr_factor`."""
    encoders = dict(model.encoders.items())
    lr = context.lr * options.get("lr_factor", 1.0)
    amss = {key: value for key, value in options.items() if key != "lr_factor"}
    monitor = bo.ModalityMonitor(model, encoders, head=model.head)
    groups = bo.modality_groups(model, encoders)
    optimizer = bo.MaskedSubnetworkSGD(
        groups, monitor, lr=lr, momentum=context.momentum, seed=context.seed, **amss
    )
    return Method(optimizer, bo.Recorder(optimizer), removes=(monitor.remove,))


ROWS: dict[str, Build] = {
    "joint": METHODS["joint"],
    **{name: partial(masked, options) for name, options in OPTIONS.items()},
}


def table(comparison: Comparison) -> str:
    """Markdown: accuracy, its paired difference to joint, probes of the encoders, keep ratios."""
    modalities = comparison.data.modalities
    joint = comparison.methods["joint"]
    header = ["", "accuracy", "against joint", *(f"{m} probe" for m in modalities)]
    header += [f"kept of {m}" for m in modalities]
    rows = [header, ["---"] * len(header)]
    alone = {m: mean_and_spread([o.probes[m] for o in comparison.alone[m]]) for m in modalities}
    rows.append(["each trained alone", "", "", *alone.values(), *[""] * len(modalities)])
    for name, outcomes in comparison.methods.items():
        difference = [o.accuracy - j.accuracy for o, j in zip(outcomes, joint, strict=True)]
        kept = [np.mean([o.mean("keep_ratio", m) for o in outcomes]) for m in modalities]
        rows.append(
            [
                name,
                mean_and_spread([o.accuracy for o in outcomes]),
                "" if name == "joint" else mean_and_spread(difference),
                *(mean_and_spread([o.probes[m] for o in outcomes]) for m in modalities),
                *("" if np.isnan(k) else f"{k:.2f}" for k in kept),
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train every row on every seed, then print and save."""
    compare_rows("amss", __doc__, ROWS, table, arguments, seeds=5)


if __name__ == "__main__":
    main()
