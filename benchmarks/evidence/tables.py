"""Markdown: two tables a set, the recipes against the aim, and where they go in a page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence.aim import Check
from benchmarks.evidence.statistics import Paired
from benchmarks.evidence.summary import RowSummary, SetSummary
from benchmarks.report import mean_and_spread

MARK = "<!-- {} of benchmarks.accuracy -->"


def main_table(found: SetSummary) -> str:
    """The metric, its difference to the reference, and what each encoder knows."""
    header = ["", found.metric, "difference", "95 % interval", "p (Holm)", "d_z"]
    header += [f"{m} probe" for m in found.modalities] + ["gap closed", "time"]
    lines = [header, ["---"] * len(header)]
    for name, row in found.rows.items():
        probes = [mean_and_spread(row.probes[m]) if m in row.probes else "" for m in found.modalities]
        lines.append(
            [
                name,
                mean_and_spread(row.metric),
                *_difference(row.difference),
                "" if math.isnan(row.holm) else p_value(row.holm),
                "" if row.difference is None else number(row.difference.effect, 1),
                *probes,
                _closed(found, row),
                number(row.time, 1),
            ]
        )
    return markdown(lines)


def robustness_table(found: SetSummary) -> str:
    """Calibration, the worst person, and a modality that is missing."""
    calibrated = any(not math.isnan(row.ece) for row in found.rows.values())
    header = ["", "calibration error"] if calibrated else [""]
    persons = any(not math.isnan(row.worst_group) for row in found.rows.values())
    header += ["worst person"] if persons else []
    header += [f"without {m}" for m in found.modalities]
    lines = [header, ["---"] * len(header)]
    for name, row in found.rows.items():
        cells = [name] + ([number(row.ece, 1)] if calibrated else [])
        cells += [number(row.worst_group, 1)] if persons else []
        lines.append(cells + [number(row.missing.get(m, math.nan), 1) for m in found.modalities])
    return markdown(lines)


def options_table(found: SetSummary) -> str:
    """What was chosen for each row, and the metric on the data that are kept for choices."""
    lines = [["", "options", f"{found.metric} where it was chosen"], ["---"] * 3]
    lines += [[name, options_text(row.options), number(row.tuned, 1)] for name, row in found.rows.items()]
    return markdown(lines)


def aim_table(checks: Mapping[str, Sequence[Check]]) -> str:
    """Each recipe against each demand."""
    lines = [["recipe", "demand", "met", "found"], ["---"] * 4]
    for name, made in checks.items():
        lines += [
            [name.removeprefix("recipe: "), c.what, "yes" if c.met else "**no**", c.found] for c in made
        ]
    return markdown(lines)


def section(found: SetSummary, picture: str | None) -> str:
    """All of a set."""
    seeds = max(len(row.seeds) for row in found.rows.values())
    starved = f"The starved encoder is {found.starved}." if found.starved else "No encoder is starved."
    return "\n\n".join(
        [
            f"### {found.title}",
            f"{seeds} seeds. {starved}",
            *([f"![Difference to joint training]({picture})"] if picture else []),
            main_table(found),
            robustness_table(found),
            "<details markdown><summary>Options that were chosen</summary>",
            options_table(found),
            "</details>",
        ]
    )


def holds(page: Path, name: str) -> bool:
    """Whether `page` has the marks `name`."""
    return page.is_file() and page.read_text(encoding="utf-8").count(MARK.format(name)) == 2


def put(page: Path, name: str, text: str) -> None:
    """Replace what is between the marks `name` in `page`; a page without them gets them at its end."""
    mark = MARK.format(name)
    content = page.read_text(encoding="utf-8") if page.is_file() else ""
    if not holds(page, name):
        content = f"{content}\n{mark}\n{mark}\n"
    before, _, after = content.split(mark)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(f"{before}{mark}\n\n{text}\n\n{mark}{after}", encoding="utf-8")


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def options_text(options: Mapping[str, Any]) -> str:
    """`name value` of each."""
    return ", ".join(
        f"{name.replace('_', ' ')} {value:.3g}"
        if isinstance(value, float)
        else f"{name.replace('_', ' ')} {value}"
        for name, value in options.items()
    )


def number(value: float, digits: int) -> str:
    """Empty for NaN."""
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def p_value(p: float) -> str:
    """Two digits, and no zero."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def _difference(difference: Paired | None) -> list[str]:
    if difference is None:
        return ["", ""]
    clear = difference.low > 0 or difference.high < 0
    mean = f"{difference.mean:+.1f}"
    return [f"**{mean}**" if clear else mean, f"{difference.low:+.1f} to {difference.high:+.1f}"]


def _closed(found: SetSummary, row: RowSummary) -> str:
    """Share of the starved encoder's gap, with its interval."""
    if found.starved is None or found.starved not in row.recovery:
        return ""
    share, low, high = (100 * value for value in row.recovery[found.starved])
    return "" if math.isnan(share) else f"{share:.0f} % ({low:.0f} to {high:.0f})"
