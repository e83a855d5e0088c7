"""How many runs are left, and how long they may take: by what runs of the same set and row have taken so far."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import mean
from typing import Any

from benchmarks.evidence.results import Results
from benchmarks.extras import need

# CPU seconds of a run before any was made.
_GUESS = 3.0


class Progress:
    """A progress bar over runs.

    Args:
        total: runs of the whole grid.
        results: those that are there already.
        workers: that run side by side.
    """

    def __init__(self, total: int, results: Results, workers: int) -> None:
        self._workers = workers
        self._costs: dict[tuple[str, str], list[float]] = {}
        for line in results:
            self._learn(line)
        self._bar = need("tqdm").tqdm(total=total, initial=0, unit=" runs", bar_format=_FORM)

    def at(self, remaining: Iterable[tuple[str, str, int]]) -> None:
        """Set to what is still to be run."""
        self._left = {(name, row): count for name, row, count in remaining if count > 0}
        self._bar.n = self._bar.total - sum(self._left.values())
        self._show()

    def step(self, line: dict[str, Any]) -> None:
        """One run is done."""
        key = line["set"], line["row"]
        self._learn(line)
        self._left[key] = self._left.get(key, 0) - 1
        self._bar.update()
        self._show()

    def seconds_left(self) -> float:
        """Of the clock, if nothing else runs on the machine."""
        return sum(count * self._cost(key) for key, count in self._left.items()) / self._workers

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()

    def _show(self) -> None:
        self._bar.set_postfix_str(f"about {self.seconds_left() / 60:.0f} min left if nothing else runs")

    def _learn(self, line: dict[str, Any]) -> None:
        self._costs.setdefault((line["set"], line["row"]), []).append(line["all_s"])

    def _cost(self, key: tuple[str, str]) -> float:
        if key in self._costs:
            return mean(self._costs[key])
        same_set = [cost for (name, _), costs in self._costs.items() if name == key[0] for cost in costs]
        return mean(same_set) if same_set else _GUESS


_FORM = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} runs, {elapsed}, {postfix}"
