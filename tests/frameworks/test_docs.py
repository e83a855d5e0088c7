"""The examples of docs/integrations.md and of the callbacks' docstrings, with the real packages."""

from __future__ import annotations

import doctest
import importlib
import re

import pytest

from tests.docs.test_docs import ROOT, blocks, fresh_namespace, run

pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.filterwarnings(
        "ignore:::lightning",
        "ignore:::transformers",
        "ignore:::accelerate",
        "ignore:.*LeafSpec:FutureWarning",
        "ignore:'pin_memory'",
    ),
]

PAGE = ROOT / "docs" / "integrations.md"


def examples():
    """The page's Python blocks that do not run without the frameworks, by the section they stand in."""
    text = PAGE.read_text(encoding="utf-8")
    headings = [(text[: m.start()].count("\n"), m[1]) for m in re.finditer(r"^## (.+)$", text, re.MULTILINE)]
    for block in blocks(text):
        if block.language == "python" and not block.runs:
            yield next(title for line, title in reversed(headings) if line < block.line), block


NEEDS = {
    "Lightning": "lightning",
    "Fabric": "lightning",
    "Transformers' Trainer": "transformers",
    "Accelerate": "accelerate",
}


@pytest.mark.parametrize("title", NEEDS)
def test_the_examples_run(title, tmp_path, monkeypatch):
    pytest.importorskip(NEEDS[title])
    monkeypatch.chdir(tmp_path)
    namespace = fresh_namespace()
    exec("import balanceopt as bo", namespace)
    found = [block for section, block in examples() if section == title]
    assert len(found) == 1
    run(found[0].text, PAGE, found[0].line, namespace)


def test_every_example_is_tried_or_only_shows_options():
    assert {section for section, _ in examples()} - NEEDS.keys() == {
        "OPM and re-learning under the callbacks"
    }


@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_the_docstrings_run(name):
    pytest.importorskip(name)
    result = doctest.testmod(importlib.import_module(f"balanceopt.integrations.{name}"))
    assert result.attempted > 0
    assert result.failed == 0
