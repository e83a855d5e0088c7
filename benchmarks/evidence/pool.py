"""Run jobs one after the other or in several processes, each result handed over as soon as it is there."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.evidence.running import Job, run

Done = tuple[Job, dict[str, Any]]


def run_all(jobs: Iterable[Job], folder: Path | None, workers: int, until: float) -> Iterator[Done]:
    """Each job with its result, in the order in which they are done.

    Args:
        jobs: to run.
        folder: with the files of the sets.
        workers: processes, of one thread each; 1 stays in this one.
        until: on the clock of `time.monotonic`; no run begins after it.
    """
    in_time = _before(iter(jobs), until)
    if workers > 1:
        yield from _side_by_side(in_time, folder, workers)
        return
    # So small a model is slower on two threads than on one.
    torch.set_num_threads(1)
    for job in in_time:
        yield job, run(job, folder)


def _side_by_side(jobs: Iterator[Job], folder: Path | None, workers: int) -> Iterator[Done]:
    # Started afresh: a fork would take over torch's threads as they are.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from _handed_out(pool, jobs, folder, workers)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _handed_out(
    pool: ProcessPoolExecutor, jobs: Iterator[Job], folder: Path | None, workers: int
) -> Iterator[Done]:
    """No more than one job in waiting for each worker, so that a limit of time is kept."""
    running: dict[Future[dict[str, Any]], Job] = {}
    for job in islice(jobs, 2 * workers):
        running[pool.submit(run, job, folder)] = job
    while running:
        finished, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in finished:
            yield running.pop(future), future.result()
            running.update({pool.submit(run, job, folder): job for job in islice(jobs, 1)})


def _before(jobs: Iterator[Job], until: float) -> Iterator[Job]:
    for job in jobs:
        if time.monotonic() >= until:
            return
        yield job
