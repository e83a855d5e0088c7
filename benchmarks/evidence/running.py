"""One training and what is measured on it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import balanceopt as bo
from benchmarks.data import MultimodalData, Split
from benchmarks.evidence.alone import Alone, Ensemble, start_from, train_alone
from benchmarks.evidence.building import build_of
from benchmarks.evidence.sets import SETS, Part, data_of
from benchmarks.evidence.statistics import expected_calibration_error
from benchmarks.methods import Method
from benchmarks.models import MultimodalClassifier, classifier_for
from benchmarks.training import Recipe, fit, linear_probe

Model = MultimodalClassifier | Ensemble
# Logits of a split, with the features of a modality at zero if one is named.
Answer = Callable[..., Tensor]

# Goes up when the same configuration would give another result: what was stored before is then run again.
PROTOCOL = 3


@dataclass(frozen=True)
class Job:
    """A training to be run.

    Args:
        set: name of the data set.
        row: name of the first row that asks for it; rows of the same options share it.
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
        versions = {"protocol": PROTOCOL, "balanceopt": bo.__version__, "torch": torch.__version__}
        content = json.dumps({**self.content(), "row": None, **versions}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def content(self) -> dict[str, Any]:
        """Its fields, for a JSON line."""
        return {**asdict(self), "options": dict(self.options)}


def run(job: Job, folder: Path | None) -> dict[str, Any]:
    """Train and measure.

    Returns:
        What was measured, ready for JSON: the set's metric in percent, `vote` for heads that vote, CPU seconds of the
        training and of all, and when the run began and ended.
    """
    started, began = time.time(), time.process_time()
    data = data_of(job.set, folder, job.part, job.seed)
    trained = _train(job, folder, data)
    modalities = () if job.modality else data.modalities
    found = measure(answers_of(trained.model), data, job.part, modalities)
    if job.part == "test":
        found["probes"] = {m: probe(trained.model, data, m) for m in trained.model.encoders}
    if trained.vote is not None:
        found["vote"] = trained.vote
    seconds = {"train_s": trained.seconds, "all_s": time.process_time() - began}
    return {**found, **seconds, "clock": [started, time.time()]}


@dataclass(frozen=True)
class Trained:
    """A trained model, the CPU seconds of its training, and what its heads together reach where they can vote."""

    model: Model
    seconds: float
    vote: dict[str, Any] | None = None


def _train(job: Job, folder: Path | None, data: MultimodalData) -> Trained:
    options, seed = job.options, _seed(job)

    def alone(modality: str, lr: float) -> Alone:
        return train_alone(job.set, folder, job.part, job.seed, seed, modality, lr, options["epochs"])

    if job.modality is not None:
        only = alone(job.modality, options["lr"])
        return Trained(only.model, only.seconds)
    start = {m: alone(m, options[f"{m}_lr"]) for m in data.modalities if f"{m}_lr" in options}
    before = sum(found.seconds for found in start.values())
    models = {m: found.model for m, found in start.items()}
    if options.get("start") == "ensemble":
        return Trained(Ensemble(models, options["pool"], data.task), before)
    torch.manual_seed(seed)
    model = classifier_for(data)
    start_from(model, models, frozen=options.get("start") == "frozen")
    votes: dict[str, Any] = {}
    seconds = before - time.process_time()

    def let_vote(method: Method) -> None:
        nonlocal seconds
        seconds += time.process_time()
        if method.predict is not None:
            answer = partial(_votes, model, method.predict)
            votes.update(measure(answer, data, job.part, data.modalities))

    lr = options["lr"] * options.get("lr_factor", 1.0)
    recipe = Recipe(options["epochs"], lr, batch_size=SETS[job.set].batch_size)
    fit(model, build_of(options), data, recipe, seed=seed, on_end=let_vote)
    return Trained(model, seconds, votes or None)


def answers_of(model: Model) -> Answer:
    """What a model says by itself."""
    return partial(_logits, model)


def measure(
    answer: Answer, data: MultimodalData, part: Part = "test", modalities: Sequence[str] = ()
) -> dict[str, Any]:
    """What is asked of a model's answers; `missing` sets the features of each of `modalities` to zero in turn."""
    logits, test = answer(data.test), data.test
    found: dict[str, Any] = {"metric": data.task.measure(logits, test.labels)}
    if part == "tune":
        return found
    groups = {}
    if test.groups is not None:
        correct = logits.argmax(dim=1) == test.labels
        groups = {
            str(int(g)): 100 * correct[test.groups == g].double().mean().item() for g in test.groups.unique()
        }
    return {
        **found,
        "ece": _calibration(logits, test.labels) if data.task.has_classes else float("nan"),
        "groups": groups,
        "missing": {m: data.task.measure(answer(test, m), test.labels) for m in modalities},
    }


def _logits(model: Model, split: Split, without: str | None = None) -> Tensor:
    model.eval()
    handles = []
    if without is not None:
        encoder = model.encoders[without]
        handles.append(encoder.register_forward_hook(lambda module, args, out: torch.zeros_like(out)))
    try:
        with torch.no_grad():
            logits: Tensor = model(*(split.inputs[m] for m in model.encoders))
    finally:
        for handle in handles:
            handle.remove()
    # A training that diverged is a result as well: what it answers is as good as none.
    return logits.nan_to_num()


def _votes(model: Model, predict: Callable[..., Tensor], split: Split, without: str | None = None) -> Tensor:
    """The vote of the joint head and the heads of the modalities that are there."""
    logits = _logits(model, split, without)
    present = None if without is None else {without: torch.zeros(len(split), dtype=torch.bool)}
    return predict(logits, present=present).nan_to_num()


def _calibration(logits: Tensor, labels: Tensor) -> float:
    return 100 * expected_calibration_error(logits.softmax(dim=1).numpy(), labels.numpy())


def probe(model: Model, data: MultimodalData, modality: str) -> float:
    """The set's metric of a linear model on the features of the modality's encoder."""
    encoder = model.encoders[modality]
    if not all(p.isfinite().all() for p in encoder.parameters()):
        return data.task.chance(data.num_classes)
    return linear_probe(encoder, data, modality)


def _seed(job: Job) -> int:
    """Choices are made with other initial weights and batches than the tests."""
    return job.seed + 1000 if job.part == "tune" else job.seed
