"""Whole training steps: forward, backward and step of two ResNet-18 encoders on pictures of 64 x 64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import balanceopt as bo
from balanceopt.modulation import Modulation
from benchmarks import naive
from benchmarks.resnet import ResNet18
from benchmarks.speed_options import Options
from benchmarks.speed_report import Section
from benchmarks.speed_step import BASES, METHODS, available
from benchmarks.timing import Contender, measure

CLASSES = 6
ROWS: dict[str, Callable[[], Modulation]] = {
    "OGM": METHODS["OGM"],
    "OGM-GE, compiled": METHODS["OGM-GE, compiled"],
    "AMSS": METHODS["AMSS"],
    "AMSS+": METHODS["AMSS+"],
}


class TwoPictures(nn.Module):
    """Two encoders and a linear head."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({name: ResNet18(width=width) for name in ("first", "second")})
        self.head = nn.Linear(2 * 8 * width, CLASSES)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.head(torch.cat([self.encoders["first"](first), self.encoders["second"](second)], 1))


class Training:
    """One way to train, on a model of its own."""

    def __init__(self, options: Options, batch: int) -> None:
        torch.manual_seed(0)
        size = (batch, 3, 16, 16) if options.quick else (batch, 3, 64, 64)
        self.model = TwoPictures(4 if options.quick else 64).to(options.device)
        self.encoders: dict[str, nn.Module] = dict(self.model.encoders.items())
        self.inputs = [torch.randn(size, device=options.device) for _ in range(2)]
        self.labels = torch.randint(CLASSES, (batch,), device=options.device)
        groups = bo.modality_groups(self.model, self.encoders)
        self.base = torch.optim.SGD(groups, lr=1e-4, momentum=0.9, **BASES[options.base])

    def plain(self) -> Contender:
        """The base optimizer."""
        return Contender(lambda: self.step(self.base))

    def ours(self, method: Callable[[], Modulation]) -> Contender:
        """The base optimizer, modulated."""
        monitor = bo.ModalityMonitor(self.model, self.encoders, head="head")
        optimizer = bo.ModulatedOptimizer(self.base, monitor, method())
        return Contender(lambda: self.step(optimizer))

    def published(self) -> Contender:
        """The loop of OGM-GE."""
        unimodal = torch.randn(2, len(self.labels), CLASSES, device=self.labels.device)
        parameters = {name: list(encoder.parameters()) for name, encoder in self.encoders.items()}

        def run() -> None:
            self.backward(self.base)
            naive.ogm(parameters, unimodal, self.labels, 0.3, noise=True)
            self.base.step()

        return Contender(run)

    def step(self, optimizer: Any) -> None:
        """As a user writes it."""
        self.backward(optimizer)
        optimizer.step()

    def backward(self, optimizer: Any) -> None:
        """Up to the gradients."""
        optimizer.zero_grad()
        F.cross_entropy(self.model(*self.inputs), self.labels).backward()


def run(options: Options) -> list[Section]:
    """A section for each batch size."""
    found = []
    for batch in (4,) if options.quick else (16, 64):
        reference = f"plain, {options.base}"
        rows = {reference: Training(options, batch).plain()}
        rows["published OGM-GE"] = Training(options, batch).published()
        rows |= {
            name: Training(options, batch).ours(method)
            for name, method in available(ROWS, options.device).items()
        }
        timings = measure(rows, max(3, options.repetitions // 2), options.device, warm_up=1)
        pairs = {name: "published OGM-GE" for name in rows if name.startswith("OGM-GE")}
        found.append(Section(f"training step, batch {batch}", timings, reference, pairs))
    return found
