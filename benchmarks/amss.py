"""`python -m benchmarks.amss`: AMSS and the scales of AMSS+ against joint training, on the same seeds."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import balanceopt as bo
from benchmarks.data import load
from benchmarks.experiment import Comparison, compare, runs
from benchmarks.extras import need
from benchmarks.methods import METHODS, Build, Context, Method
from benchmarks.models import MultimodalClassifier
from benchmarks.report import mean_and_spread, save_json
from benchmarks.training import RECIPES

OPTIONS: dict[str, dict[str, Any]] = {
    "AMSS": {},
    "AMSS, masked units frozen": {"masked": "frozen"},
    "AMSS, head masked too": {"mask_head": True},
    'AMSS+ `"unbiased"`': {"scale": "unbiased"},
    'AMSS+ `"ratio"`': {"scale": "ratio"},
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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.amss", description=__doc__)
    parser.add_argument(
        "--data", type=Path, help="av_digits.npz or mfeat.npz; scikit-learn's digits by default"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, help="instead of the recipe's own")
    parser.add_argument("--out", type=Path, default=Path("out/amss"), help="folder for table and numbers")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    first = load(options.data, 0)
    recipe = RECIPES[first.name]
    recipe = recipe if options.epochs is None else replace(recipe, epochs=options.epochs)
    seeds = range(options.seeds)
    with need("tqdm").tqdm(total=runs(first, ROWS, seeds) * recipe.epochs, unit=" epochs") as bar:

        def on_epoch(what: str) -> None:
            bar.set_description(f"training {what}", refresh=False)
            bar.update()

        comparison = compare(partial(load, options.data), ROWS, recipe, seeds, on_epoch)
    text = table(comparison)
    print(f"{first.name}\n\n{text}\n")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{first.name}.md").write_text(f"{text}\n", encoding="utf-8")
    save_json(comparison, options.out / f"{first.name}.json")


if __name__ == "__main__":
    main()
