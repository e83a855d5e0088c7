"""Recording of scores, ratios, coefficients and other quantities over time."""

from __future__ import annotations

import csv
from os import PathLike
from types import TracebackType
from typing import Any, NamedTuple, Protocol
from weakref import WeakMethod, finalize

from torch import Tensor

from balanceopt._deferred import on_host
from balanceopt._files import check_path, replacing
from balanceopt._options import check_count, shown


class Row(NamedTuple):
    """One recorded value of a quantity, for one modality at one step (epoch, for re-learning)."""

    step: int
    quantity: str
    modality: str
    value: float


class Source(Protocol):
    """An object that a `Recorder` can listen to, such as a `ModulatedOptimizer` or a `ReLearnScheduler`."""

    @property
    def listeners(self) -> list[Any]:
        """Functions to call with `(step, quantity, modalities, values (M,))`."""


# Device tensors are copied to the host in batches of this size, because each copy may synchronise.
_WAITING = 256
# A spreadsheet evaluates a cell that begins with one of these characters as a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


class Recorder:
    """Record scores, ratios, coefficients and all other quantities that methods report, at every step.

    Args:
        *sources: `ModulatedOptimizer`, what `attach` returns, `OPM`, `ReLearnScheduler`.
        every: interval in steps between records, at least 1.

    Raises:
        ValueError: if `every` is not a whole number of at least 1.
        TypeError: if a source has no listeners.

    Example:
        >>> recorder = Recorder()
        >>> recorder.rows()
        []
    """

    def __init__(self, *sources: Source, every: int = 1) -> None:
        check_count("every", every, at_least=1)
        for source in sources:
            if not isinstance(getattr(source, "listeners", None), list):
                raise TypeError(
                    "a source should be a ModulatedOptimizer, what `attach` returns, an OPM or a ReLearnScheduler. "
                    f"Found {shown(source)}."
                )
        self.every = every
        self._rows: list[Row] = []
        self._waiting: list[tuple[int, str, tuple[str, ...], Tensor]] = []
        self._sources = sources
        # Sources hold the recorder weakly, so that an unreachable recorder is freed and stops recording.
        listener = _WeakListener(WeakMethod(self._hear))
        self._remove = finalize(self, _stop_listening, [source.listeners for source in sources], listener)
        for source in sources:
            source.listeners.append(listener)

    def rows(self) -> list[Row]:
        """Return all recorded rows in the order of recording."""
        self._fetch()
        return list(self._rows)

    def series(self, quantity: str) -> dict[str, tuple[list[int], list[float]]]:
        """Return the steps and values of one quantity for each modality."""
        found: dict[str, tuple[list[int], list[float]]] = {}
        for row in self.rows():
            if row.quantity == quantity:
                steps, values = found.setdefault(row.modality, ([], []))
                steps.append(row.step)
                values.append(row.value)
        return found

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Write `step,quantity,modality,value` lines in UTF-8, replacing an existing file atomically.

        A name that a spreadsheet would evaluate as a formula gets an apostrophe as its first character.

        Raises:
            TypeError: if `path` is not a path.
        """
        check_path(path)
        with replacing(path) as beside, open(beside, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(Row._fields)
            for step, quantity, modality, value in self.rows():
                writer.writerow((step, _as_text(quantity), _as_text(modality), value))

    def plot(self, path: str | PathLike[str] | None = None, **options: Any) -> Any:
        """Plot every quantity over time, one panel each, and return the matplotlib figure.

        Args:
            path: file to save the figure to; None for no file.
            **options: `quantities` and `smooth` of `balanceopt.plotting.plot_rows`.

        Raises:
            ImportError: without matplotlib (extra `plot`).
            ValueError, TypeError: as `balanceopt.plotting.plot_rows`.
        """
        from balanceopt.plotting import plot_rows

        return plot_rows(self.rows(), path, **options)

    def remove(self) -> None:
        """Stop recording, keeping the recorded rows; a second call is a no-op."""
        self._remove()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _hear(self, step: int, quantity: str, modalities: tuple[str, ...], values: Tensor) -> None:
        if step % self.every:
            return
        self._waiting.append((step, quantity, modalities, values.detach().clone()))
        if on_host(values) is not None or len(self._waiting) >= _WAITING:
            self._fetch()

    def _fetch(self) -> None:
        for step, quantity, modalities, values in self._waiting:
            numbers = values.cpu().tolist()
            self._rows += [
                Row(step, quantity, name, float(x)) for name, x in zip(modalities, numbers, strict=True)
            ]
        self._waiting.clear()


class _WeakListener:
    """A listener that passes values to a recorder until the recorder is freed."""

    def __init__(self, hear: WeakMethod[Any]) -> None:
        self._hear = hear

    def __call__(self, step: int, quantity: str, modalities: tuple[str, ...], values: Tensor) -> None:
        hear = self._hear()
        if hear is not None:
            hear(step, quantity, modalities, values)


def _stop_listening(lists: list[list[Any]], listener: _WeakListener) -> None:
    for listeners in lists:
        if listener in listeners:
            listeners.remove(listener)


def _as_text(name: str) -> str:
    return f"'{name}" if name.startswith(_FORMULA) else name
