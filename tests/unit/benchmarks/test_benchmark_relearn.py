"""The re-learning benchmark on made data: what it trains, what it draws, what it writes."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import relearn
from benchmarks.data import mfeat
from benchmarks.training import RECIPES

RECIPE = replace(RECIPES["mfeat"], epochs=10, batch_size=20)


@pytest.fixture
def data(mfeat_file):
    return mfeat(mfeat_file, train_samples=40)


def test_rows_come_with_and_without_uni_modal_losses():
    names = list(relearn.rows(("joint", "Re-learning")))
    assert names == [
        "joint",
        "Re-learning",
        "joint + uni-modal losses",
        "Re-learning + uni-modal losses",
    ]


def test_a_run_tells_its_gaps(data):
    run = relearn.train(data, relearn.rows()["Re-learning + uni-modal losses"], RECIPE, seed=0)
    assert len(run.gaps) == 1  # after five epochs: the last five are for recovery
    assert set(run.gaps[0]) == set(run.probes) == set(data.modalities)
    assert 0 <= run.accuracy <= 100


def test_curves_show_each_epoch_and_each_relearning_twice(data, tmp_path):
    joint, again = (relearn.epochs_of(data, RECIPE, 0, relearns=r) for r in (False, True))
    assert [e.number for e in joint] == list(range(1, 11))
    assert [(e.number, e.relearned) for e in again if e.number == 5] == [(5, False), (5, True)]
    assert not any(e.relearned for e in joint)
    first = [(e.accuracy, e.train_purity) for e in joint[:5]]
    assert first == [(e.accuracy, e.train_purity) for e in again[:5]]
    relearn.draw(joint, again, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_table():
    run = relearn.Run(50.0, {"a": 40.0, "b": 60.0}, [])
    better = replace(run, accuracy=53.0)
    text = relearn.table({"a alone": [run], "joint": [run, run], "x": [better, run]}, ["a", "b"])
    lines = text.splitlines()
    assert lines[0] == "|  | accuracy | against joint | a probe | b probe |"
    assert lines[3].split("|")[3].strip() == ""
    assert "1.5" in lines[4].split("|")[3]


@pytest.mark.slow
def test_the_command_writes_numbers(mfeat_file, tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, "mfeat", RECIPE)
    monkeypatch.setattr(relearn, "load", lambda path, seed: mfeat(mfeat_file, train_samples=40, seed=seed))
    relearn.main(
        ["--data", str(mfeat_file), "--seeds", "1", "--rows", "joint", "--out", str(tmp_path / "out")]
    )
    content = json.loads((tmp_path / "out" / "mfeat.json").read_text())
    assert set(content) == {"fou alone", "pix alone", "mor alone", "joint", "joint + uni-modal losses"}
    assert all(np.isfinite(run["accuracy"]) for runs in content.values() for run in runs)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "mfeat.json",
        "mfeat.md",
        "mfeat_curves.json",
        "mfeat_curves.png",
    }
