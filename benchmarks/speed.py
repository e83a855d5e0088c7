"""What balancing costs: `python -m benchmarks.speed [part ...]`, or `make bench`.

Alternatives are timed in turn in one process; ratios with their spread, JSON, and the tables of docs/performance.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import (
    speed_diagnosis,
    speed_growth,
    speed_import,
    speed_methods,
    speed_monitor,
    speed_step,
    speed_training,
)
from benchmarks.shapes import CASES
from benchmarks.speed_options import Options
from benchmarks.speed_report import Found, markdown, save, write_into
from benchmarks.speed_step import BASES

PARTS: dict[str, Callable[[Options], Found]] = {
    "step": speed_step.run,
    "training": speed_training.run,
    "methods": speed_methods.run,
    "monitor": speed_monitor.run,
    "relearning": speed_diagnosis.run,
    "growth": speed_growth.run,
    "import": speed_import.run,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure part by part, report each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument(
        "parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; all of them by default"
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES)[:2], help="for steps")
    parser.add_argument("--base", choices=BASES, default="fused", help="kind of SGD that the methods wrap")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="small sizes: only to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("out/speed"))
    parser.add_argument("--page", type=Path, help="write the tables into this page, between their marks")
    given = parser.parse_args(arguments)
    unknown = set(given.parts) - set(PARTS)
    if unknown:
        parser.error(f"parts should be of {', '.join(PARTS)}. Found {', '.join(sorted(unknown))}")
    device = torch.device(given.device)
    options = Options(device, given.repetitions, given.base, tuple(given.cases), given.batch, given.quick)
    for part in given.parts or PARTS:
        found = PARTS[part](options)
        save(given.out, part, found)
        print(markdown(found), flush=True)
        if given.page is not None:
            write_into(given.page, part, markdown(found))


if __name__ == "__main__":
    main()
