"""Recording of scores, ratios, coefficients and other quantities over time."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any, Literal, NamedTuple, Protocol
from weakref import WeakMethod, finalize

from torch import Tensor

from balanceopt._deferred import on_host
from balanceopt._files import check_path, replacing
from balanceopt._method import ABSENT
from balanceopt._options import check_count, check_entries, check_function, check_kind, shown
from balanceopt._removable import Removable
from balanceopt.monitor import ModalityMonitor
from balanceopt.probes import ProbeMonitor
from balanceopt.relearn import EpochMethod
from balanceopt.signals import StepSignals

Log = Callable[[str, float, int], object]
# What a source numbers its values by: training steps, epochs, or rounds of validation, which get the latest step.
Unit = Literal["step", "epoch", "round"]


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


class Recorder(Removable):
    """Record what training does with each modality, at every step.

    Of a `ModalityMonitor` the recorder records plain training, with any optimizer and without a wrapper: `score` and
    `ratio`, and the signals `gradient_norm`, `gradient_share`, `update_ratio`, `feature_norm`, `effective_rank` and
    `agreement`, of this rank's samples (docs/watching.md). Of a method, all quantities that it reports. A modality
    without samples makes no row.

    Keep a reference to the recorder: it stops when it is garbage-collected. It keeps its sources alive.

    Args:
        *sources: `ModalityMonitor`, `ProbeMonitor`, `ModulatedOptimizer`, what `attach` returns, or any method, such as
            an `OPM` or a `ReLearnScheduler`.
        every: interval in steps between records, at least 1; epochs and rounds of validation are all recorded.
        log: function `(name, value, step)` called for each row, such as TensorBoard's `writer.add_scalar`; names are
            `balance/ratio/audio`. From an accelerator rows come in batches, so that no step waits for the device.

    Raises:
        ValueError: if `every` is not a whole number of at least 1, or `log` is no function.
        TypeError: if a source has no listeners.

    Example:
        >>> import torch, balanceopt as bo
        >>> model = torch.nn.ModuleDict({m: torch.nn.Linear(2, 2) for m in ("a", "b")})
        >>> monitor = bo.ModalityMonitor(model, {"a": "a", "b": "b"}, head={"a": "a", "b": "b"})
        >>> with Recorder(monitor, every=10) as recorder:
        ...     recorder.rows()
        []
    """

    def __init__(self, *sources: Source | ModalityMonitor, every: int = 1, log: Log | None = None) -> None:
        check_count("every", every, at_least=1)
        check_function("log", log, "(name, value, step)")
        for source in sources:
            if not isinstance(source, ModalityMonitor) and not isinstance(
                getattr(source, "listeners", None), list
            ):
                raise TypeError(
                    "a source should be a ModalityMonitor, a ModulatedOptimizer, what `attach` returns, or a method "
                    f"such as OPM or ReLearnScheduler. Found {shown(source)}."
                )
        self.every = every
        self.log = log
        self._rows: list[Row] = []
        self._step: int | None = None  # the latest one that a source has told
        self._waiting: list[tuple[int, str, tuple[str, ...], Tensor]] = []
        # A method that only its recorder refers to goes on.
        self._sources: list[Source] = [
            StepSignals(source, every=every) if isinstance(source, ModalityMonitor) else source
            for source in sources
        ]
        self._signals = signals = [source for source in self._sources if isinstance(source, StepSignals)]
        heard = []
        for source in self._sources:
            # A monitor's scores come in every step; a method's would come a second time.
            others = () if isinstance(source, StepSignals) or not signals else ("score", "ratio")
            unit: Unit = "step"
            if isinstance(source, (EpochMethod, ProbeMonitor)):
                unit = "epoch" if isinstance(source, EpochMethod) else "round"
            # Sources hold the recorder weakly, so that an unreachable recorder is freed and stops recording.
            heard.append((source.listeners, _WeakListener(WeakMethod(self._hear), unit, others)))
        self._remove = finalize(self, _stop_listening, heard, signals)
        self._remove.atexit = False
        for listeners, listener in heard:
            listeners.append(listener)

    def rows(self) -> list[Row]:
        """Return all recorded rows in the order of recording."""
        for signals in self._signals:
            signals.check()
        for source in self._sources:
            if isinstance(source, ProbeMonitor):
                source.flush()
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

    def state_dict(self) -> dict[str, Any]:
        """Return the rows and the number of steps, of plain numbers and names, to go on with in a resumed run."""
        return {
            "rows": [tuple(row) for row in self.rows()],
            "steps": max((s.step for s in self._signals), default=0),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the rows by those of a checkpoint, and count steps from its number on.

        Args:
            state: result of `state_dict()`.

        Raises:
            TypeError, KeyError, ValueError: if `state` is no state of a recorder; nothing is changed.
        """
        check_entries("the state of a Recorder", state, ("rows", "steps"))
        check_count("steps", state["steps"])
        check_kind("the state's rows", state["rows"], (list, tuple), "a list of rows")
        for row in state["rows"]:
            kinds = (int, str, str, float)
            fits = isinstance(row, (list, tuple)) and len(row) == len(kinds)
            if not fits or not all(map(isinstance, row, kinds)):
                raise ValueError(f"a row should be (step, quantity, modality, value). Found {shown(row)}.")
        self._waiting.clear()
        self._rows = [Row(*row) for row in state["rows"]]
        self._step = state["steps"] - 1 if state["steps"] else None
        for signals in self._signals:
            signals.step = state["steps"]

    def remove(self) -> None:
        """Stop recording, keeping the recorded rows; a second call is a no-op."""
        if self._remove.alive:
            self.rows()  # to end a round of validation, and to log
        self._remove()

    def _hear(
        self, unit: Unit, step: int, quantity: str, modalities: tuple[str, ...], values: Tensor
    ) -> None:
        if unit == "round":
            step = step if self._step is None else self._step
        elif unit == "step":
            self._step = step
            if step % self.every:
                return
        self._waiting.append((step, quantity, modalities, values.detach().clone()))
        if on_host(values) is not None or len(self._waiting) >= _WAITING:
            self._fetch()

    def _fetch(self) -> None:
        """Read the waiting values from their devices, and log them."""
        waiting, self._waiting = self._waiting, []
        new = []
        for step, quantity, modalities, values in waiting:
            numbers = zip(modalities, values.cpu().tolist(), strict=True)
            new += [Row(step, quantity, name, float(x)) for name, x in numbers if x != ABSENT]
        self._rows += new
        for row in new if self.log is not None else ():
            self.log(log_name(row.quantity, row.modality), row.value, row.step)  # type: ignore[misc]

    def __getstate__(self) -> dict[str, Any]:
        # A copy holds the rows and hears no source.
        self._fetch()
        return {**self.__dict__, "log": None, "_sources": [], "_signals": [], "_remove": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._remove = finalize(self, _stop_listening, [], [])
        self._remove.atexit = False


class _WeakListener:
    """A listener that passes values to a recorder until the recorder is freed.

    Args:
        hear: the recorder's method.
        unit: what the source numbers its values by.
        others: quantities that another source reports.
    """

    def __init__(self, hear: WeakMethod[Any], unit: Unit, others: tuple[str, ...]) -> None:
        self._hear = hear
        self._unit = unit
        self._others = others

    def __call__(self, step: int, quantity: str, modalities: tuple[str, ...], values: Tensor) -> None:
        hear = self._hear()
        if hear is not None and quantity not in self._others:
            hear(self._unit, step, quantity, modalities, values)


def _stop_listening(heard: list[tuple[list[Any], _WeakListener]], signals: list[StepSignals]) -> None:
    for listeners, listener in heard:
        if listener in listeners:
            listeners.remove(listener)
    for source in signals:
        source.remove()


def log_name(quantity: str, modality: str) -> str:
    """Return the name of a quantity of a modality in logs."""
    return f"balance/{quantity}/{modality}"


def _as_text(name: str) -> str:
    return f"'{name}" if name.startswith(_FORMULA) else name
