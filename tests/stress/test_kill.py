"""Killed at any moment while training and saving: the last complete checkpoint goes on exactly."""

from __future__ import annotations

import multiprocessing
import random
import signal
import sys
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from tests.stress.kill_run import EVERY, process, train
from tests.training import bits

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no forkserver, no SIGKILL")


def start(folder: Path, steps: int) -> tuple[BaseProcess, Connection]:
    """A new process, from a server that has imported torch and nothing else happened in."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.stress.kill_run"])
    here, there = context.Pipe(duplex=False)
    run = context.Process(target=process, args=(folder, steps, there))
    run.start()
    there.close()
    return run, here


def killed(folder: Path, after: float) -> int:
    """Run until it first told of a checkpoint and `after` seconds more; returns the last one it told of."""
    run, told = start(folder, 10**6)
    last = told.recv()
    time.sleep(after)
    run.kill()
    run.join()
    assert run.exitcode == -signal.SIGKILL
    try:
        while True:
            last = told.recv()
    except (EOFError, OSError):
        return last
    finally:
        told.close()


def kill_and_compare(folder: Path, kills: int, seed: int) -> None:
    moments, reached = random.Random(seed), 0
    for _ in range(kills):
        told = killed(folder, moments.uniform(0, 0.1))
        found = torch.load(folder / "last.pt", weights_only=True)["step"]
        # One that was complete when the process was killed, though it could tell nobody, counts too.
        assert reached < told <= found <= told + EVERY
        reached = found
    steps = reached + 4 * EVERY
    last, told_by_last = start(folder, steps)
    last.join()
    told_by_last.close()
    assert last.exitcode == 0
    (folder / "whole").mkdir()
    whole = train(folder / "whole", steps)
    assert whole.scheduler.relearns > 0
    assert whole.modulator.stats()["dropping"] > 0
    saved, expected = torch.load(folder / "last.pt", weights_only=True), whole.state()
    assert saved.pop("step") == steps
    assert same(saved, expected)


def same(a: object, b: object) -> bool:
    """Whether two states are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(bits(a), bits(b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_killed_three_times(tmp_path: Path):
    kill_and_compare(tmp_path, 3, seed=0)


@pytest.mark.slow
def test_killed_thirty_times(tmp_path: Path):
    kill_and_compare(tmp_path, 30, seed=1)
