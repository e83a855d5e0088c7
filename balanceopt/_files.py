"""Files that are replaced as a whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

from balanceopt._options import check_kind


def check_path(path: object) -> None:
    """Refuse what is no path of a file.

    Raises:
        TypeError: saying what was found.
    """
    check_kind("`path`", path, (str, PathLike), "a path")


@contextmanager
def replacing(path: str | PathLike[str]) -> Iterator[Path]:
    """Give a path beside `path` to write to; rename it to `path` at the end, or remove it after an exception."""
    target = Path(path).resolve()  # a symbolic link stays a link
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        yield beside
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
