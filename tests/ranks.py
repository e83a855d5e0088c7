"""Run a function on several gloo processes of this machine, and bring what each returned back."""

from __future__ import annotations

import datetime
import faulthandler
import gc
import tempfile
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

# Whether torch can shard a model on the CPU; torch 2.6 can't.
SHARDS = hasattr(torch.cpu.Stream, "record_event")
needs_shards = pytest.mark.skipif(not SHARDS, reason="fully_shard on the CPU needs torch 2.7")
TIMEOUT = datetime.timedelta(seconds=60)
# Seconds for each two processes. None outlives its test: every test of ranks has a longer `timeout` than this.
PATIENCE = 170
FOUR = pytest.param(4, marks=[pytest.mark.slow, pytest.mark.timeout(2 * PATIENCE + 70)])
# How many ranks a test runs on, for fixtures.
WORLDS = [2, FOUR]


def on_ranks(
    work: Callable[..., Any], folder: Path, *args: Any, ranks: int = 2, fresh: bool = False
) -> list[Any]:
    """`work(rank, *args)` on each of `ranks` processes in one group; results by rank.

    The processes and their group stay for the next test, since starting them takes longer than most tests, unless
    `fresh`. Each has its own global seed.
    """
    team = Team(ranks) if fresh else _standing(ranks)
    try:
        team.run(work, folder, args)
    except BaseException:
        _standing.cache_clear()  # ranks that a test broke serve no other
        team.end()
        raise
    if fresh:
        team.end()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(ranks)]


class Team:
    """Processes in one group, which meet at a file, so that no port has to be free."""

    def __init__(self, ranks: int) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.lines: list[Connection] = []
        self.processes = []
        context = multiprocessing.get_context("spawn")
        for rank in range(ranks):
            line, other = context.Pipe()
            given = (rank, ranks, f"file://{self.folder.name}/meet", other)
            process = context.Process(target=_serve, args=given, daemon=True)
            process.start()
            other.close()  # so that the line breaks where the process ends
            self.lines.append(line)
            self.processes.append(process)

    def run(self, work: Callable[..., Any], folder: Path, args: tuple[Any, ...]) -> None:
        """Have all ranks work.

        Raises:
            RuntimeError: if one of them raises or ends.
        """
        for line in self.lines:
            line.send((work, folder, args))
        waiting = list(self.lines)
        while waiting:
            ready = wait(waiting)
            for line in [line for line in waiting if line in ready]:
                rank = self.lines.index(line)
                try:
                    error = line.recv()
                except EOFError:
                    error = "the process ended"
                if error is not None:
                    raise RuntimeError(f"rank {rank}: {error}")
                waiting.remove(line)

    def end(self) -> None:
        for process, line in zip(self.processes, self.lines, strict=True):
            line.close()
            process.kill()
            process.join()
        self.folder.cleanup()


@cache
def _standing(ranks: int) -> Team:
    return Team(ranks)


def _serve(rank: int, ranks: int, meet: str, line: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=ranks, timeout=TIMEOUT)
    while True:
        try:
            work, folder, args = line.recv()
        except EOFError:  # nobody is there any more
            return
        faulthandler.dump_traceback_later(PATIENCE * ranks / 2, exit=True)
        torch.manual_seed(100 + rank)
        error = None
        try:
            torch.save(work(rank, *args), folder / f"rank{rank}.pt")
        except BaseException:
            error = traceback.format_exc()
        # DDP models and shards of one test hold memory and threads of the group through the next one.
        gc.collect()
        faulthandler.cancel_dump_traceback_later()
        line.send(error)
