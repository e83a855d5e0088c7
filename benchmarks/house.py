"""How much of the package one training step runs: distinct functions, and the files that they stand in.

python -m benchmarks.house
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import balanceopt as bo

PACKAGE = Path(bo.__file__).parent
BATCHES = 3  # the last one is looked at: the first shows the monitor the way to the head


class Net(nn.Module):
    """Two encoders and a linear head over their concatenated features."""

    def __init__(self) -> None:
        super().__init__()
        self.audio, self.visual, self.fc = nn.Linear(5, 8), nn.Linear(7, 6), nn.Linear(14, 4)

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.cat([self.audio(x), self.visual(z)], 1))


@contextmanager
def functions_run() -> Iterator[set[tuple[str, int, str]]]:
    """The package's functions that run meanwhile: file, first line, name."""
    seen: set[tuple[str, int, str]] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if (
            event == "call"
            and code.co_filename.startswith(str(PACKAGE))
            and not code.co_name.startswith("<")  # comprehensions are a part of the function around them
        ):
            seen.add((str(Path(code.co_filename).relative_to(PACKAGE)), code.co_firstlineno, code.co_name))

    sys.setprofile(note)
    try:
        yield seen
    finally:
        sys.setprofile(None)


def a_step(wrap: Callable[[Any, Any], Any]) -> set[tuple[str, int, str]]:
    """What a whole training step runs: forward, backward, step and zero_grad."""
    torch.manual_seed(0)
    model = Net()
    monitor = bo.ModalityMonitor(model, {"audio": "audio", "visual": "visual"}, head="fc")
    optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.1), monitor)
    labels = torch.randint(4, (16,))
    # The audio tells the label, so that there is something to balance.
    audio = torch.cat([3 * F.one_hot(labels, 4).float(), torch.randn(16, 1)], 1)
    for batch in range(BATCHES):
        with functions_run() as seen:
            optimizer.zero_grad()
            F.cross_entropy(model(audio, torch.randn(16, 7)), labels).backward()
            optimizer.step()
        if batch == BATCHES - 1:
            return seen
    raise AssertionError


def a_diagnosis() -> set[tuple[str, int, str]]:
    """What `ReLearnScheduler.step` runs in an epoch in which it fires."""
    torch.manual_seed(0)
    model = Net()
    monitor = bo.ModalityMonitor(model, {"audio": "audio", "visual": "visual"})
    batches = [(torch.randn(16, 5), torch.randn(16, 7), torch.arange(16) % 4) for _ in range(3)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = bo.ReLearnScheduler(optimizer, monitor, batches, batches, every=1, epochs=9)
    scheduler.step()
    with functions_run() as seen:
        scheduler.step()
    return seen


def with_opm(optimizer: Any, monitor: Any) -> Any:
    """OPM alone: the optimizer stays as it is."""
    optimizer.opm = bo.OPM(monitor)  # lives as long as the optimizer
    return optimizer


ROWS: dict[str, Callable[[], set[tuple[str, int, str]]]] = {
    "OGM step": lambda: a_step(lambda o, m: bo.ModulatedOptimizer(o, m, bo.OGM(0.5, noise=False))),
    "OGM-GE step": lambda: a_step(lambda o, m: bo.ModulatedOptimizer(o, m, bo.OGM(0.5))),
    "AMSS step": lambda: a_step(lambda o, m: bo.ModulatedOptimizer(o, m, bo.AMSS())),
    "OPM step": lambda: a_step(with_opm),
    "diagnosis": a_diagnosis,
}


def size() -> tuple[int, int, int]:
    """Files and lines of the package, and lines that touch private names of torch."""
    texts = [path.read_text() for path in PACKAGE.rglob("*.py")]
    lines = [line for text in texts for line in text.splitlines()]
    private = re.compile(r"torch(\.\w+)*\._\w|from torch\S* import .*\b_\w|\._local_tensor|getattr\(.*\"_\w")
    return len(texts), len(lines), sum(bool(private.search(line)) for line in lines)


def main() -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    print("{} files, {} lines, {} of them on private torch".format(*size()))
    print(f"{'':14s}{'functions':>10s}{'files':>7s}")
    for name, row in ROWS.items():
        seen = row()
        print(f"{name:14s}{len(seen):10d}{len({file for file, *_ in seen}):7d}")
        if "-v" in sys.argv:
            for file, line, function in sorted(seen):
                print(f"    {file}:{line} {function}")


if __name__ == "__main__":
    main()
