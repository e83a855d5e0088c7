"""What is written when runs are done, or as far as they are: numbers as JSON, and from it a page and its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.evidence.aim import Sets, checks, mean_difference, of_classes, recipes, rivals
from benchmarks.evidence.figures import draw_recoveries, draw_sets, picture_of
from benchmarks.evidence.stored import load, save
from benchmarks.evidence.summary import Summary
from benchmarks.evidence.tables import (
    aim_table,
    cost_text,
    differences_table,
    overview,
    put,
    section,
    short_table,
)

_RIVALS_SHOWN = 5


def write(summary: Summary, page: Path, numbers: Path, others: Sequence[Path] = ()) -> list[Path]:
    """Put the numbers into `numbers`, which keeps sets that were not run now, and make pages and pictures of it."""
    save(summary.keeping(load(numbers)) if numbers.is_file() else summary, numbers)
    return [numbers, *write_pages(numbers, page, others)]


def write_pages(numbers: Path, page: Path, others: Sequence[Path] = ()) -> list[Path]:
    """Make pages and pictures by what `numbers` says.

    Args:
        numbers: what `write` wrote.
        page: gets all tables, and pictures beside it in images/.
        others: pages that get the tables that they have marks for.
    """
    summary = load(numbers)
    made = blocks(summary)
    put(page, made)
    for other in others:
        put(other, made, marked_only=True)
    images = page.parent / "images"
    return [page, *others, *draw_sets(summary.sets, images), draw_recoveries(summary.sets, images)]


def blocks(summary: Summary) -> dict[str, str]:
    """All that is generated in a page, by the name in its marks."""
    sets = summary.sets
    judged = of_classes(sets)
    aims = {name: checks(judged, name) for name in recipes(judged)}
    return {
        "overview": overview(sets),
        "short": short_table(sets, _best(judged)),
        "differences": differences_table(sets),
        "cost": cost_text(summary),
        "aim": aim_table(aims) if aims else "No recipe was run on every set.",
        "probes": f"![What the starved encoder gets back](images/{picture_of('recovery')})",
        **{name: section(found, f"images/{picture_of(name)}") for name, found in sets.items()},
    }


def _best(sets: Sets) -> list[str]:
    """The recipe that is best where it was chosen, and the controls and methods that come next to it on average."""
    others = sorted(rivals(sets), key=lambda name: -mean_difference(sets, name))
    return [*recipes(sets)[:1], *others[:_RIVALS_SHOWN]]


def aim_text(sets: Sets) -> str:
    """The aim, for a terminal."""
    sets = of_classes(sets)
    names = recipes(sets)
    if not names:
        return "No recipe was run on every set: nothing to say about the aim."
    lines = [f"Recipes, the best on the data for choices first; recommended: {names[0]}"]
    for name in names:
        lines.append(name)
        lines += [f"  [{'x' if c.met else ' '}] {c.what}: {c.found}" for c in checks(sets, name)]
    return "\n".join(lines)
