"""Metrics and probes of classes, numbers and labels against computations by hand, and a training of each kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, r2_score
from torch import Tensor

from benchmarks.data import MultimodalData, Split
from benchmarks.evidence.building import build_of
from benchmarks.evidence.rows import CONTROLS, METHODS
from benchmarks.evidence.running import answers_of, measure, probe
from benchmarks.models import classifier_for
from benchmarks.tasks import CLASS, LABELS, NUMBER, Task, determination, mean_average_precision
from benchmarks.training import Recipe, fit
from tests.unit.benchmarks.evidence.test_evidence_running import options_of


def test_determination_is_r2_over_all_outputs() -> None:
    y = torch.randn(40, 1)
    outputs = y + 0.5 * torch.randn(40, 1)
    assert determination(outputs, y) == pytest.approx(100 * r2_score(y.double(), outputs.double()))
    assert determination(y, y) == 100
    assert determination(y.mean().expand_as(y), y) == pytest.approx(0, abs=1e-4)
    assert determination(y + 1e20, y) == -100


def test_mean_average_precision_is_a_mean_over_labels() -> None:
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0], [0.0, 1.0, 1.0]])
    logits = torch.randn(4, 3)
    # The last label says nothing: all samples have it.
    each = [average_precision_score(labels[:, j].numpy(), logits[:, j].numpy()) for j in range(2)]
    assert mean_average_precision(logits, labels) == pytest.approx(100 * np.mean(each))
    assert mean_average_precision(labels, labels) == pytest.approx(100)


@pytest.mark.parametrize("task", [CLASS, NUMBER, LABELS], ids=lambda task: task.metric)
def test_probes_find_what_features_tell(task: Task) -> None:
    features = np.random.default_rng(0).normal(size=(300, 4))
    targets = {
        "accuracy": (features[:, 0] > 0).astype(int),
        "R2": 3 * features[:, :1] + 100,
        "mAP": (features[:, :3] > 0).astype(float),
    }[task.metric]
    seen, unseen = slice(0, 200), slice(200, 300)
    assert task.probe((features[seen], targets[seen]), (features[unseen], targets[unseen])) > 90
    noise = np.random.default_rng(1).normal(size=features.shape)
    assert task.probe((noise[seen], targets[seen]), (noise[unseen], targets[unseen])) < 70


def split(task: Task, count: int, generator: torch.Generator) -> Split:
    strong, weak = torch.randn(2, count, 3, generator=generator)
    signal = 2 * strong[:, :1] + weak[:, :1]
    targets = signal if task is NUMBER else torch.cat([strong, weak[:, :2]], dim=1).gt(0).float()
    return Split({"strong": strong, "weak": weak}, targets)


def made(task: Task) -> MultimodalData:
    generator = torch.Generator().manual_seed(0)
    train, val, test = (split(task, count, generator) for count in (128, 64, 128))
    about = {"strong": "tells much", "weak": "tells less"}
    outputs = task.outputs(train.labels)
    return MultimodalData("made", train, val, test, outputs, about, "made up", test.inputs, task)


@pytest.mark.filterwarnings("ignore:the gap between training and validation purity")
@pytest.mark.parametrize("task", [NUMBER, LABELS], ids=lambda task: task.metric)
def test_every_row_trains_otherwise_than_joint(task: Task) -> None:
    data = made(task)
    joint = trained(data, {"lr": 0.03, "epochs": 5})
    for row in (row for row in (*CONTROLS, *METHODS) if row.serves(task)):
        found = trained(data, options_of(row))
        assert found.isfinite().all(), row.name
        assert not torch.equal(found, joint), row.name


def trained(data: MultimodalData, options: Mapping[str, Any]) -> Tensor:
    torch.manual_seed(0)
    model = classifier_for(data)
    fit(model, build_of(options), data, Recipe(5, options["lr"], batch_size=32))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return torch.nn.utils.parameters_to_vector(model.parameters())


@pytest.mark.parametrize("task", [NUMBER, LABELS], ids=lambda task: task.metric)
def test_a_trained_model_is_measured_by_the_tasks_metric(task: Task) -> None:
    data = made(task)
    torch.manual_seed(0)
    model = classifier_for(data)
    fit(model, build_of({"lr": 0.03, "epochs": 20}), data, Recipe(20, 0.03, batch_size=16))
    with torch.no_grad():
        outputs = model(*data.test.inputs.values())
    found = measure(answers_of(model), data, modalities=data.modalities)
    assert task.measure(outputs, data.test.labels) > 60
    assert found["missing"]["strong"] < found["missing"]["weak"] < task.measure(outputs, data.test.labels)
    assert probe(model, data, "strong") > probe(model, data, "weak")
    assert np.isnan(found["ece"])
    assert found["groups"] == {}
    for p in model.parameters():
        p.data.fill_(float("nan"))
    assert probe(model, data, "strong") == 0.0


def test_a_unit_that_is_dead_on_the_samples_seen_does_not_ruin_a_probe_of_numbers() -> None:
    features = np.random.default_rng(0).normal(size=(300, 3))
    features[:200, 2] = 1e-6 * (features[:200, 2] > 2)
    targets = features[:, :1] + 0.1 * features[:, 1:2]
    assert NUMBER.probe((features[:200], targets[:200]), (features[200:], targets[200:])) > 90
