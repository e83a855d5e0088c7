"""The monitor alone: what hooks, labels and scores add to a forward and backward.

Against a forward and backward of two ResNet-18 encoders it is lost in their noise. So it is measured around a model
that does next to nothing, with features of the same size, and compared with them afterwards.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import balanceopt as bo
from benchmarks.resnet import ResNet18
from benchmarks.speed_options import Options
from benchmarks.speed_report import Growth, Section
from benchmarks.speed_training import Training
from benchmarks.timing import Contender, Timing, measure

FEATURES = 512


class Bare(nn.Module):
    """Encoders that only hold features, and a linear head."""

    def __init__(self, classes: int, modalities: int = 2) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({f"m{i}": nn.Linear(1, FEATURES) for i in range(modalities)})
        self.head = nn.Linear(modalities * FEATURES, classes)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.head(torch.cat([e(x) for e, x in zip(self.encoders.values(), inputs, strict=True)], 1))


def added(
    options: Options, batch: int, classes: int = 6, modalities: int = 2, **given: Any
) -> tuple[Contender, Contender]:
    """A forward and backward, without and with a monitor whose scores are taken."""
    found = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = Bare(classes, modalities).to(options.device)
        inputs = [torch.randn(batch, 1, device=options.device) for _ in range(modalities)]
        labels = torch.randint(classes, (batch,), device=options.device)
        accumulator = None
        if watched:
            monitor = bo.ModalityMonitor(model, dict(model.encoders.items()), head="head", **given)
            accumulator = monitor.scores()

        def run(
            model: Any = model, inputs: Any = inputs, labels: Any = labels, taker: Any = accumulator
        ) -> None:
            F.cross_entropy(model(*inputs), labels).backward()
            if taker is not None:
                taker.take()

        found.append(Contender(run))
    return found[0], found[1]


class Bypassed(nn.Module):
    """An encoder with a ResNet-18's weights, which only hands on features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weights = ResNet18(width=width)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


class Standing(torch.optim.Optimizer):
    """An optimizer whose step does nothing, so that only what is around it takes time."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do nothing."""


def recorded(options: Options, batch: int) -> tuple[Contender, Contender]:
    """A training step on the weights and gradients of two ResNet-18, without and with a recorder of the monitor."""
    found = []
    for watched in (False, True):
        torch.manual_seed(0)
        width = 4 if options.quick else 64
        model = Bare(6)
        model.encoders = nn.ModuleDict({f"m{i}": Bypassed(width) for i in range(2)})
        model = model.to(options.device)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        inputs = [torch.randn(batch, FEATURES, device=options.device) for _ in range(2)]
        labels = torch.randint(6, (batch,), device=options.device)
        monitor = bo.ModalityMonitor(model, dict(model.encoders.items()), head="head")
        optimizer = Standing(model.parameters(), {})
        recorder = bo.Recorder(monitor) if watched else None

        def run(
            model: Any = model,
            inputs: Any = inputs,
            labels: Any = labels,
            optimizer: Any = optimizer,
            kept: Any = recorder,
        ) -> None:
            F.cross_entropy(model(*inputs), labels).backward()
            optimizer.step()

        found.append(Contender(run))
    return found[0], found[1]


def difference(without: Timing, with_: Timing) -> Timing:
    """What was added, by medians."""
    extra = max(with_.median - without.median, 0.0)
    return Timing(extra, max(with_.low - without.high, 0.0), max(with_.high - without.low, 0.0))


def cost(options: Options, batch: int, **given: Any) -> Timing:
    """What a monitor adds."""
    without, watched = added(options, batch, **given)
    rows = measure({"without": without, "with": watched}, 3 * options.repetitions, options.device)
    return difference(rows["without"], rows["with"])


def run(options: Options) -> list[Section | Growth]:
    """What it adds, beside a forward and backward of two ResNet-18 encoders."""
    batch = 4 if options.quick else 64
    training = Training(options, batch)
    reference = "forward + backward"
    whole = Contender(lambda: training.backward(training.base))
    timings = measure({reference: whole}, max(3, options.repetitions // 3), options.device, warm_up=1)
    timings["scores, split head"] = cost(options, batch)
    timings["scores, zero-out"] = cost(options, batch, scores="zero-out")
    without, watched = recorded(options, batch)
    rows = measure({"without": without, "with": watched}, 3 * options.repetitions, options.device)
    timings["recorder, all signals"] = difference(rows["without"], rows["with"])
    notes = {
        name: f"{100 * timing.ratio_to(timings[reference]):.2f} %"
        for name, timing in timings.items()
        if name != reference
    }
    return [Section(f"monitor, batch {batch}", timings, reference, notes=notes)]
