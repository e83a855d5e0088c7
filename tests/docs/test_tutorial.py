"""The tutorial's notebook is the page, and runs."""

from __future__ import annotations

import runpy
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "tutorial.md").read_text(encoding="utf-8")
notebook_of = runpy.run_path(str(DOCS / "notebook.py"))["notebook_of"]


def run(page: str, folder: Path) -> list[str]:
    """The lines that a notebook of the page prints."""
    notebook = notebook_of(page)
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert {output.get("name") for output in outputs} == {"stdout"}  # nothing on stderr, and no error
    return "".join(output["text"] for output in outputs).splitlines()


def test_the_notebook_is_the_page():
    notebook = nbformat.read(DOCS / "tutorial.ipynb", as_version=4)
    assert notebook == notebook_of(PAGE), "run `make notebook`"
    nbformat.validate(notebook)


def test_the_notebook_runs_with_fewer_epochs_and_seeds(tmp_path):
    short = PAGE.replace("EPOCHS = 20", "EPOCHS = 2").replace("SEEDS = range(5)", "SEEDS = range(2)")
    assert sum(a != b for a, b in zip(PAGE.splitlines(), short.splitlines(), strict=True)) == 2
    assert run(short, tmp_path)[-1] == "resumed bit for bit: True"


@pytest.mark.slow
def test_the_report_of_the_notebook_is_what_the_page_says(tmp_path):
    lines = run(PAGE, tmp_path)
    for name in ("image", "spectrum"):
        assert f"[!] The {name} encoder is probably starved." in lines
    assert lines[-1] == "resumed bit for bit: True"
