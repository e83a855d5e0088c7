"""`python -m benchmarks.relearn`: every method on real data with and without uni-modal losses, purities over time.

Two parts: `table` (accuracy of each method, white noise on one modality if asked for) and `curves` (purity and accuracy
after each epoch of one run, with and without re-learning).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

import balanceopt as bo
from benchmarks.data import MultimodalData, av_digits, load
from benchmarks.extras import need
from benchmarks.methods import METHODS, Build, Context, Method, with_relearning, with_unimodal_losses
from benchmarks.models import MultimodalClassifier, classifier_for
from benchmarks.report import mean_and_spread
from benchmarks.training import RECIPES, Recipe, evaluate, fit, linear_probe, train_alone

Noise = Literal["image", "audio"] | None

# Each of them is run as it is and with uni-modal losses.
ROWS = ("joint", "OGM-GE", "OPM", "AMSS", "AMSS+", "Re-learning")
# What rows can be asked for: the methods, and re-learning with the package's default in place of the published one.
BUILDS: dict[str, Build] = {
    **METHODS,
    "Re-learning, equal counts": with_relearning(METHODS["joint"], equal_counts=True),
}


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        accuracy: percent of the test samples.
        probes: of a linear probe on each modality's encoder.
        gaps: at each re-initialisation, by modality.
    """

    accuracy: float
    probes: dict[str, float]
    gaps: list[dict[str, float]]


@dataclass(frozen=True)
class Epoch:
    """What was seen after an epoch, and once more after a re-initialisation.

    Args:
        number: counted from 1.
        relearned: whether the encoders were taken back just now.
        accuracy: percent of the test samples.
        train_purity: by modality.
        val_purity: by modality.
        strength: by modality; zeros where nothing was taken back.
    """

    number: int
    relearned: bool
    accuracy: float
    train_purity: dict[str, float]
    val_purity: dict[str, float]
    strength: dict[str, float]


# -- table -----------------------------------------------------------------------------------------------------------


def rows(names: Sequence[str] = ROWS) -> dict[str, Build]:
    """Methods, then the same with uni-modal losses."""
    plain = {name: BUILDS[name] for name in names}
    return {**plain, **{f"{name} + uni-modal losses": with_unimodal_losses(b) for name, b in plain.items()}}


def train(data: MultimodalData, build: Build, recipe: Recipe, seed: int) -> Run:
    """One run with a method."""
    torch.manual_seed(seed)
    model = classifier_for(data)
    recorder = fit(model, build, data, recipe, seed=seed)
    gaps: dict[int, dict[str, float]] = {}
    for row in recorder.rows() if recorder is not None else ():
        if row.quantity == "gap":
            gaps.setdefault(row.step, {})[row.modality] = row.value
    probes = {name: linear_probe(encoder, data, name) for name, encoder in model.encoders.items()}
    return Run(evaluate(model, data.test), probes, list(gaps.values()))


def alone(data: MultimodalData, modality: str, recipe: Recipe, seed: int) -> Run:
    """The encoder of one modality, trained by itself."""
    model = train_alone(data, modality, recipe, seed=seed)
    probe = linear_probe(model.encoders[modality], data, modality)
    return Run(evaluate(model, data.test), {modality: probe}, [])


def table(runs: dict[str, list[Run]], modalities: Sequence[str]) -> str:
    """Markdown: accuracy, its paired difference to joint training, probes."""
    lines = [_row(["", "accuracy", "against joint", *(f"{m} probe" for m in modalities)])]
    lines.append(_row(["---"] * (3 + len(modalities))))
    joint = [run.accuracy for run in runs["joint"]]
    for name, found in runs.items():
        accuracy = [run.accuracy for run in found]
        difference = [a - b for a, b in zip(accuracy, joint, strict=False)]
        probes = [[run.probes[m] for run in found if m in run.probes] for m in modalities]
        cells = [mean_and_spread(accuracy), "" if name == "joint" else mean_and_spread(difference)]
        lines.append(_row([name, *cells, *(mean_and_spread(values) if values else "" for values in probes)]))
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


# -- curves ----------------------------------------------------------------------------------------------------------


def epochs_of(data: MultimodalData, recipe: Recipe, seed: int, *, relearns: bool) -> list[Epoch]:
    """Purity and accuracy after each epoch, before and after each re-initialisation."""
    torch.manual_seed(seed)
    model = classifier_for(data)
    seen: list[Epoch] = []

    def watched(model: MultimodalClassifier, context: Context) -> Method:
        method = METHODS["joint"](model, context)
        scheduler = _scheduler(method, context)

        def look(relearned: bool, found: bo.Diagnosis) -> None:
            accuracy = evaluate(model, data.test)
            strength = found.strength if relearned else dict.fromkeys(found.strength, 0.0)
            number = scheduler.last_epoch + (not relearned)
            seen.append(Epoch(number, relearned, accuracy, found.train_purity, found.val_purity, strength))

        def end_of_epoch() -> None:
            look(False, scheduler.diagnose())
            found = scheduler.step() if relearns else None
            if not relearns:
                scheduler.last_epoch += 1
            if found is not None:
                after = scheduler.diagnose()
                look(True, replace(after, strength=found.strength))

        return replace(method, epoch_ends=(end_of_epoch,))

    fit(model, watched, data, recipe, seed=seed)
    return seen


def _scheduler(method: Method, context: Context, **options: Any) -> bo.ReLearnScheduler:
    optimizer: Any = method.optimizer
    settings = {
        "every": 5,
        "epochs": context.epochs,
        "lam": 7.0,
        "equal_counts": False,
        "seed": context.seed,
        **options,
    }
    return bo.ReLearnScheduler(
        optimizer, optimizer.monitor, context.train_loader, context.val_loader, **settings
    )


def draw(plain: list[Epoch], relearned: list[Epoch], path: Path) -> None:
    """Purities by modality, then accuracies, over epochs."""
    figure_of = need("matplotlib.figure").Figure
    modalities = list(plain[0].train_purity)
    figure = figure_of(figsize=(7, 2.4 * (len(modalities) + 1)), layout="constrained")
    axes = figure.subplots(len(modalities) + 1, 1, sharex=True)
    back = [e.number for e in relearned if e.relearned]
    for panel, name in zip(axes, modalities, strict=False):
        for epochs, colour, label in ((plain, "#999999", "joint"), (relearned, "#0072B2", "re-learning")):
            x = [e.number for e in epochs]
            panel.plot(x, [e.train_purity[name] for e in epochs], color=colour, label=f"{label}, training")
            panel.plot(
                x,
                [e.val_purity[name] for e in epochs],
                color=colour,
                linestyle="--",
                label=f"{label}, validation",
            )
        panel.set_ylabel(f"purity of {name}")
        panel.legend(frameon=False, fontsize="small", loc="lower right")
    axes[-1].plot([e.number for e in plain], [e.accuracy for e in plain], color="#999999", label="joint")
    axes[-1].plot(
        [e.number for e in relearned], [e.accuracy for e in relearned], color="#0072B2", label="re-learning"
    )
    axes[-1].set_ylabel("test accuracy, %")
    axes[-1].set_xlabel("epoch")
    axes[-1].legend(frameon=False, fontsize="small", loc="lower right")
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        for number in back:
            panel.axvline(number, color="#D55E00", linewidth=0.8, linestyle=":")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


# -- command line ----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts asked for, print and save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.relearn", description=__doc__)
    parser.add_argument("parts", nargs="*", default=["table", "curves"])
    parser.add_argument(
        "--data", type=Path, help="av_digits.npz or mfeat.npz; scikit-learn's digits by default"
    )
    parser.add_argument(
        "--noise", choices=["image", "audio"], help="white noise on one modality of av_digits"
    )
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=BUILDS, help="methods of the table")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, help="instead of the recipe's own")
    parser.add_argument("--out", type=Path, default=Path("out/relearn"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    name = load(options.data, 0).name
    recipe = RECIPES[name] if options.epochs is None else replace(RECIPES[name], epochs=options.epochs)
    sets = {seed: _data(options.data, options.noise, seed) for seed in range(options.seeds)}
    stem = options.out / f"{name}{f'_noise_{options.noise}' if options.noise else ''}"
    options.out.mkdir(parents=True, exist_ok=True)
    if "table" in options.parts:
        _make_table(sets, recipe, stem, rows(options.rows))
    if "curves" in options.parts:
        plain, again = (epochs_of(sets[0], recipe, 0, relearns=r) for r in (False, True))
        content = {"joint": [asdict(e) for e in plain], "re-learning": [asdict(e) for e in again]}
        Path(f"{stem}_curves.json").write_text(json.dumps(content) + "\n", encoding="utf-8")
        draw(plain, again, Path(f"{stem}_curves.png"))


def _make_table(
    sets: dict[int, MultimodalData], recipe: Recipe, stem: Path, builds: dict[str, Build]
) -> None:
    modalities = sets[0].modalities
    runs: dict[str, list[Run]] = {f"{m} alone": [] for m in modalities}
    runs |= {name: [] for name in builds}
    with need("tqdm").tqdm(total=len(sets) * len(runs), unit=" runs") as bar:
        for seed, data in sets.items():
            for modality in modalities:
                runs[f"{modality} alone"].append(alone(data, modality, recipe, seed))
                bar.update()
            for name, build in builds.items():
                runs[name].append(train(data, build, recipe, seed))
                bar.update()
            content = {name: [asdict(run) for run in found] for name, found in runs.items()}
            Path(f"{stem}.json").write_text(json.dumps(content) + "\n", encoding="utf-8")
    text = table(runs, modalities)
    Path(f"{stem}.md").write_text(f"{text}\n", encoding="utf-8")
    print(text)


def _data(path: Path | None, noise: Noise, seed: int) -> MultimodalData:
    if noise is None:
        return load(path, seed)
    assert path is not None
    return av_digits(path, fold=seed, noise=noise, seed=seed)


if __name__ == "__main__":
    main()
