"""What the pages of the site share: one form for methods, every public name on an API page, code that fits its box."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import balanceopt

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
METHODS = sorted(path for path in (DOCS / "methods").glob("*.md") if path.name != "index.md")
SECTIONS = ["From equation to option", "Paper, published code, and this package", "What to expect"]
# Characters of code that fit on a laptop (docs/stylesheets/extra.css).
CODE_WIDTH = 97


@pytest.mark.parametrize("page", METHODS, ids=lambda page: page.stem)
def test_pages_of_methods_have_one_form(page):
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
    assert [heading for heading in headings if heading in SECTIONS] == SECTIONS
    assert headings[-1] == SECTIONS[-1]
    opening = text[: text.index("\n## ")]
    assert re.search(r"^# .+\n\n\S.*?^```python$.*?^Papers?: ", opening, flags=re.MULTILINE | re.DOTALL)


def test_every_page_is_in_the_navigation():
    listed = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_every_method_is_in_the_overview():
    overview = (DOCS / "methods" / "index.md").read_text(encoding="utf-8")
    assert [page.name for page in METHODS if f"]({page.name}" not in overview] == []


def test_every_public_name_is_on_one_api_page():
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (DOCS / "api").glob("*.md"))
    shown = re.findall(r"^::: balanceopt\.(\w+)$", pages, flags=re.MULTILINE)
    assert sorted(shown) == sorted(balanceopt.__all__)


@pytest.mark.parametrize(
    "page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.relative_to(DOCS).as_posix()
)
def test_code_fits_its_box(page):
    lines, in_code, wide = page.read_text(encoding="utf-8").splitlines(), False, []
    for line in lines:
        if line.lstrip().startswith("```"):
            in_code = not in_code
        elif in_code and len(line) > CODE_WIDTH:
            wide.append(line)
    assert wide == []
