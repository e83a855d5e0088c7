"""What is written when runs are done, or as far as they are: JSON, tables in a page, pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.evidence.aim import Check, checks, of_classes, recipes
from benchmarks.evidence.figures import draw_recoveries, draw_sets
from benchmarks.evidence.sets import SETS
from benchmarks.evidence.summary import SetSummary
from benchmarks.evidence.tables import aim_table, holds, put, section


def write(sets: Sequence[SetSummary], page: Path, numbers: Path) -> list[Path]:
    """Tables into `page`, pictures beside it in images/, everything as JSON into `numbers`.

    A page that holds all sets keeps those that were not run now, and what is said of all sets together.
    """
    images = page.parent / "images"
    pictures = draw_sets(sets, images)
    judged = of_classes(sets)
    aims = {name: checks(judged, name) for name in recipes(judged)}
    if {found.name for found in sets} == set(SETS) or not holds(page, "aim"):
        pictures["recovery"] = draw_recoveries(sets, images)
        put(page, "aim", aim_table(aims) if aims else "No recipe was run on every set.")
        put(page, "probes", f"![What the starved encoder gets back](images/{pictures['recovery'].name})")
    for found in sets:
        put(page, found.name, section(found, f"images/{pictures[found.name].name}"))
    numbers.parent.mkdir(parents=True, exist_ok=True)
    numbers.write_text(json.dumps(content(sets, aims), indent=1) + "\n", encoding="utf-8")
    return [page, numbers, *pictures.values()]


def content(sets: Sequence[SetSummary], aims: dict[str, list[Check]]) -> dict[str, Any]:
    """All of it as JSON can hold it: None where there is no number."""
    summaries = [{**asdict(found), "modalities": list(found.modalities)} for found in sets]
    return {
        "sets": _plain(summaries),
        "aim": {name: _plain([asdict(c) for c in made]) for name, made in aims.items()},
    }


def aim_text(sets: Sequence[SetSummary]) -> str:
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


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
