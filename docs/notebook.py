"""`python docs/notebook.py`: make docs/tutorial.ipynb from docs/tutorial.md, the one source of both."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

DOCS = Path(__file__).resolve().parent
PAGE, NOTEBOOK = DOCS / "tutorial.md", DOCS / "tutorial.ipynb"
_BLOCK = re.compile(r"^```python\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def notebook_of(page: str) -> nbformat.NotebookNode:
    """Return a notebook whose code cells are the page's Python blocks, without outputs."""
    cells = []
    for number, text in enumerate(_BLOCK.split(page)):
        if text.strip():
            make = new_code_cell if number % 2 else new_markdown_cell
            cells.append(make(text.strip(), id=f"cell-{len(cells)}"))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


if __name__ == "__main__":
    nbformat.write(notebook_of(PAGE.read_text(encoding="utf-8")), NOTEBOOK)
