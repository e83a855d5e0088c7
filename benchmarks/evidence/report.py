"""What is written when runs are done, or as far as they are: numbers as JSON, and from it a page and its pictures."""

from __future__ import annotations

from pathlib import Path

from benchmarks.evidence.aim import Sets, checks, of_classes, recipes
from benchmarks.evidence.figures import draw_recoveries, draw_sets, picture_of
from benchmarks.evidence.stored import load, save
from benchmarks.evidence.summary import Summary
from benchmarks.evidence.tables import aim_table, cost_text, differences_table, overview, put, section


def write(summary: Summary, page: Path, numbers: Path) -> list[Path]:
    """Put the numbers into `numbers`, which keeps sets that were not run now, and make page and pictures of it."""
    save(summary.keeping(load(numbers)) if numbers.is_file() else summary, numbers)
    return [numbers, *write_page(numbers, page)]


def write_page(numbers: Path, page: Path) -> list[Path]:
    """Put tables into `page` and pictures beside it in images/, by what `numbers` says."""
    summary = load(numbers)
    put(page, blocks(summary))
    images = page.parent / "images"
    return [page, *draw_sets(summary.sets, images), draw_recoveries(summary.sets, images)]


def blocks(summary: Summary) -> dict[str, str]:
    """All that is generated in a page, by the name in its marks."""
    sets = summary.sets
    judged = of_classes(sets)
    aims = {name: checks(judged, name) for name in recipes(judged)}
    return {
        "overview": overview(sets),
        "differences": differences_table(sets),
        "cost": cost_text(summary),
        "aim": aim_table(aims) if aims else "No recipe was run on every set.",
        "probes": f"![What the starved encoder gets back](images/{picture_of('recovery')})",
        **{name: section(found, f"images/{picture_of(name)}") for name, found in sets.items()},
    }


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
