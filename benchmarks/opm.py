"""`python -m benchmarks.opm`: what OPM does to accuracy, to speed of learning, and to the ratio that steers it."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import balanceopt as bo
from balanceopt.functional import discrepancy_ratio, linear_logits, true_class_score
from benchmarks.data import MultimodalData, av_digits, load
from benchmarks.experiment import _curves
from benchmarks.extras import need
from benchmarks.methods import METHODS, Build, Context, Method
from benchmarks.models import MultimodalClassifier, classifier_for
from benchmarks.report import mean_and_spread
from benchmarks.training import RECIPES, Recipe, evaluate, fit, linear_probe

# Steps between looks at the test accuracy.
_EVERY = 5
# Rate of plain modality dropout, what a practitioner would try first: of two modalities half of the samples lose one.
_FIXED = 0.3


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        accuracy: at the end, percent of the test samples.
        learning: `(steps, accuracy)` on the way.
        probes: of a linear probe on each modality's encoder.
        ratios: of the clean features, at each step, by modality.
        fused_ratios: the same as it would be read from what the head got, after the drop.
        q: mean drop probability by modality; none where nothing chooses one.
        seconds: of training, looks included.
    """

    accuracy: float
    learning: list[tuple[int, float]]
    probes: dict[str, float]
    ratios: dict[str, list[float]]
    fused_ratios: dict[str, list[float]]
    q: dict[str, float]
    seconds: float

    def steps_to(self, accuracy: float) -> float:
        """The first look at which it was reached; nan if at none."""
        return next((float(step) for step, found in self.learning if found >= accuracy), float("nan"))


class Look:
    """Called with the labels of each step, as one more loss: looks at the model, and is zero."""

    def __init__(self, model: MultimodalClassifier, data: MultimodalData) -> None:
        """Look at `model` on the test samples of `data`."""
        self.model = model
        self.data = data
        self.learning: list[tuple[int, float]] = []
        self.fused: list[list[float]] = []
        self.head = model.head
        assert isinstance(self.head, nn.Linear)
        self._fused = torch.empty(0)
        self._step = 0
        self._handle = self.head.register_forward_pre_hook(self._keep)

    def __call__(self, labels: Tensor) -> Tensor:
        assert isinstance(self.head, nn.Linear)
        with torch.no_grad():
            widths = [int(e.out_features) for e in self.model.encoders.values()]  # type: ignore[arg-type]
            logits = linear_logits(self._fused.split(widths, 1), self.head.weight, self.head.bias)
            self.fused.append(discrepancy_ratio(true_class_score(logits, labels)).tolist())
        if self._step % _EVERY == 0:
            self.learning.append((self._step, evaluate(self.model, self.data.test)))
            self.model.train()
        self._step += 1
        return torch.zeros(())

    def remove(self) -> None:
        self._handle.remove()

    def _keep(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if module.training:
            self._fused = args[0].detach()


def fixed_dropout(model: MultimodalClassifier, context: Context) -> Method:
    """About half of the samples of two modalities lose one, whoever is ahead."""
    method = METHODS["joint"](model, context)
    optimizer: Any = method.optimizer
    dropout = bo.ModalityDropout(optimizer.monitor, p=_FIXED, seed=context.seed)
    return replace(method, removes=(dropout.remove, *method.removes))


ROWS: dict[str, Build] = {**{name: METHODS[name] for name in ("joint", "OGM-GE", "OPM", "OGM-GE + OPM")}}
ROWS["fixed dropout"] = fixed_dropout


def train(data: MultimodalData, build: Build, recipe: Recipe, seed: int) -> Run:
    """One run with a method, looked at on its way."""
    torch.manual_seed(seed)
    model = classifier_for(data)
    look = Look(model, data)

    def watched(model: MultimodalClassifier, context: Context) -> Method:
        method = build(model, context)
        return replace(method, losses=(*method.losses, look), removes=(*method.removes, look.remove))

    began = time.perf_counter()
    recorder = fit(model, watched, data, recipe, seed=seed)
    seconds = time.perf_counter() - began
    curves = _curves(recorder)
    ratios = curves["ratio"]
    return Run(
        accuracy=evaluate(model, data.test),
        learning=look.learning,
        probes={name: linear_probe(encoder, data, name) for name, encoder in model.encoders.items()},
        ratios={name: values.tolist() for name, values in ratios.items()},
        fused_ratios={name: [r[i] for r in look.fused] for i, name in enumerate(model.encoders)},
        q={name: float(values.mean()) for name, values in curves.get("drop_probability", {}).items()},
        seconds=seconds,
    )


def table(runs: dict[str, list[Run]]) -> str:
    """Markdown: accuracy, its paired difference to joint, steps, probes, and the ratio two ways."""
    joint = runs["joint"]
    modalities = list(joint[0].probes)
    ahead = max(modalities, key=lambda m: np.mean([np.mean(r.ratios[m]) for r in joint]))
    header = [
        "", "accuracy", "against joint", "steps to 90 % of its own final accuracy", "of joint's",
        *(f"{m} probe" for m in modalities), f"ratio of {ahead}", f"{ahead} ahead", "same, read after the drop",
        "mean q",
    ]  # fmt: skip
    lines = [_row(header), _row(["---"] * len(header))]
    for name, found in runs.items():
        difference = [run.accuracy - other.accuracy for run, other in zip(found, joint, strict=True)]
        cells = [
            name,
            mean_and_spread([run.accuracy for run in found]),
            "" if name == "joint" else mean_and_spread(difference),
            mean_and_spread([run.steps_to(0.9 * run.accuracy) for run in found], 0),
            _reached([r.steps_to(0.9 * j.accuracy) for r, j in zip(found, joint, strict=True)]),
            *(mean_and_spread([run.probes[m] for run in found]) for m in modalities),
            mean_and_spread([float(np.median(run.ratios[ahead])) for run in found], 2),
            _share([run.ratios for run in found], ahead),
            _share([run.fused_ratios for run in found], ahead),
            ", ".join(f"{m} {np.mean([run.q[m] for run in found]):.2f}" for m in found[0].q),
        ]
        lines.append(_row(cells))
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _reached(steps: Sequence[float]) -> str:
    there = [step for step in steps if not np.isnan(step)]
    missed = len(steps) - len(there)
    return mean_and_spread(there, 0) + (f" ({missed} never)" if missed else "")


def _share(ratios: Sequence[dict[str, list[float]]], modality: str) -> str:
    """Part of the steps at which it has the largest ratio."""
    shares = []
    for run in ratios:
        largest = np.stack(list(run.values())).argmax(0)
        shares.append(float((largest == list(run).index(modality)).mean()))
    return f"{100 * float(np.mean(shares)):.0f} %"


def main(arguments: Sequence[str] | None = None) -> None:
    """Train every row on every seed, then print and save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.opm", description=__doc__)
    parser.add_argument(
        "--data", type=Path, help="av_digits.npz or mfeat.npz; scikit-learn's digits by default"
    )
    parser.add_argument(
        "--noise", choices=["image", "audio"], help="white noise on one modality of av_digits"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, help="instead of the recipe's own")
    parser.add_argument("--out", type=Path, default=Path("out/opm"), help="folder for table and numbers")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    name = load(options.data, 0).name
    recipe = RECIPES[name] if options.epochs is None else replace(RECIPES[name], epochs=options.epochs)
    runs: dict[str, list[Run]] = {row: [] for row in ROWS}
    with need("tqdm").tqdm(total=options.seeds * len(ROWS), unit=" runs") as bar:
        for seed in range(options.seeds):
            data = _data(options.data, options.noise, seed)
            for row, build in ROWS.items():
                runs[row].append(train(data, build, recipe, seed))
                bar.update()
    text = table(runs)
    print(f"{name}{f', noise on {options.noise}' if options.noise else ''}\n\n{text}\n")
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"{name}{f'_noise_{options.noise}' if options.noise else ''}"
    stem.with_suffix(".md").write_text(f"{text}\n", encoding="utf-8")
    content = {row: [asdict(run) for run in found] for row, found in runs.items()}
    stem.with_suffix(".json").write_text(json.dumps(content) + "\n", encoding="utf-8")


def _data(path: Path | None, noise: str | None, seed: int) -> MultimodalData:
    if noise is None:
        return load(path, seed)
    assert path is not None
    return av_digits(path, fold=seed, noise=noise, seed=seed)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
