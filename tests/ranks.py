"""Run a function on several gloo processes of this machine, and bring what each returned back."""

from __future__ import annotations

import datetime
import faulthandler
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

TIMEOUT = datetime.timedelta(seconds=60)
# Seconds for each two processes. None outlives its test: every test of ranks has a longer `timeout` than this.
PATIENCE = 170
FOUR = pytest.param(4, marks=[pytest.mark.slow, pytest.mark.timeout(2 * PATIENCE + 70)])
# How many ranks a test runs on, for fixtures.
WORLDS = [2, FOUR]


def on_ranks(work: Callable[..., Any], folder: Path, *args: Any, ranks: int = 2) -> list[Any]:
    """`work(rank, *args)` on each of `ranks` processes in one group; results by rank.

    The processes meet at a file in `folder`, so that no port has to be free. Each has its own global seed.
    """
    spawn(_run, (work, str(folder), ranks, args), nprocs=ranks)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(ranks)]


def _run(rank: int, work: Callable[..., Any], folder: str, ranks: int, args: tuple[Any, ...]) -> None:
    faulthandler.dump_traceback_later(PATIENCE * ranks / 2, exit=True)
    torch.set_num_threads(1)
    torch.manual_seed(100 + rank)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks, timeout=TIMEOUT
    )
    try:
        torch.save(work(rank, *args), Path(folder) / f"rank{rank}.pt")
    finally:
        # A DDP model that outlives its group takes it along while it holds the interpreter's lock, for which gloo's
        # threads may be waiting: torch hangs.
        gc.collect()
        dist.destroy_process_group()
