"""The pages in the repository say what docs/evidence.json says."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.evidence.report import blocks
from benchmarks.evidence.sets import SETS
from benchmarks.evidence.stored import dumps, load
from benchmarks.evidence.tables import MARK, marked

ROOT = Path(__file__).parents[4]
NUMBERS = ROOT / "docs" / "evidence.json"
_NAMES = re.compile(MARK.format("(\\w+)"))


def test_the_numbers_are_of_all_sets_and_as_they_were_written():
    summary = load(NUMBERS)
    assert list(summary.sets) == list(SETS)
    assert dumps(summary) == NUMBERS.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["docs/evidence.md", "README.md"])
def test_a_page_is_what_the_numbers_say(page):
    made = blocks(load(NUMBERS))
    text = (ROOT / page).read_text(encoding="utf-8")
    marks = Counter(_NAMES.findall(text))
    for name, count in marks.items():
        assert count == 2, name
        assert marked(name, made[name]) in text, f"make evidence ARGS=--from-json: {name} in {page}"
    if page == "docs/evidence.md":
        assert set(marks) == set(made)
