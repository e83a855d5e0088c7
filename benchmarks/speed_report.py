"""What a part of the speed benchmark found: sections of timings, as Markdown and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.timing import Timing


@dataclass(frozen=True)
class Section:
    """Alternatives that were timed together.

    Attributes:
        title: stands above the table.
        timings: by row.
        reference: the row that ratios are to.
        against: rows by what they are compared with.
        notes: a last column, by row.
    """

    title: str
    timings: Mapping[str, Timing]
    reference: str
    against: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)

    def table(self) -> str:
        """Milliseconds, ratios with quartiles, how many times faster than what a row is compared with."""
        base = self.timings[self.reference]
        header = ["", "ms", f"x {self.reference}", "quartiles"]
        header += ["published / this"] if self.against else []
        header += [""] if self.notes else []
        lines = [f"**{self.title}**", "", _row(header), _row(["---", *["--:"] * (len(header) - 1)])]
        for name, timing in self.timings.items():
            low, high = timing.low / base.median, timing.high / base.median
            cells = [name, _milliseconds(timing), f"{timing.ratio_to(base):.2f}", f"{low:.2f} - {high:.2f}"]
            if self.against:
                other = self.against.get(name)
                cells.append("" if other is None else f"{self.timings[other].ratio_to(timing):.1f}")
            if self.notes:
                cells.append(self.notes.get(name, ""))
            lines.append(_row(cells))
        return "\n".join(lines)


@dataclass(frozen=True)
class Growth:
    """How something grows: a row for each value of what grows, columns of timings.

    Attributes:
        title: stands above the table.
        what: what grows.
        timings: by value, then by column.
        reference: the column that the others are also given as ratios to; None for none.
    """

    title: str
    what: str
    timings: Mapping[str, Mapping[str, Timing]]
    reference: str | None = None

    def table(self) -> str:
        """Milliseconds, and in brackets ratios."""
        columns = list(next(iter(self.timings.values())))
        lines = [
            f"**{self.title}** (ms)",
            "",
            _row([self.what, *columns]),
            _row(["---", *["--:"] * len(columns)]),
        ]
        for value, found in self.timings.items():
            base = found.get(self.reference) if self.reference else None
            lines.append(
                _row([value, *(_cell(found[c], base if c != self.reference else None) for c in columns)])
            )
        return "\n".join(lines)


Found = Sequence[Section | Growth]


def markdown(found: Found) -> str:
    """All tables."""
    return "\n\n".join(section.table() for section in found) + "\n"


def save(folder: Path, part: str, found: Found) -> None:
    """Tables and numbers of a part."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{part}.md").write_text(markdown(found), encoding="utf-8")
    text = json.dumps([asdict(section) for section in found], indent=1)
    (folder / f"{part}.json").write_text(f"{text}\n", encoding="utf-8")


def mark(part: str) -> str:
    """What stands around a part's tables in a page."""
    return f"<!-- speed: {part} -->"


def write_into(page: Path, part: str, text: str) -> None:
    """Replace what stands between the two marks of a part.

    Raises:
        ValueError: if the page does not have them.
    """
    sign = mark(part)
    before, _, rest = page.read_text(encoding="utf-8").partition(sign)
    _, found, after = rest.partition(sign)
    if not found:
        raise ValueError(f"{page} should hold two lines {sign!r}. Found fewer.")
    page.write_text(f"{before}{sign}\n{text}\n{sign}{after}", encoding="utf-8")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _milliseconds(timing: Timing) -> str:
    return f"{timing.median * 1e3:.3g}"


def _cell(timing: Timing, base: Timing | None) -> str:
    return _milliseconds(timing) + ("" if base is None else f" ({timing.ratio_to(base):.2f})")
