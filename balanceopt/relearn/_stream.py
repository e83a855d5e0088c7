"""Features of an epoch's own training and validation passes: no extra pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from balanceopt._warnings import warn_user
from balanceopt.monitor import ModalityMonitor
from balanceopt.monitor._pass import Pass
from balanceopt.monitor._supported import in_backward
from balanceopt.relearn._samples import Collector
from balanceopt.relearn._undisturbed import labels_of_batch


class StreamedLoader:
    """A loader whose batches' features are taken while the loop runs its model over them.

    Iterate it in place of the loader: it yields the same batches, and everything else is the loader's own.
    """

    def __init__(self, loader: Iterable[Any], stream: Stream, split: str) -> None:
        """Let `stream` know of each batch of `loader` while it is worked on."""
        self.loader = loader
        self._stream = stream
        self._split = split

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            with self._stream.batch(self._split, batch):
                yield batch

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)


class Stream:
    """Pair the features that the monitor shows with the labels of the batch that is worked on.

    Args:
        monitor: shows the features.
    """

    def __init__(self, monitor: ModalityMonitor) -> None:
        self.monitor = monitor
        self.collectors: dict[str, Collector] = {}
        self._batches: list[_Batch] = []
        self._warned = False
        monitor.add_tap(self._tap)

    def remove(self) -> None:
        """Stop taking features."""
        self.monitor.drop_tap(self._tap)
        self.collectors = {}

    def batch(self, split: str, batch: Any) -> _Batch:
        """A context in which forwards belong to this batch."""
        return _Batch(self, split, batch)

    def open(self, batch: _Batch) -> None:
        """Forwards belong to `batch` from now on."""
        self._batches.append(batch)

    def close(self, batch: _Batch) -> None:
        """Take what was seen of `batch`."""
        self._batches = [b for b in self._batches if b is not batch]
        collector = self.collectors.get(batch.split)
        if collector is None or not batch.seen:
            return
        labels = labels_of_batch(batch.batch)
        rows = len(labels)
        whole = {name: joined for name, z in batch.seen.items() if (joined := _joined(z, rows)) is not None}
        if len(whole) == len(batch.seen):
            collector.add(whole, labels)
        elif not self._warned:
            self._warned = True
            found = {name: [len(z) for z in parts] for name, parts in batch.seen.items()}
            warn_user(
                f"the features of a {batch.split} batch of {rows} labels came in parts of {found} rows: they can't be "
                "told apart, and such batches are left out. Use features='pass'."
            )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _tap(self, name: str, output: Any, current: Pass | None) -> None:
        if not self._batches or not self.collectors or in_backward():
            return
        batch = self._batches[-1]
        # A pass without gradients amid training, or one of training amid validation, is somebody else's.
        if (batch.split == "training") == (current is not None):
            batch.seen.setdefault(name, []).append(self.monitor.features(name, output).detach().clone())


class _Batch:
    """One batch while the loop works on it."""

    def __init__(self, stream: Stream, split: str, batch: Any) -> None:
        self.split = split
        self.batch = batch
        self.seen: dict[str, list[Tensor]] = {}
        self._stream = stream

    def __enter__(self) -> _Batch:
        self._stream.open(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._stream.close(self)


def _joined(parts: list[Tensor], rows: int) -> Tensor | None:
    """The features of a whole batch: of its first forward, or of several over parts of it."""
    if len(parts[0]) == rows:
        return parts[0]
    whole = torch.cat(parts)
    return whole if len(whole) == rows else None
