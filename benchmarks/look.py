"""`python -m benchmarks.look`: the report of plain training on real data, and whether its findings were right.

Each model is trained jointly and watched; the report says which encoder is starved or has little to say. Then each
encoder is trained alone by the same recipe, which is the truth that the findings are compared with.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import balanceopt as bo
from benchmarks.command import positive
from benchmarks.data import MultimodalData, Split, av_digits, digits_views, mfeat
from benchmarks.evidence.sets import data_of
from benchmarks.models import classifier_for
from benchmarks.report import aligned
from benchmarks.training import RECIPES, Recipe, batches, evaluate, linear_probe

# Points of 100 that an encoder gains alone when it was starved, and that it stays behind when it has little to say.
STARVED, LITTLE = 3.0, 10.0


@dataclass(frozen=True)
class Watched:
    """A watched training.

    Args:
        report: of the run.
        known: what each encoder knows at the end, by the online probe on validation samples, from 0 to 1.
        tested: the same by a logistic regression on test samples, in percent.
        accuracy: of the model on test samples, in percent.
        recorder: what was recorded.
    """

    report: bo.Report
    known: dict[str, float]
    tested: dict[str, float]
    accuracy: float
    recorder: bo.Recorder


def watch(
    data: MultimodalData,
    recipe: Recipe,
    *,
    modalities: Sequence[str] | None = None,
    seed: int = 0,
    on_epoch: Callable[[], object] = lambda: None,
) -> Watched:
    """Train plainly by SGD, watched by a recorder and probes; every epoch ends with a validation pass."""
    torch.manual_seed(seed)
    model = classifier_for(data, modalities)
    encoders: dict[str, nn.Module] = dict(model.encoders.items())
    monitor = bo.ModalityMonitor(model, encoders, head=model.head)
    probes = bo.ProbeMonitor(monitor)
    recorder = bo.Recorder(monitor, probes)
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe.lr, momentum=recipe.momentum)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [recipe.decay_epoch], gamma=0.1)
    for _ in range(recipe.epochs):
        model.train()
        for *inputs, labels in batches(data.train, tuple(encoders), recipe.batch_size, seed):
            optimizer.zero_grad()
            F.cross_entropy(model(*inputs), labels).backward()
            optimizer.step()
        scheduler.step()
        validate(model, monitor, data.val)
        on_epoch()
    known = probes.results()
    tested = {name: linear_probe(encoder, data, name) for name, encoder in encoders.items()}
    report = bo.report(recorder)
    monitor.remove()
    return Watched(report, known, tested, evaluate(model, data.test), recorder)


def validate(model: nn.Module, monitor: bo.ModalityMonitor, split: Split) -> None:
    """Pass validation samples through the model, which is all that probes need."""
    model.eval()
    with torch.no_grad():
        model(*(split.inputs[name] for name in monitor.modalities))
        monitor.observe(split.labels)


def sets(folder: Path) -> dict[str, Callable[[int], MultimodalData]]:
    """Real data by name, as functions of a seed."""
    av = partial(_av_digits, folder / "av_digits.npz")
    return {
        "mfeat": lambda seed: mfeat(folder / "mfeat.npz", seed=seed),
        "av_digits, clean": partial(av, None),
        "av_digits, noise on the image": partial(av, "image"),
        "av_digits, noise on the audio": partial(av, "audio"),
        "digits": digits_views,
        **{name: partial(data_of, name, folder, "test") for name in ("watch", "films", "segments")},
    }


def judged(data: MultimodalData, recipe: Recipe, seed: int) -> tuple[bo.Report, list[list[str]]]:
    """Watch joint training, train each encoder alone, and compare: a row for each encoder."""
    joint = watch(data, recipe, seed=seed)
    alone = {name: watch(data, recipe, modalities=[name], seed=seed) for name in data.modalities}
    reached = {name: run.known[name] for name, run in alone.items()}
    rows = []
    for name in data.modalities:
        said = [f for f in joint.report.findings if f.modality == name and f.rule in _CLAIMS]
        lost = 100 * (reached[name] - joint.known[name])
        truth = (lost >= STARVED, 100 * (max(reached.values()) - reached[name]) >= LITTLE)
        rows.append(
            [
                name,
                f"{100 * joint.known[name]:.1f}",
                f"{100 * reached[name]:.1f}",
                f"{alone[name].tested[name] - joint.tested[name]:+.1f}",
                said[0].rule if said else "fine",
                _words(*truth),
                verdict(said[0].rule if said else "fine", starved=truth[0], little=truth[1]),
            ]
        )
    return joint.report, rows


# What a finding claims: that the encoder is starved, that its modality has little to say; None is no claim.
_CLAIMS: dict[str, tuple[bool | None, bool | None]] = {
    "fine": (False, False),
    "starved": (True, False),
    "starved and scarce": (True, None),
    "scarce": (False, True),
    "weak": (None, None),
}
HEADER = ["encoder", "joint", "alone", "lost on test", "finding", "truth", "right"]


def verdict(rule: str, *, starved: bool, little: bool) -> str:
    """Whether what a finding claims is true: yes, no, or no claim."""
    claims = [
        (claim, fact)
        for claim, fact in zip(_CLAIMS[rule], (starved, little), strict=True)
        if claim is not None
    ]
    if not claims:
        return "no claim"
    return "yes" if all(claim == fact for claim, fact in claims) else "no"


def _words(starved: bool, little: bool) -> str:
    return " and ".join(["starved"] * starved + ["says little"] * little) or "fine"


def _av_digits(path: Path, noise: str | None, seed: int) -> MultimodalData:
    return av_digits(path, fold=seed, seed=seed, noise=noise)  # type: ignore[arg-type]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the reports and the comparison; write the pages."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.look", description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the .npz files")
    parser.add_argument("--out", type=Path, default=Path("out/look"), help="folder for the pages")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=positive, help="instead of the recipe's own")
    parser.add_argument("--sets", nargs="+", help="names or their beginnings; all by default")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    table = [["data", *HEADER]]
    for name, load in sets(options.data).items():
        if options.sets and not name.startswith(tuple(options.sets)):
            continue
        try:
            data = load(options.seed)
        except FileNotFoundError as error:
            parser.error(str(error))
        recipe = RECIPES[data.name]
        recipe = replace(recipe, epochs=options.epochs or recipe.epochs)
        report, rows = judged(data, recipe, options.seed)
        page = options.out / f"{name.replace(', ', '_').replace(' ', '_')}.html"
        report.to_html(page, title=f"Joint training on {name}")
        print(f"== {name} ==\n\n{report}\n\n{page}\n", flush=True)
        table += [[name, *row] for row in rows]
        print(aligned(table), flush=True)


if __name__ == "__main__":
    main()
