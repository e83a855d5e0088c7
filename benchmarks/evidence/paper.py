"""A paper's setting on the public original: train its rows, on any device, and print what its tables have."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.evidence.building import build_of
from benchmarks.evidence.configs import CONFIGS, Config
from benchmarks.evidence.results import Results
from benchmarks.evidence.running import Job
from benchmarks.evidence.statistics import expected_calibration_error, paired
from benchmarks.evidence.tables import markdown, number
from benchmarks.extras import need
from benchmarks.methods import Context
from benchmarks.originals import ClipData
from benchmarks.originals.clips import Clips
from benchmarks.report import mean_and_spread
from benchmarks.tasks import logistic_probe
from benchmarks.training import loop


def reproduce(
    name: str,
    folder: Path,
    results: Results,
    *,
    seeds: Sequence[int],
    rows: Sequence[str] | None = None,
    device: str = "cpu",
    workers: int = 2,
    epochs: int | None = None,
) -> str:
    """Run what is missing of a configuration; returns its table.

    Args:
        name: in `CONFIGS`.
        folder: of the data set.
        results: what was run before; gets what is run now.
        seeds: of split, initial weights and batches.
        rows: some of the configuration's; joint training is always run.
        device: to train on.
        workers: processes that read clips.
        epochs: instead of the paper's.

    Raises:
        FileNotFoundError: saying which file of the data set should be there.
        ValueError: for rows that the configuration does not have.
    """
    config = CONFIGS[name] if epochs is None else replace(CONFIGS[name], epochs=epochs)
    data = {seed: config.load(folder, seed) for seed in seeds}
    first = data[seeds[0]]
    known = config.rows(first.modalities)
    if unknown := set(rows or ()) - set(known):
        raise ValueError(f"`--rows` should be among {list(known)}. Found {sorted(unknown)}.")
    wanted = {row: known[row] for row in known if rows is None or row in {"joint", *rows}}
    size = f"{len(first.train)} + {len(first.val)} + {len(first.test)} clips"
    jobs = [
        Job(name, row, modality, options, "test", seed, size)
        for seed in seeds
        for row, (modality, options) in wanted.items()
    ]
    with need("tqdm").tqdm(total=len(jobs) * config.epochs, unit=" epochs") as bar:
        for job in jobs:
            bar.set_description(f"{job.row}, seed {job.seed}", refresh=False)
            if job in results:
                bar.update(config.epochs)
                continue
            results.add(job, _train(config, job, data[job.seed], device, workers, bar.update))
    runs = {row: [results[job] for job in jobs if job.row == row] for row in wanted}
    return f"{config.about}\n{size}.\n\n{table(runs, first.modalities)}"


def table(runs: Mapping[str, Sequence[Mapping[str, Any]]], modalities: Sequence[str]) -> str:
    """Markdown: accuracy, its paired difference to joint training, macro F1, probes, a modality missing."""
    header = ["", "accuracy", "against joint", "95 % interval", "macro F1"]
    header += [f"{m} probe" for m in modalities] + [f"without {m}" for m in modalities]
    lines = [header, ["---"] * len(header)]
    for row, found in runs.items():
        gained = [run["accuracy"] - j["accuracy"] for run, j in zip(found, runs["joint"], strict=True)]
        difference = paired(gained)
        cells = [row, mean_and_spread([run["accuracy"] for run in found])]
        cells += ["", ""] if row == "joint" else [
            f"{difference.mean:+.1f}", f"{difference.low:+.1f} to {difference.high:+.1f}"
        ]  # fmt: skip
        cells.append(mean_and_spread([run["f1"] for run in found]))
        for quantity in ("probes", "missing"):
            cells += [number(_mean(run[quantity].get(m, np.nan) for run in found), 1) for m in modalities]
        lines.append(cells)
    return markdown(lines)


def _train(
    config: Config, job: Job, data: ClipData, device: str, workers: int, on_epoch: Any
) -> dict[str, Any]:
    began = time.process_time()
    modalities = data.modalities if job.modality is None else (job.modality,)
    splits = {part: _only(getattr(data, part), modalities) for part in ("train", "val", "test")}
    torch.manual_seed(job.seed)
    *sample, _ = splits["train"][0]
    model = config.model(dict(zip(modalities, sample, strict=True)), data.num_classes).to(device)
    loaders = {
        part: OnDevice(_loader(clips, config.batch_size, workers, job.seed, shuffle=part == "train"), device)
        for part, clips in splits.items()
    }
    context = Context(
        loaders["train"], loaders["val"], data.num_classes, config.lr, 0.9, job.seed, config.epochs
    )
    method = build_of(job.options)(model, context)  # type: ignore[arg-type]
    loop(model, method, loaders["train"], config.epochs, config.decay_epoch, on_epoch)
    plain = Clips(splits["train"].clips, splits["train"].readers, training=False)
    seen = look(model, OnDevice(_loader(plain, config.batch_size, workers, 0, shuffle=False), device))
    unseen = look(model, loaders["test"], missing=len(modalities) > 1)
    return {**_measured(seen, unseen), "all_s": time.process_time() - began}


@dataclass(frozen=True)
class Looked:
    """What a model makes of a split: logits, logits with a modality missing, features, labels."""

    logits: Tensor
    missing: dict[str, Tensor]
    features: dict[str, Tensor]
    labels: Tensor


def look(model: nn.Module, loader: OnDevice, *, missing: bool = False) -> Looked:
    """One pass in eval mode; features with more than two dimensions are averaged to vectors."""
    encoders = dict(model.encoders.items())  # type: ignore[union-attr, operator]
    logits, labels = [], []
    features: dict[str, list[Tensor]] = {name: [] for name in encoders}
    without: dict[str, list[Tensor]] = {name: [] for name in encoders if missing}
    model.eval()
    with torch.no_grad():
        for *inputs, target in loader:
            outputs: dict[str, Tensor] = {}
            handles = [e.register_forward_hook(_keeper(outputs, name)) for name, e in encoders.items()]
            logits.append(model(*inputs).cpu())
            for handle in handles:
                handle.remove()
            for name, output in outputs.items():
                features[name].append(
                    output.flatten(1, -2).mean(dim=1).cpu() if output.dim() > 2 else output.cpu()
                )
            for name in without:
                handle = encoders[name].register_forward_hook(lambda m, args, out: torch.zeros_like(out))
                without[name].append(model(*inputs).cpu())
                handle.remove()
            labels.append(target.cpu())
    return Looked(
        torch.cat(logits),
        {name: torch.cat(parts) for name, parts in without.items()},
        {name: torch.cat(parts) for name, parts in features.items()},
        torch.cat(labels),
    )


class OnDevice:
    """A loader whose batches are on the device of the model.

    Args:
        loader: of batches on the host.
        device: where they go.
    """

    def __init__(self, loader: DataLoader[tuple[Tensor, ...]], device: str) -> None:
        self.loader = loader
        self.device = device

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for batch in self.loader:
            yield tuple(x.to(self.device, non_blocking=True) for x in batch)


def _measured(seen: Looked, unseen: Looked) -> dict[str, Any]:
    labels = unseen.labels.numpy()
    predicted = unseen.logits.argmax(dim=1).numpy()
    known = seen.labels.numpy()
    return {
        "accuracy": _share(unseen.logits, unseen.labels),
        "f1": float(100 * need("sklearn.metrics").f1_score(labels, predicted, average="macro")),
        "ece": 100 * expected_calibration_error(unseen.logits.softmax(dim=1).numpy(), labels),
        "probes": {
            m: logistic_probe((seen.features[m].numpy(), known), (unseen.features[m].numpy(), labels))
            for m in unseen.features
        },
        "missing": {m: _share(logits, unseen.labels) for m, logits in unseen.missing.items()},
    }


def _only(clips: Clips, modalities: Sequence[str]) -> Clips:
    return Clips(clips.clips, {m: clips.readers[m] for m in modalities}, training=clips.training)


def _loader(
    clips: Clips, batch_size: int, workers: int, seed: int, *, shuffle: bool
) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(
        clips,
        batch_size,
        shuffle=shuffle,
        drop_last=shuffle and len(clips) >= batch_size,
        num_workers=workers,
        persistent_workers=workers > 0,
        generator=torch.Generator().manual_seed(seed),
    )


def _keeper(outputs: dict[str, Tensor], name: str) -> Any:
    return lambda module, args, output: outputs.__setitem__(name, output)


def _share(logits: Tensor, labels: Tensor) -> float:
    return 100 * (logits.argmax(dim=1) == labels).double().mean().item()


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))
