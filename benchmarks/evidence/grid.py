"""Which runs there are, and which of them can be run now: a row is tested when its options are chosen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evidence.results import Results
from benchmarks.evidence.rows import VOTES, Row
from benchmarks.evidence.running import Job
from benchmarks.evidence.sets import SETS, Part, fingerprint


@dataclass(frozen=True)
class Grid:
    """All runs of a benchmark.

    Args:
        rows: set -> row -> what it is.
        seeds: number of tests; None for the one of each set.
        folder: with the files of the sets.
    """

    rows: Mapping[str, Mapping[str, Row]]
    seeds: int | None
    folder: Path | None

    def ready(self, results: Results) -> list[Job]:
        """Runs that are missing and whose options are known, choices first, then test seed by test seed."""
        tuning, tests = [], []
        for name, rows in self.rows.items():
            for row in rows.values():
                options, missing = self._settle(name, row, results)
                tuning.extend(missing)
                if options is not None:
                    tests.extend(self._tests(name, row, options))
        # Rows of the same options share their runs.
        tests = sorted((job for job in tests if job not in results), key=lambda job: job.seed)
        first: dict[str, Job] = {}
        for job in [*tuning, *tests]:
            first.setdefault(job.key, job)
        return list(first.values())

    def chosen(self, name: str, row: Row, results: Results) -> dict[str, Any] | None:
        """All options of a row; None while a choice is open."""
        return self._settle(name, row, results)[0]

    def found(self, name: str, row: Row, results: Results) -> dict[int, dict[str, Any]]:
        """Results of the tests by seed, as far as they are there."""
        options = self.chosen(name, row, results)
        if options is None:
            return {}
        tests = self._tests(name, row, options)
        return {job.seed: dict(row.read(results[job])) for job in tests if job in results}

    def tuned(self, name: str, row: Row, results: Results) -> float:
        """Mean metric of its options on the data that are kept for choices; NaN if that was not run."""
        options = self.chosen(name, row, results)
        if options is None:
            return float("nan")
        jobs = self._tuning(name, row, options)
        return float(np.mean([row.read(results[j])["metric"] if j in results else np.nan for j in jobs]))

    def remaining(self, results: Results) -> Iterator[tuple[str, str, int]]:
        """(set, row, runs that are still to be made), at most: rows whose options are not chosen yet may share some."""
        for name, rows in self.rows.items():
            counted: set[str] = set()
            for row in rows.values():
                options, tuning = self._choices(name, row, results)
                jobs = tuning if options is None else tuning + self._tests(name, row, options)
                missing = {job.key for job in jobs if job not in results} - counted
                counted |= missing
                count = len(missing)
                if options is None and not row.name.endswith(
                    VOTES
                ):  # a vote follows trainings of another row
                    unknown = self._tuning_runs(name, row) - len({job.key for job in tuning})
                    count += self._seeds(name) + max(0, unknown)
                yield name, row.name, count

    def runs(self, name: str, results: Results) -> list[dict[str, Any]]:
        """All runs that a set's numbers rest on, each once."""
        found: dict[str, dict[str, Any]] = {}
        for row in self.rows[name].values():
            options, tuning = self._choices(name, row, results)
            jobs = tuning if options is None else tuning + self._tests(name, row, options)
            found |= {job.key: results[job] for job in jobs if job in results}
        return list(found.values())

    def _settle(self, name: str, row: Row, results: Results) -> tuple[dict[str, Any] | None, list[Job]]:
        """The row's options, or None and the runs that have to be made first (none if they wait for another row)."""
        options, tuning = self._choices(name, row, results)
        return options, [job for job in tuning if job not in results]

    def _choices(self, name: str, row: Row, results: Results) -> tuple[dict[str, Any] | None, list[Job]]:
        """The row's options if all runs that they rest on are there, else None; and these runs as far as known."""
        options = dict(row.options)
        tuning: list[Job] = []
        for option, (source, chosen) in row.inherits.items():
            other = self.chosen(name, self.rows[name][source], results)
            if other is None:
                return None, []
            options[option] = other[chosen]
        for knob in row.knobs:
            tried = [self._tuning(name, row, {**options, knob.name: c}) for c in knob.candidates]
            tuning += [job for jobs in tried for job in jobs]
            if any(job not in results for job in tuning):
                return None, tuning
            scores = [float(np.mean([row.read(results[job])["metric"] for job in jobs])) for jobs in tried]
            options[knob.name] = knob.best(scores)
        if row.kind == "recipe":
            # Nothing to choose, but which recipe is recommended is decided on the same data.
            tuning = self._tuning(name, row, options)
        return (None if any(job not in results for job in tuning) else options), tuning

    def _tuning_runs(self, name: str, row: Row) -> int:
        if row.kind == "recipe":
            return SETS[name].choices
        stages = [len(knob.candidates) for knob in row.knobs]
        # A later knob's start value was run with the knob before.
        shared = sum(row.options.get(knob.name) in knob.candidates for knob in row.knobs[1:])
        return (sum(stages) - shared) * SETS[name].choices

    def _tuning(self, name: str, row: Row, options: Mapping[str, Any]) -> list[Job]:
        return [self._job(name, row, options, "tune", seed) for seed in range(SETS[name].choices)]

    def _tests(self, name: str, row: Row, options: Mapping[str, Any]) -> list[Job]:
        return [self._job(name, row, options, "test", seed) for seed in range(self._seeds(name))]

    def _seeds(self, name: str) -> int:
        return SETS[name].tests if self.seeds is None else self.seeds

    def _job(self, name: str, row: Row, options: Mapping[str, Any], part: Part, seed: int) -> Job:
        return Job(name, row.name, row.modality, options, part, seed, fingerprint(name, self.folder))
