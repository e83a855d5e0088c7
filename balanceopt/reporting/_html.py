"""The report as one HTML page that loads nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from balanceopt.reporting._chart import chart, escaped
from balanceopt.reporting._rules import Finding, Source
from balanceopt.reporting._run import Run
from balanceopt.reporting._tables import METHODS, acts, described, encoders

_LEVELS = {"act": "To do", "unclear": "Unclear", "fine": "Fine", "note": "To know"}
# Charts that are shown at once; others are folded.
_MAIN = ("probe", "probe_train", "ratio", "score", "gradient_norm")

# Every colour has a contrast of at least 4.5 with the background of its scheme.
_STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --card: #f5f6f8; --text: #1b1f24; --soft: #57606a; --rule: #d0d7de;
  --c0: #005f99; --c1: #b34700; --c2: #00694a; --c3: #96357a; --c4: #735600; --c5: #4d4d4d;
  --act: #a8200d; --unclear: #7a5200; --fine: #116329; --note: #0550ae; }
@media (prefers-color-scheme: dark) { :root { --back: #14171b; --card: #1e2329; --text: #e8ebee; --soft: #a9b1ba;
  --rule: #3a424b; --c0: #62b9ee; --c1: #f79a5c; --c2: #3fcf9f; --c3: #e7a2cc; --c4: #efc94c; --c5: #c9c9c9;
  --act: #ff8f80; --unclear: #e8b54a; --fine: #5fce7f; --note: #7fbcff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem 1rem 3rem; max-width: 60rem; background: var(--back); color: var(--text);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .8rem; }
h3 { font-size: 1.05rem; line-height: 1.35; margin: .1rem 0 .5rem; }
p { margin: .3rem 0; } .soft { color: var(--soft); }
a { color: var(--note); }
code { font: .9em ui-monospace, "SF Mono", Consolas, monospace; }
.finding { background: var(--card); border-left: 5px solid var(--tone); border-radius: 6px; padding: .8rem 1rem 1rem;
  margin: 0 0 .8rem; }
.act { --tone: var(--act); } .unclear { --tone: var(--unclear); } .fine { --tone: var(--fine); }
.note { --tone: var(--note); }
.level { color: var(--tone); font-weight: 600; font-size: .85rem; }
dl { margin: 0; display: grid; grid-template-columns: 5.2rem 1fr; gap: .25rem .6rem; }
dt { color: var(--soft); } dd { margin: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; min-width: 100%; overflow-wrap: normal; }
th, td { text-align: right; padding: .35rem .6rem; border-bottom: 1px solid var(--rule); vertical-align: bottom; }
th { font-weight: 600; font-size: .9rem; } th:first-child { text-align: left; }
td { font-variant-numeric: tabular-nums; white-space: nowrap; }
tbody th { overflow-wrap: anywhere; min-width: 6rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: 1.2rem 1.6rem; }
figure { margin: 0; } figcaption { font-weight: 600; } figcaption span { display: block; font-weight: 400;
  font-size: .88rem; color: var(--soft); line-height: 1.35; margin: .1rem 0 .4rem; }
svg { width: 100%; height: auto; display: block; } svg text { font: 11px system-ui, sans-serif; fill: var(--soft); }
svg .name { font-weight: 600; } .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.grid { stroke: var(--rule); stroke-width: .6; } .even { stroke: var(--soft); stroke-dasharray: 1 3; }
.mark { stroke: var(--soft); stroke-width: 1.2; } .lead { stroke-width: .8; }
details { margin-top: 1.2rem; } summary { cursor: pointer; padding: .3rem 0; color: var(--note); }
dl.words { grid-template-columns: minmax(7rem, 12rem) 1fr; }
li { margin: .4rem 0; }
@media (max-width: 30rem) { dl, dl.words { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; } }
""" + "".join(
    f".c{i}, .k{i} {{ stroke: var(--c{i}); }} svg .t{i} {{ fill: var(--c{i}); }} .d{i} {{ fill: var(--c{i}); }}\n"
    for i in range(6)
)


def page(run: Run, findings: Sequence[Finding], title: str) -> str:
    """Compose the page."""
    sources = list(dict.fromkeys(source for finding in findings for source in finding.sources))
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            # A browser asks for an icon otherwise.
            '<link rel="icon" href="data:,">',
            f"<title>{escaped(title)}</title>",
            f"<style>{_STYLE}</style>",
            "</head>",
            "<body>",
            f"<header><h1>{escaped(title)}</h1>{_about(run)}</header>",
            "<main>",
            *_section("What was found", (_finding(finding, sources) for finding in findings)),
            *_section("Each encoder, at the end of the run", _table(run)),
            *_section("Over time", _over_time(run)),
            *_section("What methods did", _methods(run)),
            *_section("Where this comes from", _sources(sources)),
            "</main>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _section(heading: str, parts: Iterable[str]) -> list[str]:
    content = [part for part in parts if part]
    return [f"<section><h2>{heading}</h2>", *content, "</section>"] if content else []


def _about(run: Run) -> str:
    if not run.steps:
        return '<p class="soft">Nothing recorded.</p>'
    names = ", ".join(map(escaped, run.modalities))
    return f'<p class="soft">{run.steps:,} recorded steps; encoders: {names}.</p>'


def _finding(finding: Finding, sources: Sequence[Source]) -> str:
    read = ", ".join(
        f'<a href="#source-{sources.index(source) + 1}">{escaped(source.title)}</a>'
        for source in finding.sources
    )
    rows = [("Why", _prose(finding.why)), ("Number", _prose(finding.number)), ("Try", _prose(finding.advice))]
    rows += [("Read", read)] if read else []
    return (
        f'<article class="finding {finding.level}"><span class="level">{_LEVELS[finding.level]}</span>'
        f"<h3>{_prose(finding.says)}</h3><dl>"
        + "".join(f"<dt>{label}</dt><dd>{text}</dd>" for label, text in rows)
        + "</dl></article>"
    )


def _table(run: Run) -> list[str]:
    rows = encoders(run)
    if not rows:
        return []
    header = "".join(f'<th scope="col">{escaped(cell)}</th>' for cell in rows[0])
    body = "".join(
        f'<tr><th scope="row">{escaped(name)}</th>{"".join(f"<td>{escaped(cell)}</td>" for cell in cells)}</tr>'
        for name, *cells in rows[1:]
    )
    named = {described(q).title.lower(): described(q).means for q in run.series}
    words = "".join(f"<dt>{escaped(title)}</dt><dd>{escaped(named[title])}</dd>" for title in rows[0][1:])
    return [
        f'<div class="wide" tabindex="0" role="region" aria-label="Table of the encoders">'
        f"<table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>",
        f'<details open><summary>What the columns mean</summary><dl class="words">{words}</dl></details>',
    ]


def _over_time(run: Run) -> list[str]:
    others = [q for q in run.series if q not in (*_MAIN, *METHODS)]
    main, more = (list(filter(None, (_figure(run, q) for q in part))) for part in (_MAIN, others))
    parts = [f'<div class="charts">{"".join(main)}</div>'] if main else []
    if more:
        parts.append(
            f'<details><summary>More charts</summary><div class="charts">{"".join(more)}</div></details>'
        )
    return parts


def _methods(run: Run) -> list[str]:
    changes = acts(run)
    if not changes:
        return []
    figures = "".join(_figure(run, q) for q in METHODS if q in run.series and q != "strength")
    items = "".join(f"<li>{escaped(text)}</li>" for text in changes)
    note = (
        '<p class="soft">Vertical lines in every chart: re-initialisations.</p>'
        if _reinitialised(run)
        else ""
    )
    return [f"<ul>{items}</ul>", note, f'<div class="charts">{figures}</div>' if figures else ""]


def _reinitialised(run: Run) -> list[int]:
    steps = {
        int(step)
        for series in run.series.get("strength", {}).values()
        for step, value in zip(series.finite.steps, series.finite.values, strict=True)
        if value > 0
    }
    return sorted(steps)


def _figure(run: Run, quantity: str) -> str:
    about = described(quantity)
    lines = {name: run.get(quantity, name) for name in run.modalities if name in run.series.get(quantity, {})}
    drawn = chart(about.title, about, lines, run.last_step, _reinitialised(run))
    if not drawn:
        return ""
    return f"<figure><figcaption>{escaped(about.title)}<span>{escaped(about.means)}</span></figcaption>{drawn}</figure>"


def _sources(sources: Sequence[Source]) -> list[str]:
    items = []
    for number, source in enumerate(sources, 1):
        link = source.where.startswith("https://")
        where = (
            f'<a href="{escaped(source.where)}">{escaped(source.where)}</a>'
            if link
            else f"<code>{escaped(source.where)}</code>"
        )
        items.append(
            f'<li id="source-{number}"><strong>{escaped(source.title)}</strong>, {where}. {escaped(source.says)}</li>'
        )
    return [f"<ol>{''.join(items)}</ol>"] if items else []


def _prose(text: str) -> str:
    """Escape text and set what stands between backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escaped(text))
