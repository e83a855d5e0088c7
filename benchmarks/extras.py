"""Packages that only the demo and the benchmarks need."""

from __future__ import annotations

import importlib
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
