"""What `import balanceopt` takes beside `import torch`, in new processes."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

from benchmarks.speed_options import Options
from benchmarks.speed_report import Section
from benchmarks.timing import Contender, processor_seconds, summary


def run(options: Options) -> list[Section]:
    """Processor time of a process that imports torch, and of one that imports balanceopt too."""
    rows = {"torch": "import torch.optim", "torch, balanceopt": "import torch.optim, balanceopt"}
    contenders = {name: Contender(partial(_start, code)) for name, code in rows.items()}
    seconds = processor_seconds(
        contenders, options.repetitions, options.device, warm_up=1, clock=_of_children
    )
    timings = {name: summary(values) for name, values in seconds.items()}
    added = 1e3 * (timings["torch, balanceopt"].median - timings["torch"].median)
    notes = {"torch, balanceopt": f"{added:+.0f} ms"}
    return [Section("import, processor time", timings, "torch", notes=notes)]


def _start(code: str) -> None:
    # With byte code, as pip installs it; the rounds that do not count write it.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def _of_children() -> float:
    times = os.times()
    return times.children_user + times.children_system
