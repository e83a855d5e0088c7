"""Results on disk: one JSON line a run, so that a benchmark that was broken off goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.evidence.running import Job


class Results:
    """What has been run, by the key of its job.

    Args:
        path: of the file, made with the first result.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found: dict[str, dict[str, Any]] = {}
        for line in self._lines():
            self._found[line["key"]] = line

    def __contains__(self, job: Job) -> bool:
        return job.key in self._found

    def __getitem__(self, job: Job) -> dict[str, Any]:
        return self._found[job.key]

    def __len__(self) -> int:
        return len(self._found)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._found.values())

    def add(self, job: Job, result: dict[str, Any]) -> None:
        """Keep it, on disk before this returns."""
        line = {"key": job.key, **job.content(), **result}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+", encoding="utf-8") as file:
            if not self._ends_with_a_line():
                file.write("\n")
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._found[job.key] = line

    def _lines(self) -> Iterator[dict[str, Any]]:
        if not self.path.is_file():
            return
        for text in self.path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                # Killed while it was written: that run is done again.
                continue
            if isinstance(line, dict) and "key" in line:
                yield line

    def _ends_with_a_line(self) -> bool:
        if not self.path.is_file() or self.path.stat().st_size == 0:
            return True
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"
