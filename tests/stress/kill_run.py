"""A training run for test_kill.py: resumes from its checkpoint if there is one, saves at every other step."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from tests.everything import Everything, everything

EVERY, EPOCH = 2, 3


def save(run: Everything, step: int, path: Path) -> None:
    """Written beside the old one, then given its name: there is always one that is complete."""
    waiting = path.with_suffix(".tmp")
    with open(waiting, "wb") as file:
        torch.save({"step": step, **run.state()}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(waiting, path)


def train(folder: Path, steps: int, tell: Connection | None = None) -> Everything:
    """Up to step number `steps`; tells the number of each step that was saved."""
    torch.set_num_threads(1)
    run, first, path = everything(max_relearns=None), 0, folder / "last.pt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        first = state.pop("step")
        run.load(state)
    for step in range(first, steps):
        run.train(step)
        if (step + 1) % EPOCH == 0:
            run.scheduler.step()
        if (step + 1) % EVERY == 0:
            save(run, step + 1, path)
            if tell is not None:
                tell.send(step + 1)
    return run


def process(folder: Path, steps: int, tell: Connection) -> None:
    torch.manual_seed(os.getpid())  # nothing may hang on the global stream
    train(folder, steps, tell)
