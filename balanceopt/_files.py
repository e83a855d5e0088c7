"""Atomic replacement of files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

from balanceopt._options import check_kind


def check_path(path: object) -> None:
    """Check that a value is a file path.

    Raises:
        TypeError: if `path` is neither a string nor path-like.
    """
    check_kind("`path`", path, (str, PathLike), "a path")


@contextmanager
def replacing(path: str | PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; rename it to `path` on success, remove it on an exception."""
    target = Path(path).resolve()  # a rename onto a symbolic link would replace the link, not its target
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        yield beside
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
