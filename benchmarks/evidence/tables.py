"""Markdown: every row in every set, two tables a set, the recipes against the aim, and where they go in a page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.evidence.aim import Check, Sets, of_classes
from benchmarks.evidence.rows import JOINT
from benchmarks.evidence.statistics import Paired
from benchmarks.evidence.summary import RowSummary, SetSummary, Summary
from benchmarks.report import mean_and_spread

MARK = "<!-- {} of benchmarks.accuracy -->"

_KINDS = {
    "reference": "other optimizer",
    "control": "controls, tuned",
    "method": "methods, tuned",
    "recipe": "recipes, one setting for all sets",
}


def overview(sets: Sets) -> str:
    """Each row in a line: mean and worst difference to joint training, and what it gives the starved encoders."""
    judged = of_classes(sets)
    header = ["", f"mean of {len(judged)} sets", "worst set", "clearly better, worse", "gap closed", "time"]
    lines = [header, ["---"] * len(header)]
    for kind, names in _by_kind(sets):
        lines.append([f"**{_KINDS[kind]}**", *[""] * (len(header) - 1)])
        lines += [_overview_of(name, sets, judged) for name in names]
    return markdown(lines)


def short_table(sets: Sets, names: Sequence[str]) -> str:
    """Some rows of the overview, without their time."""
    judged = of_classes(sets)
    header = ["", f"mean of {len(judged)} sets", "worst set", "clearly better, worse", "gap closed"]
    rows = [_overview_of(name, sets, judged)[:-1] for name in names]
    return markdown([header, ["---"] * len(header), *rows])


def differences_table(sets: Sets) -> str:
    """Each row's difference to joint training in each set, with its interval."""
    header = ["", *sets]
    lines = [header, ["---"] * len(header)]
    for _, names in _by_kind(sets):
        for name in names:
            rows = [found.rows.get(name) for found in sets.values()]
            lines.append([name, *(_with_interval(row.difference) if row else "" for row in rows)])
    return markdown(lines)


def cost_text(summary: Summary) -> str:
    """How many runs, how long, with which versions."""
    sets = summary.sets.values()
    clock = "" if math.isnan(summary.minutes) else f", {summary.minutes:.0f} minutes on the clock"
    return (
        f"{sum(found.runs for found in sets):,} trainings on {len(sets)} sets, "
        f"{sum(found.cpu_minutes for found in sets):.0f} minutes of processor time with all measuring{clock}. "
        f"torch {summary.versions['torch']}, balanceopt {summary.versions['balanceopt']}."
    )


def _by_kind(sets: Sets) -> Iterator[tuple[str, list[str]]]:
    """Kind and names of the rows that train all modalities, without joint training itself."""
    kinds = {name: row.kind for found in sets.values() for name, row in found.rows.items()}
    for kind in _KINDS:
        names = [name for name, k in kinds.items() if k == kind and name != JOINT]
        if names:
            yield kind, names


def _overview_of(name: str, sets: Sets, judged: Sets) -> list[str]:
    rows = {key: found.rows[name] for key, found in sets.items() if name in found.rows}
    differences = {key: row.difference for key, row in rows.items() if row.difference is not None}
    of_accuracy = {key: d for key, d in differences.items() if key in judged}
    shares = [
        100 * row.recovery[starved][0]
        for key, row in rows.items()
        if (starved := sets[key].starved) is not None and starved in row.recovery
    ]
    shares = [share for share in shares if not math.isnan(share)]
    if not of_accuracy:
        return [name, *[""] * 5]
    worst = min(of_accuracy, key=lambda key: of_accuracy[key].mean)
    average = f"{mean(d.mean for d in of_accuracy.values()):+.1f}"
    return [
        name,
        average if len(of_accuracy) == len(judged) else f"{average} ({len(of_accuracy)} sets)",
        f"{of_accuracy[worst].mean:+.1f} {worst}",
        f"{sum(d.low > 0 for d in differences.values())}, {sum(d.high < 0 for d in differences.values())}"
        f" of {len(differences)}",
        f"{mean(shares):.0f} % ({min(shares):.0f} to {max(shares):.0f})" if shares else "",
        number(mean(row.time for row in rows.values()), 1),
    ]


def _with_interval(difference: Paired | None) -> str:
    found = _difference(difference)
    return f"{found[0]} ({found[1]})" if difference is not None else ""


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


def section(found: SetSummary, picture: str) -> str:
    """All of a set."""
    seeds = max(len(row.seeds) for row in found.rows.values())
    starved = f"The starved encoder is {found.starved}." if found.starved else "No encoder is starved."
    return "\n\n".join(
        [
            f"### {found.title}",
            f"{seeds} seeds, {found.runs} trainings. {starved}",
            f"![Difference to joint training]({picture})",
            main_table(found),
            robustness_table(found),
            "<details markdown><summary>Options that were chosen</summary>",
            options_table(found),
            "</details>",
        ]
    )


def put(page: Path, blocks: Mapping[str, str], *, marked_only: bool = False) -> None:
    """Replace what is between the marks of each block's name in `page`.

    Args:
        page: Markdown.
        blocks: name -> text.
        marked_only: leave out the blocks without marks in the page, else they are put at its end.
    """
    content = page.read_text(encoding="utf-8") if page.is_file() else ""
    for name, text in blocks.items():
        mark = MARK.format(name)
        if content.count(mark) != 2:
            if marked_only:
                continue
            content = f"{content}\n{mark}\n{mark}\n"
        before, _, after = content.split(mark)
        content = f"{before}{marked(name, text)}{after}"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(content, encoding="utf-8")


def marked(name: str, text: str) -> str:
    """A block as it stands in a page."""
    mark = MARK.format(name)
    return f"{mark}\n\n{text}\n\n{mark}"


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
