"""One training and what is measured on it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import balanceopt as bo
from benchmarks.data import MultimodalData, Split
from benchmarks.evidence.building import build_of
from benchmarks.evidence.sets import SETS, Part, data_of
from benchmarks.evidence.statistics import expected_calibration_error
from benchmarks.models import MultimodalClassifier, classifier_for
from benchmarks.training import Recipe, fit, linear_probe

# Goes up when the same configuration would give another result: what was stored before is then run again.
PROTOCOL = 2


@dataclass(frozen=True)
class Job:
    """A training to be run.

    Args:
        set: name of the data set.
        row: name of the row.
        modality: the only one that is trained; None for all.
        options: all of the row's options, tuned ones too.
        part: `"tune"` is scored on the data that are kept for choices, `"test"` on the test.
        seed: of split, initial weights, batches and all that a method draws.
        data: fingerprint of the data.
    """

    set: str
    row: str
    modality: str | None
    options: Mapping[str, Any]
    part: Part
    seed: int
    data: str

    @cached_property
    def key(self) -> str:
        """Hash of all that decides the result: the configuration, the data and the versions."""
        versions = {"protocol": PROTOCOL, "balanceopt": _VERSION, "torch": torch.__version__}
        content = json.dumps({**self.content(), **versions}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def content(self) -> dict[str, Any]:
        """Its fields, for a JSON line."""
        return {**asdict(self), "options": dict(self.options)}


def run(job: Job, folder: Path | None) -> dict[str, Any]:
    """Train and measure.

    Returns:
        What was measured, ready for JSON: the set's metric in percent, CPU seconds of the training and of all.
    """
    began = time.process_time()
    data = data_of(job.set, folder, job.part, job.seed)
    options = job.options
    recipe = Recipe(options["epochs"], options["lr"], batch_size=SETS[job.set].batch_size)
    torch.manual_seed(_seed(job))
    model = classifier_for(data, None if job.modality is None else [job.modality])
    before_training = time.process_time()
    fit(model, build_of(options), data, recipe, seed=_seed(job))
    trained = time.process_time() - before_training
    found: dict[str, Any] = {"metric": data.task.measure(_logits(model, data.test), data.test.labels)}
    if job.part == "test":
        found |= measure(model, data)
    return {**found, "train_s": trained, "all_s": time.process_time() - began}


def measure(model: MultimodalClassifier, data: MultimodalData) -> dict[str, Any]:
    """What is asked of a trained model besides its metric; `missing` sets a modality's features to zero."""
    logits, test = _logits(model, data.test), data.test
    groups = {}
    if test.groups is not None:
        correct = logits.argmax(dim=1) == test.labels
        groups = {
            str(int(g)): 100 * correct[test.groups == g].double().mean().item() for g in test.groups.unique()
        }
    alone = len(model.encoders) == 1
    return {
        "probes": {m: _probe(model, data, m) for m in model.encoders},
        "ece": _calibration(logits, test.labels) if data.task.has_classes else float("nan"),
        "groups": groups,
        "missing": {}
        if alone
        else {m: data.task.measure(_logits(model, test, m), test.labels) for m in model.encoders},
    }


def _logits(model: MultimodalClassifier, split: Split, without: str | None = None) -> Tensor:
    model.eval()
    handles = []
    if without is not None:
        handles.append(
            model.encoders[without].register_forward_hook(lambda module, args, out: torch.zeros_like(out))
        )
    try:
        with torch.no_grad():
            logits: Tensor = model(*(split.inputs[m] for m in model.encoders))
    finally:
        for handle in handles:
            handle.remove()
    # A training that diverged is a result as well: what it answers is as good as none.
    return logits.nan_to_num()


def _calibration(logits: Tensor, labels: Tensor) -> float:
    return 100 * expected_calibration_error(logits.softmax(dim=1).numpy(), labels.numpy())


def _probe(model: MultimodalClassifier, data: MultimodalData, modality: str) -> float:
    encoder = model.encoders[modality]
    if not all(p.isfinite().all() for p in encoder.parameters()):
        return data.task.chance(data.num_classes)
    return linear_probe(encoder, data, modality)


def _seed(job: Job) -> int:
    """Choices are made with other initial weights and batches than the tests."""
    return job.seed + 1000 if job.part == "tune" else job.seed


_VERSION = bo.__version__
