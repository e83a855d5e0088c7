"""What a balanced step costs: `python -m benchmarks.speed`, or `make bench`.

Times, interleaved in one process, the step of the base optimizer (torch's default, foreach, fused), the published loops
written naively, and ours; prints ratios with their spread, writes JSON and the table of docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import balanceopt as bo
from balanceopt.modulation import Modulation
from benchmarks import naive
from benchmarks.shapes import CASES, INPUTS, Model
from benchmarks.timing import Contender, Timing, measure

BASES: dict[str, dict[str, Any]] = {"default": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}
METHODS: dict[str, Callable[[], Modulation]] = {
    "OGM": lambda: bo.OGM(0.3, noise=False),
    "OGM, lr": lambda: bo.OGM(0.3, noise=False, apply_to="lr"),
    "OGM-GE": lambda: bo.OGM(0.3),
    "OGM-GE, compiled": lambda: bo.OGM(0.3, noise="compiled"),
    "OGM-GE, pool": lambda: bo.OGM(0.3, noise="pool"),
    "AMSS": lambda: bo.AMSS(),
    "AMSS+": lambda: bo.AMSS(scale="unbiased"),
    "AMSS, frozen": lambda: bo.AMSS(masked="frozen"),
}
MARK = "<!-- table of benchmarks.speed -->"


class Setting:
    """A model with gradients, and the contenders that step it."""

    def __init__(self, shapes: list[tuple[int, ...]], device: torch.device, batch: int) -> None:
        torch.manual_seed(0)
        self.model = Model(shapes).to(device)
        self.device = device
        self.inputs = (torch.randn(batch, INPUTS, device=device), torch.randn(batch, INPUTS, device=device))
        self.labels = torch.randint(6, (batch,), device=device)
        self.carried = list(self.model.carried())
        self.gradients = [torch.randn_like(p) * 1e-3 for p in self.carried]
        for p, gradient in zip(self.carried, self.gradients, strict=True):
            p.grad = gradient.clone()
        self.unimodal = torch.randn(2, batch, 6, device=device)

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
        groups = bo.modality_groups(self.model, {"first": "first", "second": "second"})
        return torch.optim.SGD(groups, lr=1e-6, momentum=0.9, **options)

    def plain(self, options: dict[str, Any]) -> Contender:
        """The base optimizer's step alone."""
        return Contender(self.base(options).step, self.backward)

    def ours(self, method: Callable[[], Modulation], options: dict[str, Any]) -> Contender:
        """The same step modulated."""
        monitor = bo.ModalityMonitor(self.model, {"first": "first", "second": "second"}, head="head")
        optimizer = bo.ModulatedOptimizer(self.base(options), monitor, method())
        return Contender(optimizer.step, self.backward)

    def published(self, method: str, options: dict[str, Any]) -> Contender:
        """The published loop and the same step."""
        optimizer = self.base(options)
        parameters = {"first": list(self.model.first.carried), "second": list(self.model.second.carried)}

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
    rows = {f"plain, {name}": setting.plain(other) for name, other in BASES.items()}
    rows |= {
        f"published {name}": setting.published(name, options) for name in ("OGM", "OGM-GE", "AMSS", "AMSS+")
    }
    return rows | {name: setting.ours(method, options) for name, method in METHODS.items()}


def table(results: dict[str, dict[str, Timing]], base: str) -> str:
    """The results as Markdown: times the base's step, with quartiles, and how much faster than the published loop."""
    lines = []
    for case, timings in results.items():
        reference = timings[f"plain, {base}"]
        lines += [
            f"**{case}**, base step ({base}) {reference.median * 1e3:.1f} ms",
            "",
            "| step | x base | quartiles | published / this |",
            "|---|--:|--:|--:|",
        ]
        for name, timing in timings.items():
            published = timings.get(f"published {name.split(',')[0]}")
            faster = f"{timing.ratio_to(published) ** -1:.1f}" if published and name in METHODS else ""
            low, high = timing.low / reference.median, timing.high / reference.median
            lines.append(f"| {name} | {timing.ratio_to(reference):.2f} | {low:.2f} - {high:.2f} | {faster} |")
        lines.append("")
    return "\n".join(lines)


def write_into(page: Path, text: str) -> None:
    """Replace what stands between the two marks of a page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(MARK)
    _, found, after = rest.partition(MARK)
    if not found:
        raise ValueError(f"{page} should hold two lines {MARK!r}. Found fewer.")
    page.write_text(f"{before}{MARK}\n{text}\n{MARK}{after}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES)[:2])
    parser.add_argument("--base", choices=BASES, default="fused", help="kind of SGD that the methods wrap")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("out/speed"))
    parser.add_argument("--page", type=Path, help="write the table into this page, between its marks")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    results = {}
    for case in options.cases:
        rows = contenders(Setting(CASES[case](), device, options.batch), options.base)
        results[case] = measure(rows, options.repetitions, device)
    text = table(results, options.base)
    options.out.mkdir(parents=True, exist_ok=True)
    numbers = {case: {name: asdict(t) for name, t in timings.items()} for case, timings in results.items()}
    (options.out / "speed.json").write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    (options.out / "speed.md").write_text(text, encoding="utf-8")
    if options.page is not None:
        write_into(options.page, text)
    print(text)


if __name__ == "__main__":
    main()
