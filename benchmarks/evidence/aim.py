"""Does a recipe reach what a recommended one should? Said with numbers, set by set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.evidence.rows import FIXED_DROPOUT, JOINT, UNIMODAL
from benchmarks.evidence.summary import SetSummary
from benchmarks.tasks import CLASS

# Points below joint training that the interval must not reach.
NOT_WORSE = -0.5
# Part of the starved encoder's gap that should be closed.
RECOVERED = 0.8
# Part of the sets on which it should be better.
BETTER_ON = 2 / 3


@dataclass(frozen=True)
class Check:
    """One demand on one recipe: whether it is met, and the numbers."""

    what: str
    met: bool
    found: str


def of_classes(sets: Sequence[SetSummary]) -> list[SetSummary]:
    """The sets that are measured by accuracy, of whose points the aim speaks."""
    return [found for found in sets if found.metric == CLASS.metric]


def recipes(sets: Sequence[SetSummary]) -> list[str]:
    """Names of the recipes that were run on every set, the best on the data for choices first.

    Which one is recommended must not be chosen on the tests.
    """
    everywhere = [
        name
        for name, summary in (sets[0].rows.items() if sets else ())
        if summary.row.kind == "recipe" and all(name in found.rows for found in sets)
    ]
    return sorted(everywhere, key=lambda name: -float(np.mean([f.rows[name].tuned for f in sets])))


def checks(sets: Sequence[SetSummary], recipe: str) -> list[Check]:
    """The demands of the project's aim."""
    rows = {found.name: found.rows[recipe] for found in sets}
    lows = {name: row.against[JOINT].low for name, row in rows.items()}
    better = [name for name, low in lows.items() if low > 0]
    shares = {
        found.name: rows[found.name].recovery[found.starved][0] for found in sets if found.starved is not None
    }
    made = [
        Check(
            f"not worse than joint training on any set (lower bounds above {NOT_WORSE})",
            min(lows.values()) > NOT_WORSE,
            _numbers(lows, "{:+.2f}"),
        ),
        Check(
            "better on at least two thirds of the sets (lower bounds above 0)",
            len(better) >= BETTER_ON * len(sets),
            f"{len(better)} of {len(sets)}",
        ),
        Check(
            f"closes at least {RECOVERED:.0%} of the gap of the starved encoder",
            bool(shares) and min(shares.values()) >= RECOVERED,
            _numbers(shares, "{:.0%}") or "no encoder is starved",
        ),
    ]
    return made + [_as_good_as(rows, other) for other in (FIXED_DROPOUT, UNIMODAL)]


def _as_good_as(rows: dict, other: str) -> Check:
    """On no set clearly worse, and over all sets not worse on average."""
    found = {name: row.against[other] for name, row in rows.items() if other in row.against}
    met = bool(found) and all(d.high >= 0 for d in found.values())
    met = met and float(np.mean([d.mean for d in found.values()])) >= 0
    numbers = _numbers({name: d.mean for name, d in found.items()}, "{:+.2f}")
    return Check(f"at least as good as {other} (means over all sets; clearly worse on none)", met, numbers)


def _numbers(values: dict[str, float], form: str) -> str:
    return ", ".join(f"{name} {form.format(value)}" for name, value in values.items())
