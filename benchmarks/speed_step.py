"""An optimizer's step alone: torch's, the published loops, ours, on parameters of realistic shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import balanceopt as bo
from balanceopt.modulation import Modulation
from balanceopt.modulation._noise_compiled import warm_up
from benchmarks import naive
from benchmarks.shapes import CASES, INPUTS, Model, Shape
from benchmarks.speed_options import Options
from benchmarks.speed_report import Section
from benchmarks.timing import Contender, measure

BASES: dict[str, dict[str, Any]] = {"default": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}
METHODS: dict[str, Callable[[], Modulation]] = {
    "OGM": lambda: bo.OGM(0.3, noise=False),
    "OGM, update": lambda: bo.OGM(0.3, noise=False, apply_to="update"),
    "OGM-GE": lambda: bo.OGM(0.3),
    "OGM-GE, compiled": lambda: bo.OGM(0.3, noise="compiled"),
    "AMSS": lambda: bo.AMSS(),
    "AMSS+": lambda: bo.AMSS(scale="unbiased"),
}
PUBLISHED = ("OGM", "OGM-GE", "AMSS", "AMSS+")


class Setting:
    """A model with gradients, and the contenders that step it."""

    def __init__(self, shapes: list[Shape], options: Options, modalities: int = 2) -> None:
        torch.manual_seed(0)
        device = options.device
        self.model = Model(shapes, modalities=modalities).to(device)
        self.inputs = [torch.randn(options.batch, INPUTS, device=device) for _ in range(modalities)]
        self.labels = torch.randint(6, (options.batch,), device=device)
        self.carried = list(self.model.carried())
        self.gradients = [torch.randn_like(p) * 1e-3 for p in self.carried]
        for p, gradient in zip(self.carried, self.gradients, strict=True):
            p.grad = gradient.clone()
        self.unimodal = torch.randn(2, options.batch, 6, device=device)

    def backward(self) -> None:
        """Gradients as after a backward, in the same memory each time, and scores for whoever watches."""
        F.cross_entropy(self.model(*self.inputs), self.labels).backward()
        with torch.no_grad():
            for p, gradient in zip(self.carried, self.gradients, strict=True):
                if p.grad is None:
                    p.grad = gradient.clone()
                else:
                    p.grad.copy_(gradient)

    def base(self, options: dict[str, Any]) -> torch.optim.SGD:
        """The base optimizer, with a small learning rate: hundreds of steps must leave numbers ordinary."""
        groups = bo.modality_groups(self.model, self.model.modalities)
        return torch.optim.SGD(groups, lr=1e-6, momentum=0.9, **options)

    def plain(self, options: dict[str, Any]) -> Contender:
        """The base optimizer's step alone."""
        return Contender(self.base(options).step, self.backward)

    def ours(self, method: Callable[[], Modulation], options: dict[str, Any]) -> Contender:
        """The same step modulated."""
        monitor = bo.ModalityMonitor(self.model, self.model.modalities, head="head")
        optimizer = bo.ModulatedOptimizer(self.base(options), monitor, method())
        return Contender(optimizer.step, self.backward)

    def published(self, method: str, options: dict[str, Any]) -> Contender:
        """The published loop and the same step."""
        optimizer = self.base(options)
        parameters = {name: list(encoder.carried) for name, encoder in self.model.modalities.items()}

        def run() -> None:
            if method.startswith("OGM"):
                naive.ogm(parameters, self.unimodal, self.labels, 0.3, noise=method == "OGM-GE")
            else:
                naive.amss(parameters, (0.31, 0.69), unbiased=method == "AMSS+")
            optimizer.step()

        return Contender(run, self.backward)


def contenders(setting: Setting, base: str) -> dict[str, Contender]:
    """Every row of a case's table on one kind of base."""
    options = BASES[base]
    rows = {base: setting.plain(options)}
    rows |= {f"{name} alone": setting.plain(other) for name, other in BASES.items() if name != base}
    rows |= {f"published {name}": setting.published(name, options) for name in PUBLISHED}
    methods = available(METHODS, setting.labels.device)
    return rows | {name: setting.ours(method, options) for name, method in methods.items()}


def available(
    methods: dict[str, Callable[[], Modulation]], device: torch.device
) -> dict[str, Callable[[], Modulation]]:
    """Without those that are compiled, where nothing can be."""
    try:
        warm_up(device)
    except RuntimeError:
        return {name: method for name, method in methods.items() if "compiled" not in name}
    return methods


def against(names: list[str]) -> dict[str, str]:
    """The published row that each of ours is compared with."""
    pairs = {name: f"published {name.split(',')[0]}" for name in METHODS}
    return {name: other for name, other in pairs.items() if name in names and other in names}


def run(options: Options) -> list[Section]:
    """A section for each case."""
    found = []
    for case in options.cases:
        rows = contenders(Setting(CASES[case](), options), options.base)
        timings = measure(rows, options.repetitions, options.device)
        found.append(Section(f"{case}, step", timings, options.base, against(list(timings))))
    return found
