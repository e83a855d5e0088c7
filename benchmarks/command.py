"""Command lines that several benchmarks share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.data import load
from benchmarks.experiment import Comparison, compare, runs
from benchmarks.extras import need
from benchmarks.methods import Build
from benchmarks.report import save_json
from benchmarks.training import RECIPES


def positive(text: str) -> int:
    """The type of an option that counts something."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"should be at least 1. Found {number}.")
    return number


def compare_rows(
    name: str,
    description: str | None,
    rows: Mapping[str, Build],
    table: Callable[[Comparison], str],
    arguments: Sequence[str] | None,
    *,
    seeds: int,
) -> None:
    """Train every row on every seed, then print and save: all of `python -m benchmarks.NAME`.

    Args:
        name: of the benchmark.
        description: what `--help` says of it.
        rows: to compare.
        table: Markdown of what was found.
        arguments: of the command line.
        seeds: how many by default.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument(
        "--data", type=Path, help="av_digits.npz or mfeat.npz; scikit-learn's digits by default"
    )
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--epochs", type=int, help="instead of the recipe's own")
    parser.add_argument("--out", type=Path, default=Path("out") / name, help="folder for table and numbers")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    first = load(options.data, 0)
    recipe = RECIPES[first.name]
    recipe = recipe if options.epochs is None else replace(recipe, epochs=options.epochs)
    chosen = range(options.seeds)
    with need("tqdm").tqdm(total=runs(first, rows, chosen) * recipe.epochs, unit=" epochs") as bar:

        def on_epoch(what: str) -> None:
            bar.set_description(f"training {what}", refresh=False)
            bar.update()

        comparison = compare(partial(load, options.data), rows, recipe, chosen, on_epoch)
    text = table(comparison)
    print(f"{first.name}\n\n{text}\n")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{first.name}.md").write_text(f"{text}\n", encoding="utf-8")
    save_json(comparison, options.out / f"{first.name}.json")
