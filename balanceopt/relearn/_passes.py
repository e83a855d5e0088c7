"""Features of a whole loader, from one eval pass over it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor

from balanceopt._pooling import pool_features
from balanceopt.distributed import active_group
from balanceopt.monitor import ModalityMonitor
from balanceopt.monitor._forward import Pass
from balanceopt.monitor._supported import in_backward
from balanceopt.relearn._purities import Options
from balanceopt.relearn._samples import Collector, Samples
from balanceopt.relearn._undisturbed import Forward, run_batch, undisturbed

# Seconds after which a pass is long enough for a progress bar.
_LONG = 10.0


@contextmanager
def features_seen(monitor: ModalityMonitor) -> Iterator[dict[str, Tensor]]:
    """Within it the dict holds each modality's features of the latest call of its encoder."""
    seen: dict[str, Tensor] = {}

    def tap(name: str, output: Any, current: Pass | None) -> None:
        if not in_backward():
            # A copy: what comes after the encoder may work in place.
            seen[name] = monitor.features(name, output).detach().clone()

    monitor.taps.add(tap)
    try:
        yield seen
    finally:
        monitor.taps.drop(tap)


def collect(
    monitor: ModalityMonitor,
    loader: Iterable[Any],
    chosen: Options,
    *,
    split: str,
    forward: Forward | None = None,
    progress: bool | None = None,
) -> dict[str, Samples]:
    """Each modality's samples of a loader, from an eval pass that leaves no trace.

    Raises:
        RuntimeError: if the monitor's hooks were removed.
        ImportError: if `progress` is True and tqdm is not installed.
    """
    if not monitor.active:
        raise RuntimeError("the monitor's hooks were removed. Build a new ModalityMonitor.")
    collector = Collector(
        monitor.modalities,
        lambda name, z: pool_features(z, chosen.pool, monitor.projection(name)),
        limit=chosen.limit,
        seed=chosen.seed,
        ignore_index=monitor.ignore_index,
        where=f"from the {split} loader",
    )
    with undisturbed(monitor.model, loader), features_seen(monitor) as seen:
        for batch in _with_bar(loader, f"{split} features", progress, monitor):
            seen.clear()
            labels = run_batch(monitor.model, batch, forward)
            collector.add(seen, labels)
    return collector.result()


def _bar(progress: bool | None, monitor: ModalityMonitor) -> Any:
    """The tqdm class, or None for no progress bar."""
    ranks = active_group(monitor.group)
    if progress is False or (ranks is not None and dist.get_rank(ranks) > 0):
        return None
    try:
        from tqdm import tqdm
    except ImportError as error:
        if progress:
            raise ImportError(
                "a progress bar needs tqdm: pip install 'balanceopt[progress]', or progress=None"
            ) from error
        return None
    return tqdm if progress or sys.stderr.isatty() else None


def _with_bar(
    loader: Iterable[Any], what: str, progress: bool | None, monitor: ModalityMonitor
) -> Iterator[Any]:
    """The loader's batches, with a progress bar where the pass is long."""
    bar = _bar(progress, monitor)
    if bar is None:
        yield from loader
    else:
        yield from bar(loader, desc=what, delay=0 if progress else _LONG, leave=False)
