"""A training step with each method of the package: forward, backward and step beside the bare loop, in processor time.

Processor time on one thread, so that what else runs on the machine matters little, and ratios to the bare loop's steps
right before and after.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import balanceopt as bo
from benchmarks.speed_options import Options
from benchmarks.speed_report import Section
from benchmarks.speed_step import BASES
from benchmarks.speed_training import CLASSES, TwoPictures
from benchmarks.timing import Contender, Timing, processor_seconds, summary

BARE, AGAIN = "bare loop", "another bare loop"
EPOCH = 4  # batches
Step = Callable[[], None]


class Loop:
    """One model in training, and what a method may need of its loop."""

    def __init__(self, options: Options) -> None:
        torch.manual_seed(0)
        batch, size = (4, 16) if options.quick else (32, 40)
        self.model = TwoPictures(4 if options.quick else 24).to(options.device)
        self.encoders = dict(self.model.encoders.items())
        self.inputs = [torch.randn(batch, 3, size, size, device=options.device) for _ in range(2)]
        self.labels = torch.arange(batch, device=options.device) % CLASSES
        groups = bo.modality_groups(self.model, self.encoders)
        self.optimizer: Any = torch.optim.SGD(groups, lr=1e-4, momentum=0.9, **BASES[options.base])
        self.held: list[Any] = []  # what acts as long as it is held

    def monitor(self) -> bo.ModalityMonitor:
        return bo.ModalityMonitor(self.model, self.encoders, head="head")

    def wrap(self, monitor: bo.ModalityMonitor, method: bo.Modulation) -> None:
        self.optimizer = bo.ModulatedOptimizer(self.optimizer, monitor, method, seed=0)
        self.optimizer.set_epoch(0)

    def objective(self, monitor: bo.ModalityMonitor, **options: Any) -> bo.UnimodalObjective:
        objective = bo.UnimodalObjective(monitor, CLASSES, seed=0, **options)
        heads = list(objective.parameters())
        if heads:
            self.optimizer.add_param_group({"params": heads})
        self.held.append(objective)
        return objective

    def step(self, loss: Callable[[Tensor], Tensor] | None = None) -> None:
        """As a user writes it; `loss` of the logits, cross-entropy by default."""
        self.optimizer.zero_grad()
        logits = self.model(*self.inputs)
        (F.cross_entropy(logits, self.labels) if loss is None else loss(logits)).backward()
        self.optimizer.step()


def bare(loop: Loop) -> Step:
    return loop.step


def modulation(make: Callable[[], bo.Modulation]) -> Callable[[Loop], Step]:
    def build(loop: Loop) -> Step:
        loop.wrap(loop.monitor(), make())
        return loop.step

    return build


def beside(make: Callable[[bo.ModalityMonitor], object]) -> Callable[[Loop], Step]:
    """What needs nothing but the monitor."""

    def build(loop: Loop) -> Step:
        loop.held.append(make(loop.monitor()))
        return loop.step

    return build


def unimodal(**options: Any) -> Callable[[Loop], Step]:
    def build(loop: Loop) -> Step:
        objective = loop.objective(loop.monitor(), **options)
        if objective.inject:
            return loop.step
        return lambda: loop.step(lambda f: F.cross_entropy(f, loop.labels) + objective(loop.labels))

    return build


def pareto(scope: Any) -> Callable[[Loop], Step]:
    def build(loop: Loop) -> Step:
        monitor = loop.monitor()
        loop.wrap(monitor, bo.MMPareto(loop.objective(monitor, inject=True), scope=scope))
        return loop.step

    return build


def total_correlation(loop: Loop) -> Step:
    objective = bo.TotalCorrelationLoss(loop.monitor())
    return lambda: loop.step(lambda f: objective(loop.labels))


def competition(loop: Loop) -> Step:
    term = bo.CompetitionObjective(loop.monitor(), seed=0)
    return lambda: loop.step(lambda f: F.cross_entropy(f, loop.labels) + term())


def blending(loop: Loop) -> Step:
    monitor = loop.monitor()
    loop.held.append(bo.ProbeMonitor(monitor, losses=True))
    objective = loop.objective(monitor)
    return lambda: loop.step(lambda f: F.cross_entropy(f, loop.labels) + objective(loop.labels))


METHODS: dict[str, Callable[[Loop], Step]] = {
    BARE: bare,
    "OGM": modulation(lambda: bo.OGM(0.3, noise=False)),
    "OGM, update": modulation(lambda: bo.OGM(0.3, noise=False, apply_to="update")),
    "OGM-GE": modulation(lambda: bo.OGM(0.3)),
    "AGM": modulation(bo.AGM),
    "MLB": modulation(bo.MLB),
    "InfoReg": modulation(bo.InfoReg),
    "FixedModulation": modulation(lambda: bo.FixedModulation({"first": 0.5})),
    "FixedModulation, frozen": modulation(lambda: bo.FixedModulation({"first": 0}, frozen=True)),
    "AMSS": modulation(bo.AMSS),
    "AMSS+": modulation(lambda: bo.AMSS(scale="unbiased")),
    "MMPareto, output": pareto("output"),
    "MMPareto, encoder": pareto("encoder"),
    "OPM": beside(lambda monitor: bo.OPM(monitor, seed=0)),
    "ModalityDropout": beside(lambda monitor: bo.ModalityDropout(monitor, seed=0)),
    "uni-modal losses, own heads": unimodal(),
    "uni-modal losses, shared head": unimodal(heads="shared"),
    "uni-modal losses, injected": unimodal(inject=True),
    "DGL": unimodal(joint=0),
    "TCMax": total_correlation,
    "MCR's competition": competition,
    "ProbeMonitor": beside(bo.ProbeMonitor),
    "gradient blending": blending,
    AGAIN: bare,
}


def epochs(options: Options) -> dict[str, Step]:
    """An epoch of some batches, bare and with a diagnosis after it."""

    def build(diagnosed: bool) -> Step:
        loop = Loop(options)
        batches = [(*loop.inputs, loop.labels)] * EPOCH
        scheduler: Any = None
        if diagnosed:
            scheduler = bo.ReLearnScheduler(
                *(loop.optimizer, loop.monitor(), batches, batches[:1]),
                every=1,
                epochs=10**6,
                max_relearns=None,
            )

        def run() -> None:
            for _ in batches:
                loop.step()
            if scheduler is not None:
                scheduler.step()

        return run

    names = {"bare epoch": False, "re-learning in each epoch": True, "another bare epoch": False}
    return {name: build(diagnosed) for name, diagnosed in names.items()}


def compared(steps: Mapping[str, Step], repetitions: int, device: torch.device) -> dict[str, Timing]:
    """Processor seconds by ratios to the first contender, which runs before and after each of the others.

    Args:
        steps: by name.
        repetitions: rounds.
        device: waited for before the clock is read.

    Returns:
        Median and quartiles of the ratios, times the first contender's median, by name.
    """
    first, *others = steps
    turns = {f"{first} 0": Contender(steps[first])}
    for number, name in enumerate(others, 1):
        turns |= {name: Contender(steps[name]), f"{first} {number}": Contender(steps[first])}
    seconds = processor_seconds(turns, repetitions, device)
    references = [seconds[f"{first} {number}"] for number in range(len(others) + 1)]
    unit = summary([value for values in references for value in values]).median
    timings = {first: Timing(unit, unit, unit)}
    for name, before, after in zip(others, references, references[1:], strict=False):
        rounds = zip(seconds[name], before, after, strict=True)
        ratio = summary([2 * value / (a + b) for value, a, b in rounds])
        timings[name] = Timing(ratio.median * unit, ratio.low * unit, ratio.high * unit)
    return timings


def run(options: Options) -> list[Section]:
    """A section of steps, and one of epochs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        steps = compared(
            {name: build(Loop(options)) for name, build in METHODS.items()},
            options.repetitions,
            options.device,
        )
        some = max(1, options.repetitions // 2)
        whole = compared(epochs(options), some, options.device)
    finally:
        torch.set_num_threads(threads)
    return [
        Section("a training step with each method, batch 32, one thread", steps, BARE),
        Section(f"an epoch of {EPOCH} batches, batch 32, one thread", whole, "bare epoch"),
    ]
