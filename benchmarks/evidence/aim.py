"""Does a recipe reach what a recommended one should? Said with numbers, set by set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from benchmarks.evidence.summary import SetSummary
from benchmarks.tasks import CLASS

Sets = Mapping[str, SetSummary]

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


def of_classes(sets: Sets) -> dict[str, SetSummary]:
    """The sets that are measured by accuracy, of whose points the aim speaks."""
    return {name: found for name, found in sets.items() if found.metric == CLASS.metric}


def recipes(sets: Sets) -> list[str]:
    """Names of the recipes that were run on every set, the best on the data for choices first.

    Which one is recommended must not be chosen on the tests.
    """
    names = [name for name in _everywhere(sets) if _first(sets).rows[name].kind == "recipe"]
    return sorted(names, key=lambda name: -float(np.mean([f.rows[name].tuned for f in sets.values()])))


def rivals(sets: Sets) -> list[str]:
    """Names of the controls and methods that were run on every set."""
    return [name for name in _everywhere(sets) if _first(sets).rows[name].kind in ("control", "method")]


def mean_difference(sets: Sets, row: str) -> float:
    """Mean over the sets of the difference to joint training."""
    differences = [found.rows[row].difference for found in sets.values()]
    return float(np.mean([d.mean for d in differences if d is not None]))


def checks(sets: Sets, recipe: str) -> list[Check]:
    """The demands of the project's aim."""
    rows = {name: found.rows[recipe] for name, found in sets.items()}
    lows = {name: row.difference.low for name, row in rows.items() if row.difference is not None}
    better = [name for name, low in lows.items() if low > 0]
    shares = {
        name: rows[name].recovery[found.starved][0]
        for name, found in sets.items()
        if found.starved is not None and found.starved in rows[name].recovery
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
    means = {name: mean_difference(sets, name) for name in rivals(sets)}
    if means:
        best, own = max(means, key=lambda name: means[name]), mean_difference(sets, recipe)
        found = f"{own:+.2f}; the best of {len(means)} is {best}, {means[best]:+.2f}"
        made.append(Check("not below any control or method on average", own >= means[best], found))
    return made


def _everywhere(sets: Sets) -> list[str]:
    """Rows of every set."""
    if not sets:
        return []
    return [name for name in _first(sets).rows if all(name in found.rows for found in sets.values())]


def _first(sets: Sets) -> SetSummary:
    return next(iter(sets.values()))


def _numbers(values: Mapping[str, float], form: str) -> str:
    return ", ".join(f"{name} {form.format(value)}" for name, value in values.items())
