"""`python -m benchmarks.accuracy`: every method on real multimodal data, against joint training, with statistics.

Runs are kept one by one and never made twice: break it off whenever you like and give the same command again.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.command import positive
from benchmarks.evidence import paper
from benchmarks.evidence.configs import CONFIGS
from benchmarks.evidence.grid import Grid
from benchmarks.evidence.pool import run_all
from benchmarks.evidence.progress import Progress
from benchmarks.evidence.report import aim_text, write, write_pages
from benchmarks.evidence.results import Results
from benchmarks.evidence.rows import rows_of, with_needs
from benchmarks.evidence.sets import SETS
from benchmarks.evidence.summary import summarise

_DATA = Path("../shared/data")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then write what is there."""
    parser = _parser()
    options = parser.parse_args(arguments)
    page = options.page or options.out / "evidence.md"
    numbers = page.with_suffix(".json")
    if options.config:
        _reproduce(parser, options)
        return
    if options.from_json:
        _print(write_pages(numbers, page, options.also))
        return
    folder = options.data or (_DATA if _DATA.is_dir() else None)
    try:
        grid = _grid(options, folder)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    results = Results(options.out / "results.jsonl")
    if not options.no_run:
        _run(grid, results, folder, options.jobs, 60 * options.budget)
    summary = summarise(grid, results)
    if not summary.sets:
        print("Nothing was tested yet.")
        return
    print(aim_text(summary.sets))
    _print(write(summary, page, numbers, options.also))


def _print(paths: Sequence[Path]) -> None:
    for path in paths:
        print(path)


def _reproduce(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """A paper's setting on the public original."""
    if options.data is None:
        parser.error("--config needs --data, the folder of the public original.")
    try:
        text = paper.reproduce(
            options.config,
            options.data,
            Results(options.out / f"{options.config}.jsonl"),
            seeds=range(options.seeds or 3),
            rows=options.rows,
            device=options.device,
            workers=options.jobs,
            epochs=options.epochs,
        )
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    print(text)
    (options.out / f"{options.config}.md").write_text(f"{text}\n", encoding="utf-8")


def _grid(options: argparse.Namespace, folder: Path | None) -> Grid:
    """The sets and rows that were asked for.

    Raises:
        FileNotFoundError: if a set that was asked for by name needs a file that is not there.
        ValueError: for a row that no set has.
    """
    lacking = {name: what for name, found in SETS.items() if (what := found.lacks(folder)) is not None}
    there = [name for name in SETS if name not in lacking]
    if options.sets is None and lacking:
        what = ", ".join(sorted(set(lacking.values())))
        print(f"Without {what} (files in --data, packages of the extra evidence): only {', '.join(there)}.")
    names = options.sets or there
    rows = {}
    for name in names:
        SETS[name].path(folder)
        made = rows_of(SETS[name])
        wanted = set(options.rows or made)
        if unknown := wanted - set(made) - {row for found in SETS.values() for row in rows_of(found)}:
            raise ValueError(f"`--rows` should be among {list(made)}. Found {sorted(unknown)}.")
        rows[name] = with_needs(made, wanted & set(made))
    return Grid(rows, options.seeds, folder)


def _run(grid: Grid, results: Results, folder: Path | None, workers: int, seconds: float) -> None:
    until = time.monotonic() + seconds
    progress = Progress(sum(count for *_, count in grid.remaining(results)), results, workers)
    try:
        # What has been chosen decides what can be run next.
        while (jobs := grid.ready(results)) and time.monotonic() < until:
            progress.at(grid.remaining(results))
            for job, result in run_all(jobs, folder, workers, until):
                results.add(job, result)
                progress.step(results[job])
    finally:
        progress.close()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data", type=Path, help=f"folder with av_digits.npz and mfeat.npz ({_DATA} if it is there)"
    )
    parser.add_argument(
        "--sets", nargs="+", choices=SETS, metavar="SET", help=f"of {', '.join(SETS)}; all by default"
    )
    parser.add_argument(
        "--rows", nargs="+", metavar="ROW", help="by name, with all that they need; all by default"
    )
    parser.add_argument(
        "--seeds", type=positive, help="tests of each row, paired by seed: 8 or 10, or 3 with --config"
    )
    parser.add_argument("--budget", type=float, default=math.inf, help="minutes after which no run begins")
    parser.add_argument("--jobs", type=positive, default=2, help="processes, of one thread each")
    parser.add_argument("--out", type=Path, default=Path("out/evidence"), help="folder of results.jsonl")
    parser.add_argument(
        "--page",
        type=Path,
        help="Markdown page that gets the tables, with the numbers as .json beside; OUT/evidence.md by default",
    )
    parser.add_argument(
        "--also", type=Path, nargs="+", default=[], help="pages that get the tables that they have marks for"
    )
    parser.add_argument(
        "--from-json", action="store_true", help="make the page of the numbers beside it, and run nothing"
    )
    parser.add_argument("--no-run", action="store_true", help="only write what the runs so far say")
    papers = parser.add_argument_group("a paper's setting, on its public data set")
    papers.add_argument("--config", choices=CONFIGS, metavar="NAME", help=f"one of {', '.join(CONFIGS)}")
    papers.add_argument("--device", default="cpu", help="cuda, cuda:1, mps, ...; for --config")
    papers.add_argument("--epochs", type=positive, help="instead of the paper's own; for --config")
    return parser


if __name__ == "__main__":
    main()
