"""The numbers behind the pages as a JSON file, and back."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.evidence.statistics import Paired
from benchmarks.evidence.summary import RowSummary, SetSummary, Summary

# Of every number; the pages show fewer.
_DIGITS = 5


def save(summary: Summary, path: Path) -> None:
    """Write all of it, a line for each row of a set."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dumps(summary), encoding="utf-8")


def load(path: Path) -> Summary:
    """Read what `save` wrote."""
    content = json.loads(path.read_text(encoding="utf-8"))
    sets = {name: _set_of(found) for name, found in content["sets"].items()}
    return Summary(sets, content["versions"], _number(content["minutes"]))


def dumps(summary: Summary) -> str:
    """JSON, None where there is no number."""
    content = _plain(asdict(summary))
    sets = []
    for name, found in content.pop("sets").items():
        rows = found.pop("rows")
        lines = ",\n".join(f"   {json.dumps(row)}: {json.dumps(value)}" for row, value in rows.items())
        head = json.dumps(found)[:-1]
        sets.append(f'  {json.dumps(name)}: {head}, "rows": {{\n{lines}\n  }}}}')
    head, body = json.dumps(content)[:-1], ",\n".join(sets)
    return f'{head}, "sets": {{\n{body}\n}}}}\n'


def _set_of(content: dict[str, Any]) -> SetSummary:
    rows = {name: _row_of(row) for name, row in content.pop("rows").items()}
    modalities = tuple(content.pop("modalities"))
    return SetSummary(**content, modalities=modalities, rows=rows)


def _row_of(content: dict[str, Any]) -> RowSummary:
    difference = content.pop("difference")
    numbers = {name: _number(content.pop(name)) for name in ("tuned", "holm", "ece", "worst_group", "time")}
    return RowSummary(
        **numbers,
        kind=content["kind"],
        options=content["options"],
        seeds=tuple(content["seeds"]),
        metric=tuple(content["metric"]),
        difference=None
        if difference is None
        else Paired(**{name: _number(x) for name, x in difference.items()}),
        probes={m: tuple(values) for m, values in content["probes"].items()},
        recovery={m: (_number(a), _number(b), _number(c)) for m, (a, b, c) in content["recovery"].items()},
        missing={m: _number(value) for m, value in content["missing"].items()},
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    return value
