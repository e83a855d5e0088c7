"""Long training with everything on: nothing grows."""

from __future__ import annotations

import gc
import os
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
import torch

import balanceopt as bo
from tests.everything import Everything, everything, hooks_on
from tests.training import batch

EPOCH = 50


def resident() -> float:
    """MiB of memory that this process holds."""
    status = Path("/proc/self/statm")
    if not status.exists():
        pytest.skip("no /proc on this system")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def objects() -> Counter[str]:
    gc.collect()
    return Counter(type(one).__name__ for one in gc.get_objects())


def train(run: Everything, first: int, steps: int) -> None:
    for step in range(first, first + steps):
        run.train(step % 64)
        if step % 3 == 0:
            run.model.eval()
            with torch.no_grad():
                run.model(*batch(step, run.model, 2)[0])
            run.model.train()
        if (step + 1) % EPOCH == 0:
            run.scheduler.step()
            run.balanced.state_dict()


def soak(warmup: int, steps: int, *, every: int) -> tuple[int, Counter[str], float]:
    """What `steps` more steps left behind: bytes and objects by kind, in the half that left fewer, and MiB."""
    run = everything(max_relearns=None, every=4, epochs=10**6)
    recorder = bo.Recorder(run.balanced, run.modulator, run.scheduler, every=every)
    tracemalloc.start()  # from the start: what replaces an older object is no growth
    train(run, 0, warmup)
    hooks, handles = hooks_on(run.model), len(run.monitor.hooks.handles)
    held = resident()
    # A leak is one in both halves; what is kept once, such as Python's caches of isinstance, may fall into either.
    halves = [traced(run, recorder, first, steps // 2) for first in (warmup, warmup + steps // 2)]
    more = resident() - held
    tracemalloc.stop()
    assert (hooks_on(run.model), len(run.monitor.hooks.handles)) == (hooks, handles)
    assert run.balanced.stats()["modulated"] == warmup + steps
    assert run.modulator.stats()["forwards"] == warmup + steps
    assert run.scheduler.last_epoch == (warmup + steps) // EPOCH
    assert run.scheduler.relearns == run.scheduler.last_epoch // 4
    assert all(bool(p.isfinite().all()) for p in run.model.parameters())
    run.remove()
    assert hooks_on(run.model) == 0
    left = min((left for _, left in halves), key=lambda left: sum(left.values()))
    return min(grown for grown, _ in halves), left, more


def traced(run: Everything, recorder: bo.Recorder, first: int, steps: int) -> tuple[int, Counter[str]]:
    """Bytes and objects that steps left behind, without the rows that they recorded."""
    rows, before, held = len(recorder.rows()), objects(), tracemalloc.get_traced_memory()[0]
    train(run, first, steps)
    recorded = len(recorder.rows()) - rows
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - held
    left = objects() - before
    assert left.pop("Row", 0) == recorded
    return grown - 200 * recorded, left  # what a row takes, about


def test_800_steps_leave_nothing_behind():
    # The first re-initialisations come at steps 200 and 400: they, and Python's free lists, fill up once.
    grown, left, _ = soak(500, 300, every=100)
    assert grown < 10_000, grown
    assert sum(left.values()) < 30, left.most_common(5)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_20000_steps_leave_nothing_behind():
    grown, left, more = soak(1000, 19_000, every=1000)
    print(f"\n20,000 steps: {grown} bytes, {sum(left.values())} objects, {more:.1f} MiB more")
    assert grown < 20_000, grown
    assert sum(left.values()) < 60, left.most_common(5)
    assert more < 20
