"""`python -m benchmarks.demo`: joint training and balanced training side by side on real data, in minutes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.command import positive
from benchmarks.data import load
from benchmarks.experiment import compare, runs
from benchmarks.extras import need
from benchmarks.look import watch
from benchmarks.methods import METHODS
from benchmarks.pictures import draw_all
from benchmarks.report import report, save_json
from benchmarks.training import RECIPES


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, print what was found, save it with the table and the pictures; print the report of plain training."""
    parser = _parser()
    options = parser.parse_args(arguments)
    # So small a model is slower on two threads than on one, and many times slower where other programs run.
    torch.set_num_threads(1)
    try:
        first = load(options.data, 0)
    except (FileNotFoundError, ImportError, ValueError) as error:
        parser.error(str(error))
    options.out.mkdir(parents=True, exist_ok=True)
    recipe = RECIPES[first.name]
    epochs = 2 if options.quick else options.epochs or recipe.epochs
    seeds = range(options.seeds)
    with need("tqdm").tqdm(total=(runs(first, METHODS, seeds) + 1) * epochs, unit=" epochs") as bar:

        def on_epoch(what: str) -> None:
            bar.set_description(f"training {what}", refresh=False)
            bar.update()

        comparison = compare(
            partial(load, options.data), METHODS, replace(recipe, epochs=epochs), seeds, on_epoch
        )
        watched = watch(first, replace(recipe, epochs=epochs), on_epoch=partial(on_epoch, "joint, watched"))
    text = report(comparison)
    print(f"\n{text}\n")
    (options.out / "table.txt").write_text(f"{text}\n", encoding="utf-8")
    save_json(comparison, options.out / "results.json")
    pictures = draw_all(comparison, options.out)
    page = options.out / "report.html"
    watched.report.to_html(page, title=f"Joint training on {first.name}")
    print("Files:", *pictures, options.out / "table.txt", options.out / "results.json", page, sep="\n  ")
    print(f"\nPlain joint training once more, now watched: `bo.report(recorder)` says\n\n{watched.report}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
    parser.add_argument(
        "--data", type=Path, help="av_digits.npz or mfeat.npz; scikit-learn's digits by default"
    )
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for table and pictures")
    parser.add_argument(
        "--seeds", type=positive, default=1, help="how many; with two or more the spread is shown"
    )
    parser.add_argument("--epochs", type=positive, help="instead of the recipe's own")
    parser.add_argument("--quick", action="store_true", help="two epochs, to see that it runs")
    return parser


if __name__ == "__main__":
    main()
