"""Packages that only the demo and the benchmarks need."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def need(module: str) -> Any:
    """Import `module`, or say which extra brings it.

    Raises:
        ImportError: if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.split(".")[0]
        package = {"sklearn": "scikit-learn", "PIL": "pillow"}.get(name, name)
        extra = "transformers" if name == "transformers" else "demo"
        raise ImportError(f"this needs {package}: pip install 'balanceopt[{extra}]'") from error


def installed(package: str) -> bool:
    """Whether `package` could be imported."""
    return find_spec(package) is not None


def file_of(package: str, file: str) -> Path:
    """Find a data file that comes with `package`, without importing it.

    Raises:
        ImportError: if the package is not installed, or has no such file.
    """
    spec = find_spec(package)
    folders = [] if spec is None else spec.submodule_search_locations or []
    for folder in folders:
        if (Path(folder) / file).is_file():
            return Path(folder) / file
    raise ImportError(
        f"this needs {file} of {package}: pip install 'balanceopt[evidence]' (Python 3.11 or newer)"
    )
