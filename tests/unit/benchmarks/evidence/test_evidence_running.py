"""Rows as options, and one run of each kind."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch

from benchmarks import training
from benchmarks.data import Split
from benchmarks.evidence.alone import Ensemble, Frozen, Pool, start_from, train_alone
from benchmarks.evidence.building import build_of
from benchmarks.evidence.rows import CONTROLS, METHODS, RECIPES, Knob, rows_of, with_needs
from benchmarks.evidence.running import Job, answers_of, measure, probe, run
from benchmarks.evidence.sets import SETS, data_of
from benchmarks.models import classifier_for
from benchmarks.training import Recipe, fit

OWN = {"unimodal_heads": "own", "unimodal_weight": 1.0}
JOB = Job("mfeat_3", "joint", None, {"lr": 0.1, "epochs": 1}, "test", 0, "")


def options_of(row):
    """A row's options with the last candidate of each knob, at joint training's rate and length."""
    return {**row.options, **{knob.name: knob.candidates[-1] for knob in row.knobs}, "lr": 0.03, "epochs": 5}


@pytest.mark.parametrize("row", [*CONTROLS, *METHODS, *RECIPES], ids=lambda row: row.name)
def test_every_row_trains_otherwise_than_joint(row, folder):
    data = data_of("mfeat_3", folder, "test", 0)
    recipe = Recipe(5, 0.03, batch_size=16)
    weights = []
    for options in (options_of(row), {"lr": 0.03, "epochs": 5}):
        torch.manual_seed(0)
        model = classifier_for(data)
        fit(model, build_of(options), data, recipe)
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert weights[0].isfinite().all()
    assert not torch.equal(*weights)


def test_a_run_is_repeatable_and_complete(folder):
    first, again = run(JOB, folder), run(JOB, folder)
    seconds = {"train_s", "all_s", "clock"}
    assert {k: v for k, v in first.items() if k not in seconds} == {
        k: v for k, v in again.items() if k not in seconds
    }
    assert set(first) == {"metric", "probes", "ece", "groups", "missing", *seconds}
    assert set(first["missing"]) == set(first["probes"]) == {"fou", "pix", "mor"}


def test_a_tuning_run_is_scored_and_no_more(folder):
    assert set(run(replace(JOB, part="tune"), folder)) == {"metric", "train_s", "all_s", "clock"}


def test_an_encoder_alone(folder):
    found = run(replace(JOB, modality="pix"), folder)
    assert set(found["probes"]) == {"pix"}
    assert found["missing"] == {}


def test_a_missing_modality_has_features_of_zero(folder):
    data = data_of("mfeat_3", folder, "test", 0)
    torch.manual_seed(0)
    model = classifier_for(data)
    found = measure(answers_of(model), data, modalities=["mor"])["missing"]["mor"]
    # The mor columns of the head see nothing.
    assert isinstance(model.head, torch.nn.Linear)
    model.head.weight.data[:, -32:] = 0
    with torch.no_grad():
        logits = model(*data.test.inputs.values())
    assert found == pytest.approx(100 * (logits.argmax(1) == data.test.labels).double().mean().item())


def test_accuracy_of_each_person(folder):
    data = data_of("mfeat_3", folder, "test", 0)
    half = (torch.arange(len(data.test)) % 2).long()
    data = replace(data, test=Split(data.test.inputs, data.test.labels, half))
    found = measure(answers_of(classifier_for(data)), data)["groups"]
    model_right = sum(found[g] * (half == int(g)).sum().item() for g in ("0", "1")) / len(half)
    torch.manual_seed(0)
    assert set(found) == {"0", "1"}
    assert 0 <= min(found.values()) <= model_right <= max(found.values())


def test_a_diverged_training_is_a_result(folder):
    data = data_of("mfeat_3", folder, "test", 0)
    model = classifier_for(data)
    for p in model.parameters():
        p.data.fill_(float("nan"))
    assert probe(model, data, "pix") == 10.0
    assert measure(answers_of(model), data)["ece"] < 100


def test_heads_that_vote_are_measured_beside_the_joint_head(folder):
    found = run(replace(JOB, options={"lr": 0.03, "epochs": 5, **OWN}), folder)
    joint = {name: found[name] for name in found["vote"]}
    assert set(joint) == {"metric", "ece", "groups", "missing"}
    assert found["vote"]["metric"] != joint["metric"]
    # A modality that is missing has no vote: the joint head alone would ask its columns of zeros.
    assert found["vote"]["missing"] != joint["missing"]
    assert "vote" not in run(replace(JOB, options={"lr": 0.03, "epochs": 1}), folder)


def alone_of(folder):
    data = data_of("mfeat_3", folder, "test", 0)
    return data, {m: train_alone("mfeat_3", folder, "test", 0, 0, m, 0.03, 2).model for m in data.modalities}


def test_an_ensemble_is_the_mean_of_its_models(folder):
    data, models = alone_of(folder)
    inputs = data.test.inputs
    with torch.no_grad():
        logits = torch.stack([models[m].eval()(x) for m, x in inputs.items()])
        of_logits, of_probabilities = (
            Ensemble(models, pool, data.task).eval()(*inputs.values()) for pool in get_args(Pool)
        )
    torch.testing.assert_close(of_logits, logits.mean(0))
    torch.testing.assert_close(of_probabilities, logits.softmax(-1).mean(0).log())


@pytest.mark.parametrize("frozen", [True, False])
def test_joint_training_starts_from_encoders_alone(folder, frozen):
    data, models = alone_of(folder)
    before = {m: encoder_of(models[m].encoders[m]) for m in models}
    torch.manual_seed(0)
    model = classifier_for(data)
    start_from(model, models, frozen=frozen)
    fit(model, build_of({"lr": 0.03, "epochs": 1}), data, Recipe(1, 0.03))
    for m, encoder in model.encoders.items():
        assert isinstance(encoder, Frozen) == frozen
        assert torch.equal(encoder_of(encoder), before[m]) == frozen
        # Others start from the same encoder.
        assert torch.equal(encoder_of(models[m].encoders[m]), before[m])


def encoder_of(encoder):
    return torch.nn.utils.parameters_to_vector(encoder.parameters()).detach().clone()


def test_a_frozen_encoder_keeps_the_statistics_of_its_norms():
    encoder = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    frozen = Frozen(encoder).train()
    frozen(torch.randn(8, 3))
    assert encoder[1].num_batches_tracked == 0


def test_an_encoder_alone_is_trained_once(folder, monkeypatch):
    train_alone.cache_clear()
    fits = []
    monkeypatch.setattr(training, "fit", lambda *args, **kwargs: fits.append(args))
    lrs = dict.fromkeys(("fou_lr", "pix_lr", "mor_lr"), 0.1)
    for pool in ("logits", "probabilities"):
        run(replace(JOB, options={**lrs, "epochs": 1, "start": "ensemble", "pool": pool}), folder)
    run(replace(JOB, modality="pix"), folder)
    train_alone.cache_clear()
    assert len(fits) == 3


def test_the_key_is_of_what_decides_the_result():
    keys = {
        job.key
        for job in (
            JOB,
            replace(JOB, seed=1),
            replace(JOB, part="tune"),
            replace(JOB, data="other"),
            replace(JOB, options={"lr": 0.2, "epochs": 1}),
        )
    }
    assert len(keys) == 5
    # Rows of the same options share their runs.
    assert replace(JOB, row="other").key == JOB.key
    assert replace(JOB, options={"epochs": 1, "lr": 0.1}).key == JOB.key


def test_the_cheapest_candidate_within_the_tolerance_wins():
    scores = [97.0, 97.6, 98.0]
    assert Knob("epochs", (5, 10, 20), tolerance=0.5).best(scores) == 10
    assert Knob("lr", (0.1, 0.2, 0.3)).best([90.0, 91.0, 91.0]) == 0.2


def test_rows_bring_what_they_need():
    rows = rows_of(SETS["mfeat_3"])
    found = with_needs(rows, {"encoders alone, then frozen", "DGL, heads vote"})
    alone = ["fou alone", "pix alone", "mor alone"]
    assert list(found) == ["joint", *alone, "encoders alone, then frozen", "DGL", "DGL, heads vote"]
    assert all(row.needs() <= set(rows) for row in rows.values())


def test_rows_are_left_out_where_a_task_has_no_use_for_them():
    classes, labels, numbers = (set(rows_of(SETS[name])) for name in ("mfeat_3", "yeast", "diabetes"))
    shared, of_classes = {"uni-modal losses, shared head"}, {"TCMax", "MCR's competition + uni-modal losses"}
    assert of_classes <= classes
    assert shared <= labels
    assert not of_classes & labels
    assert not (of_classes | shared) & numbers
    assert any(name.endswith("heads vote") for name in labels)
    assert not any(name.endswith("heads vote") for name in numbers)
