"""`report` and what it returns."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING

from balanceopt._files import check_path, replacing
from balanceopt._options import check_kind, check_number, names_of
from balanceopt.reporting._html import page
from balanceopt.reporting._rules import Finding, find
from balanceopt.reporting._run import Run
from balanceopt.reporting._tables import acts, described, encoders

if TYPE_CHECKING:
    from balanceopt.recording import Recorder

_WIDTH = 100
_MARKS = {"act": "[!]", "unclear": "[?]", "fine": "[ok]", "note": "[i]"}


def report(recorder: Recorder, *, alone: Mapping[str, float] | None = None) -> Report:
    """Say what a recorded run shows: who leads, what each encoder knows, what is wrong and what to try.

    Args:
        recorder: of a run, finished or not.
        alone: what encoders reach when they are trained alone, in the unit of the probes (accuracy from 0 to 1);
            with it a starved encoder is measured instead of presumed.

    Raises:
        TypeError: if `recorder` is not a `Recorder`, or `alone` not a mapping.
        ValueError: if a value of `alone` is not a number of at most 1, or no modality has its name.

    Example:
        >>> import balanceopt as bo
        >>> print(bo.report(bo.Recorder()))
        Report: nothing recorded
        <BLANKLINE>
        What was found
        <BLANKLINE>
        [?] Nothing is recorded yet.
            Why     The recorder has no rows: no training step was taken after it was made.
            Number  0 steps.
            Try     Make it before the training loop, `recorder = bo.Recorder(monitor)`, and keep it until
                    the end.
    """
    from balanceopt.recording import Recorder

    check_kind("`recorder`", recorder, Recorder, "a Recorder")
    check_kind("`alone`", alone, (Mapping, type(None)), "a mapping of modality names to numbers, or None")
    run = Run.of(recorder.rows(), alone)
    for name, value in run.alone.items():
        check_number(f"alone[{name!r}]", value, at_most=1)
    unknown = set(run.alone) - set(run.modalities)
    if unknown and run.modalities:
        raise ValueError(
            f"`alone` should name modalities, {names_of(run.modalities)}. Found {names_of(unknown)}."
        )
    return Report(run, find(run))


class Report:
    """What a recorded run shows; prints as text.

    Args:
        run: the recorded series.
        findings: the most urgent first.
    """

    def __init__(self, run: Run, findings: Sequence[Finding]) -> None:
        self._run = run
        self.findings = list(findings)

    def to_html(self, path: str | PathLike[str], *, title: str = "Training report") -> None:
        """Write one self-contained HTML page: findings, the table, charts; replaces an existing file atomically.

        The page loads nothing, needs no script, follows the reader's light or dark scheme and fits a phone.

        Args:
            path: of the file.
            title: of the page.

        Raises:
            TypeError: if `path` is not a path, or `title` not a string.
        """
        check_path(path)
        check_kind("`title`", title, str, "a string")
        text = page(self._run, self.findings, title)
        with replacing(path) as beside:
            beside.write_text(text, encoding="utf-8", errors="replace", newline="\n")

    def __str__(self) -> str:
        parts = [_heading(self._run), "What was found", *map(_finding, self.findings)]
        table = encoders(self._run)
        if table:
            parts += ["Each encoder, at the end of the run", _aligned(table), _legend(table, self._run)]
        changes = acts(self._run)
        if changes:
            parts += ["What methods did", "\n".join(_wrapped(f"- {text}", "  ") for text in changes)]
        return "\n\n".join(parts)

    def __repr__(self) -> str:
        return f"Report({self._run.steps} steps, findings: {[finding.rule for finding in self.findings]})"


def _heading(run: Run) -> str:
    if not run.steps:
        return "Report: nothing recorded"
    return f"Report: {run.steps:,} recorded steps, encoders {', '.join(run.modalities)}"


def _finding(finding: Finding) -> str:
    mark = _MARKS[finding.level].ljust(4)
    lines = [_wrapped(f"{mark}{finding.says}", "    ")]
    for label, text in (("Why", finding.why), ("Number", finding.number), ("Try", finding.advice)):
        lines.append(_wrapped(f"    {label:<8}{text}", " " * 12))
    if finding.sources:
        lines.append("    Read    " + ("\n" + " " * 12).join(source.where for source in finding.sources))
    return "\n".join(lines)


def _wrapped(text: str, indent: str) -> str:
    return textwrap.fill(
        text, _WIDTH, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "   ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _legend(table: Sequence[Sequence[str]], run: Run) -> str:
    named = {described(q).title.lower(): described(q).means for q in run.series}
    return "\n".join(_wrapped(f"- {title}: {named[title]}", "  ") for title in table[0][1:])
