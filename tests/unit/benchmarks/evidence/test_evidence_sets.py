"""What is tuned on is never tested."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.evidence import sets
from benchmarks.evidence.sets import SETS, data_of, fingerprint


def samples(data, part):
    inputs = getattr(data, part).inputs
    return {
        b"".join(x[i].numpy().tobytes() for x in inputs.values()) for i in range(len(getattr(data, part)))
    }


@pytest.mark.parametrize("name", ["av_clean", "digits"])
def test_who_is_tuned_on_is_never_tested(name, folder):
    tuning = data_of(name, folder, "tune", 0)
    tests = [data_of(name, folder, "test", seed) for seed in range(6)]
    for data in (tuning, *tests):
        parts = [samples(data, part) for part in ("train", "val", "test")]
        assert sum(map(len, parts)) == len(set().union(*parts))
    kept = persons(tuning)
    assert kept
    assert not any(kept & persons(data) for data in tests)


def persons(data):
    return set(data.test.groups.tolist())


def test_mfeat_keeps_the_same_samples_for_choices(folder):
    with np.load(folder / "mfeat.npz") as file:
        arrays = dict(file)
    # So that the label tells which sample it is.
    arrays["label"] = np.arange(len(arrays["label"]))
    np.savez(folder / "mfeat.npz", **arrays)
    tuning = [data_of("mfeat_3", folder, "tune", seed) for seed in range(2)]
    kept = [set(data.test.labels.tolist()) for data in tuning]
    assert len(kept[0]) == 60
    assert kept[0] == kept[1]
    assert set(tuning[0].train.labels.tolist()) != set(tuning[1].train.labels.tolist())
    for seed in range(4):
        assert not kept[0] & set(data_of("mfeat_3", folder, "test", seed).test.labels.tolist())


def test_noise_is_a_set_of_its_own(folder):
    clean, noisy = (data_of(name, folder, "test", 0) for name in ("av_clean", "av_noise_audio"))
    assert torch.equal(clean.test.inputs["image"], noisy.test.inputs["image"])
    assert noisy.test.inputs["audio"].std() > 1.2 * clean.test.inputs["audio"].std()


@pytest.mark.parametrize("name", ["diabetes", "yeast", "segments", "films"])
def test_samples_that_are_tuned_on_are_never_tested(name, monkeypatch):
    asked = []
    monkeypatch.setattr(sets, name, lambda *path, test, **options: asked.append(set(test.tolist())))
    for seed in range(2):
        SETS[name].load(Path(), "tune", seed)
    for seed in range(4):
        SETS[name].load(Path(), "test", seed)
    kept, again, *tests = asked
    assert kept
    assert kept == again
    assert all(test and not test & kept for test in tests)
    assert len({frozenset(test) for test in tests}) == 4


def test_people_who_are_tuned_on_are_never_tested(monkeypatch):
    asked = []
    monkeypatch.setattr(sets, "watch", lambda path, people, *, seed: asked.append(set(people)))
    SETS["watch"].load(Path(), "tune", 0)
    for seed in range(10):
        SETS["watch"].load(Path(), "test", seed)
    kept, *tests = asked
    assert all(not kept & people for people in tests)
    assert len({frozenset(people) for people in tests}) == 10


def test_a_missing_package_is_told(monkeypatch):
    monkeypatch.setattr(sets, "installed", lambda package: package != "wordllama")
    assert [name for name, found in SETS.items() if found.packages and found.lacks(None)] == ["films"]
    monkeypatch.setattr(sets, "installed", lambda package: False)
    lacking = {name: found.lacks(None) for name, found in SETS.items() if found.packages}
    assert lacking == {
        "yeast": "river",
        "watch": "seglearn",
        "films": "bokeh_sampledata",
        "segments": "river",
    }


def test_files_of_packages_have_a_fingerprint(monkeypatch, tmp_path):
    (tmp_path / "segment").write_text("pieces")
    monkeypatch.setattr(sets, "file_of", lambda package, file: tmp_path / "segment")
    fingerprint.cache_clear()
    before = fingerprint("segments", None)
    fingerprint.cache_clear()
    (tmp_path / "segment").write_text("other pieces")
    assert fingerprint("segments", None) != before
    fingerprint.cache_clear()


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"av_clean needs av_digits\.npz. Found no such file"):
        SETS["av_clean"].path(tmp_path)


def test_other_data_have_another_fingerprint(folder):
    before = fingerprint("mfeat_3", folder)
    fingerprint.cache_clear()
    (folder / "mfeat.npz").write_bytes((folder / "av_digits.npz").read_bytes())
    assert fingerprint("mfeat_3", folder) != before
    assert fingerprint("digits", None) == "embedded"
