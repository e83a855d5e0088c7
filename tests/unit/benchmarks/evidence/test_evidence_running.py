"""Rows as options, and one run of each kind."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.data import Split
from benchmarks.evidence.building import build_of
from benchmarks.evidence.rows import METHODS, RECIPES, Knob, rows_of, with_needs
from benchmarks.evidence.running import Job, measure, run
from benchmarks.evidence.sets import SETS, data_of
from benchmarks.models import classifier_for
from benchmarks.training import Recipe, fit

JOB = Job("mfeat_3", "joint", None, {"lr": 0.1, "epochs": 1}, "test", 0, "")


def options_of(row):
    """A row's options with the first candidate of each knob; what it inherits as some value."""
    inherited = {"lr": 0.03, "epochs": 5, "opm_q_base": 0.5, "amss_temperature": 0.2, "relearn_lam": 3.0}
    inherited |= {"ogm_alpha": 0.8, "dropout_p": 0.5}
    taken = {option: inherited[option] for option in row.inherits}
    return {**taken, **row.options, **{knob.name: knob.candidates[0] for knob in row.knobs}}


@pytest.mark.parametrize("row", [*METHODS, *RECIPES], ids=lambda row: row.name)
def test_every_row_trains_otherwise_than_joint(row, folder):
    data = data_of("mfeat_3", folder, "test", 0)
    recipe = Recipe(5, 0.03)
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
    seconds = {"train_s", "all_s"}
    assert {k: v for k, v in first.items() if k not in seconds} == {
        k: v for k, v in again.items() if k not in seconds
    }
    assert set(first) == {"metric", "probes", "ece", "groups", "missing", *seconds}
    assert set(first["missing"]) == set(first["probes"]) == {"fou", "pix", "mor"}


def test_a_tuning_run_is_scored_and_no_more(folder):
    assert set(run(replace(JOB, part="tune"), folder)) == {"metric", "train_s", "all_s"}


def test_an_encoder_alone(folder):
    found = run(replace(JOB, modality="pix"), folder)
    assert set(found["probes"]) == {"pix"}
    assert found["missing"] == {}


def test_a_missing_modality_has_features_of_zero(folder):
    data = data_of("mfeat_3", folder, "test", 0)
    torch.manual_seed(0)
    model = classifier_for(data)
    found = measure(model, data)["missing"]["mor"]
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
    found = measure(classifier_for(data), data)["groups"]
    model_right = sum(found[g] * (half == int(g)).sum().item() for g in ("0", "1")) / len(half)
    torch.manual_seed(0)
    assert set(found) == {"0", "1"}
    assert 0 <= min(found.values()) <= model_right <= max(found.values())


def test_a_diverged_training_is_a_result(folder):
    data = data_of("mfeat_3", folder, "test", 0)
    model = classifier_for(data)
    for p in model.parameters():
        p.data.fill_(float("nan"))
    found = measure(model, data)
    assert set(found["probes"].values()) == {10.0}
    assert found["ece"] < 100


def test_the_key_is_of_what_decides_the_result():
    keys = {
        job.key
        for job in (
            JOB,
            replace(JOB, seed=1),
            replace(JOB, part="tune"),
            replace(JOB, data="other"),
            replace(JOB, options={"lr": 0.2, "epochs": 1}),
            replace(JOB, row="other"),
        )
    }
    assert len(keys) == 6
    assert replace(JOB, options={"epochs": 1, "lr": 0.1}).key == JOB.key


def test_the_cheapest_candidate_within_the_tolerance_wins():
    scores = [97.0, 97.6, 98.0]
    assert Knob("epochs", (5, 10, 20), tolerance=0.5).best(scores) == 10
    assert Knob("lr", (0.1, 0.2, 0.3)).best([90.0, 91.0, 91.0]) == 0.2


def test_rows_bring_what_they_need():
    rows = rows_of(SETS["mfeat_3"])
    found = with_needs(rows, {"OGM + OPM", "OGM-GE by update, AdamW"})
    assert list(found) == ["joint", "joint, AdamW", "OPM", "OGM + OPM", "OGM-GE by update, AdamW"]
    assert all(row.needs() <= set(rows) for row in rows.values())


def test_a_regression_has_no_row_that_trains_parts_of_the_shared_head():
    shared = {row.name for row in (*METHODS, *RECIPES) if row.options.get("unimodal_heads") == "shared"}
    assert shared
    assert set(rows_of(SETS["yeast"])) >= shared
    assert not set(rows_of(SETS["diabetes"])) & shared
