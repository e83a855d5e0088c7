"""Every code block of the README, CONTRIBUTING and the pages runs, from the files themselves.

Blocks of one file run in order in one namespace that `prelude.py` has filled with a model and a loader; after them the
doctests, tests and contract rows that they define. A block under the line `<!-- no-run -->` is left out: only for what
can't run here, such as several machines. A `diff` block is two programs, before (lines with `-`) and after (lines with
`+`): both run, the first in a namespace of its own.
"""

from __future__ import annotations

import ast
import doctest
import re
import runpy
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.contract import test_contract as contract
from tests.contract.bases import BASES
from tests.contract.methods import Method

ROOT = Path(__file__).resolve().parents[2]
PRELUDE = Path(__file__).with_name("prelude.py")
NO_RUN = "<!-- no-run -->"
_FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,}|~{3,}) *(?P<language>[\w+-]*)(?P<rest>.*)$")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line of the file it starts at."""

    language: str
    text: str
    line: int
    runs: bool


def pages() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]


def blocks(text: str) -> Iterator[Block]:
    lines = text.splitlines()
    above, number = "", 0
    while number < len(lines):
        opening = _FENCE.match(lines[number])
        if opening is None:
            above = lines[number].strip() or above
            number += 1
            continue
        start = number + 1
        number = start
        while not lines[number].strip().startswith(opening["ticks"]):
            number += 1
        body = textwrap.dedent("\n".join(lines[start:number]))
        runs = above != NO_RUN and "no-run" not in opening["rest"]
        yield Block(opening["language"], body, start + 1, runs)
        above, number = "", number + 1


def sides(diff: str) -> tuple[str, str]:
    """What a diff block goes from and to."""
    lines = diff.splitlines()
    before = [line[1:] for line in lines if not line.startswith("+")]
    after = [line[1:] for line in lines if not line.startswith("-")]
    return "\n".join(before), "\n".join(after)


def fresh_namespace() -> dict[str, Any]:
    namespace = runpy.run_path(str(PRELUDE))
    return {"__name__": "page", **{name: namespace[name] for name in namespace["__all__"]}}


def run(code: str, page: Path, line: int, namespace: dict[str, Any]) -> None:
    """Run it as if from the page, so that a traceback names the page's own line."""
    exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)


@pytest.mark.parametrize(
    "page",
    [page for page in pages() if page.name != "tutorial.md"],  # test_tutorial.py runs it as a notebook
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_code_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = fresh_namespace()
    for block in blocks(page.read_text(encoding="utf-8")):
        if not block.runs:
            if block.language == "python":
                ast.parse(block.text)
        elif block.language == "python":
            run(block.text, page, block.line, namespace)
        elif block.language == "diff":
            before, after = sides(block.text)
            run(before, page, block.line, fresh_namespace())
            run(after, page, block.line, namespace)
    check(namespace)


def check(namespace: dict[str, Any]) -> None:
    """Run the doctests, tests and contract rows among what a page has defined."""
    for name, value in list(namespace.items()):
        if getattr(value, "__module__", None) == "page":
            for example in doctest.DocTestFinder().find(value, name, module=False, globs=namespace):
                doctest.DebugRunner().run(example)
            if name.startswith("test_"):
                value()
        if isinstance(value, Method):
            for base in (base for base in BASES if base.name in ("SGD", "Adam")):
                contract.test_at_its_limit_it_is_the_base_bit_for_bit((value, base))
                training = contract.run_of(value, base)
                contract.test_steps(training)
                contract.test_resumes_bit_for_bit(training)


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_to_files_lead_somewhere(page):
    text = re.sub(
        r"^( *)(```|~~~).*?^ *\2", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    local = [t.partition("#")[0] for t in targets if not re.match(r"[a-z]+:|#", t)]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_messages_in_the_docs_are_those_of_the_source():
    page = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
    rows = page.partition("<!-- messages")[2].splitlines()
    fragments = [row.split("`")[1] for row in rows if row.startswith("| `")]
    sources = "\n".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("balanceopt/**/*.py")))
    joined = re.sub(r'"\s*\n\s*f?"', "", sources)  # one sentence over several literals
    assert len(fragments) > 10
    assert [fragment for fragment in fragments if fragment not in joined] == []


def test_blocks_are_found_with_their_lines_and_tags():
    text = "a\n\n```python\nx = 1\n```\n\n<!-- no-run -->\n```python\ny\n```\n\n    ```diff\n    -a\n    +b\n    ```\n"
    assert list(blocks(text)) == [
        Block("python", "x = 1", 4, True),
        Block("python", "y", 9, False),
        Block("diff", "-a\n+b", 13, True),
    ]


def test_a_diff_has_two_sides():
    assert sides(" a\n-b\n+c\n d") == ("a\nb\nd", "a\nc\nd")
