import csv
import gzip
import sqlite3
import zipfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import data as benchmark_data
from benchmarks import extras
from benchmarks.data import (
    MultimodalData,
    av_digits,
    diabetes,
    digits_views,
    films,
    load,
    mfeat,
    segments,
    watch,
    yeast,
)
from benchmarks.evidence.sets import SETS
from benchmarks.text import embed, mean_of_tokens
from benchmarks.views import VIEWS


def rows(data: MultimodalData, part: str) -> set[bytes]:
    """Samples of a part, as bytes of their first modality."""
    inputs = getattr(data, part).inputs[data.modalities[0]]
    return {x.numpy().tobytes() for x in inputs}


def same(one: MultimodalData, other: MultimodalData) -> bool:
    return all(
        torch.equal(getattr(one, part).inputs[m], getattr(other, part).inputs[m])
        for part in ("train", "val", "test")
        for m in one.modalities
    )


@pytest.fixture(params=["digits", "av_digits", "mfeat"])
def loaded(request: pytest.FixtureRequest, av_file: Path, mfeat_file: Path) -> list[MultimodalData]:
    """One data set twice with seed 0, then with seed 1."""
    loaders = {
        "digits": digits_views,
        "av_digits": lambda seed: av_digits(av_file, fold=seed, seed=seed),
        "mfeat": lambda seed: mfeat(mfeat_file, train_samples=40, seed=seed),
    }
    return [loaders[request.param](seed) for seed in (0, 0, 1)]


def test_splits_are_disjoint_and_not_empty(loaded: list[MultimodalData]) -> None:
    train, val, test = (rows(loaded[0], part) for part in ("train", "val", "test"))
    assert train
    assert val
    assert test
    assert not (train & val | train & test | val & test)


def test_splits_follow_the_seed(loaded: list[MultimodalData]) -> None:
    first, again, other = loaded
    assert same(first, again)
    assert rows(first, "test") != rows(other, "test")


def test_normalisation_is_of_the_training_samples(loaded: list[MultimodalData]) -> None:
    for view in loaded[0].train.inputs.values():
        assert view.mean().abs() < 0.05
        assert abs(view.std() - 1) < 0.1


def test_other_samples_do_not_enter_the_normalisation(av_file: Path, tmp_path: Path) -> None:
    arrays = dict(np.load(av_file))
    unheard = np.isin(arrays["speaker"], [0, 1])
    arrays["audio"] = np.where(unheard[:, None, None], arrays["audio"] + 100, arrays["audio"])
    np.savez(tmp_path / "shifted.npz", **arrays)
    before, after = av_digits(av_file), av_digits(tmp_path / "shifted.npz")
    assert torch.equal(before.train.inputs["audio"], after.train.inputs["audio"])
    assert after.test.inputs["audio"].mean() > before.test.inputs["audio"].mean() + 10


def test_a_constant_feature_stays_finite(mfeat_file: Path) -> None:
    arrays = dict(np.load(mfeat_file))
    arrays["fou"][:, 0] = 7.0
    np.savez(mfeat_file, **arrays)
    assert mfeat(mfeat_file, train_samples=40).test.inputs["fou"].isfinite().all()


def test_av_digits_test_speakers_are_never_heard(av_file: Path) -> None:
    assert [len(av_digits(av_file, fold=fold).test) for fold in (0, 5)] == [40, 40]
    speaker = np.load(av_file)["speaker"]
    audio = torch.tensor(np.load(av_file)["audio"], dtype=torch.float32)
    found = av_digits(av_file, fold=5)
    expected = audio[torch.from_numpy(np.isin(speaker, [0, 5]))]
    shown = found.test.inputs["audio"][:, 0]
    assert torch.corrcoef(torch.stack([shown.flatten(), expected.flatten()]))[0, 1] > 0.9999


def test_noise_is_on_one_modality_and_repeatable(av_file: Path) -> None:
    clean, noisy, again = (av_digits(av_file, noise=noise) for noise in (None, "image", "image"))
    assert torch.equal(clean.train.inputs["audio"], noisy.train.inputs["audio"])
    assert same(noisy, again)
    added = noisy.train.inputs["image"] - clean.train.inputs["image"]
    assert added.std().item() == pytest.approx(1, abs=0.02)


def test_mfeat_takes_any_views(mfeat_file: Path) -> None:
    data = mfeat(mfeat_file, ("zer", "pix"), train_samples=30)
    assert data.modalities == ("zer", "pix")
    assert (len(data.train), len(data.val), len(data.test)) == (30, 30, 40)


def test_load_knows_files_by_their_arrays(av_file: Path, mfeat_file: Path, tmp_path: Path) -> None:
    assert [load(path, 0).name for path in (None, av_file)] == ["digits", "av_digits"]
    np.savez(tmp_path / "other.npz", something=np.zeros(3))
    with pytest.raises(ValueError, match=r"Found .*other\.npz with arrays \['something'\]"):
        load(tmp_path / "other.npz", 0)


def test_every_view_of_the_digits_loads() -> None:
    data = digits_views(views=tuple(VIEWS))
    assert data.modalities == tuple(VIEWS)
    assert all(view.isfinite().all() for view in data.test.inputs.values())
    assert data.examples["image"].shape == (10, 1, 8, 8)


@pytest.mark.parametrize(
    ("loader", "origin"), [(av_digits, "Free Spoken Digit"), (mfeat, "UCI Multiple Features")]
)
def test_an_absent_file_says_where_it_comes_from(loader, origin: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=origin):
        loader(tmp_path / "absent.npz")


def test_absent_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"scikit-learn: pip install 'balanceopt\[demo\]'"):
        benchmark_data.digits_views()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda path: av_digits(path, noise="text"), "`noise` should be"),  # type: ignore[arg-type]
        (lambda path: digits_views(views=("image", "smell")), "`views` should be among"),
    ],
)
def test_unknown_names_are_errors(call, message: str, av_file: Path) -> None:
    with pytest.raises(ValueError, match=message):
        call(av_file)


def test_mfeat_needs_two_known_views(mfeat_file: Path) -> None:
    for views in (("fou",), ("fou", "smell")):
        with pytest.raises(ValueError, match="`views` should be two or more of"):
            mfeat(mfeat_file, views)


@pytest.fixture
def yeast_file(tmp_path: Path) -> Path:
    """Like river's yeast.csv.gz: 103 columns and 14 labels, of 60 genes."""
    rng = np.random.default_rng(0)
    features, labels = rng.normal(5, 2, (60, 103)), rng.integers(0, 2, (60, 14))
    names = [f"Att{i}" for i in range(1, 104)] + [f"Class{i}" for i in range(1, 15)]
    lines = [[*map(str, x), *map(str, y)] for x, y in zip(features, labels, strict=True)]
    path = tmp_path / "yeast.csv.gz"
    with gzip.open(path, "wt", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([names, *lines])
    return path


def test_yeast_has_two_views_and_several_labels(yeast_file: Path) -> None:
    found, again, other = (
        yeast(yeast_file, train_samples=30, val_samples=10, seed=seed) for seed in (0, 0, 1)
    )
    assert [len(part) for part in (found.train, found.val, found.test)] == [30, 10, 20]
    assert {m: tuple(x.shape) for m, x in found.test.inputs.items()} == {
        "expression": (20, 79),
        "phylogeny": (20, 24),
    }
    assert found.num_classes == 14
    assert set(found.train.labels.unique().tolist()) == {0.0, 1.0}
    for view in found.train.inputs.values():
        assert torch.allclose(view.mean(dim=0), torch.zeros(()), atol=1e-5)
    assert not (rows(found, "train") & rows(found, "test") | rows(found, "val") & rows(found, "test"))
    assert same(found, again)
    assert not same(found, other)


def test_samples_for_the_test_may_be_given(yeast_file: Path) -> None:
    with gzip.open(yeast_file, "rt") as file:
        all_rows = np.loadtxt(file, delimiter=",", skiprows=1)
    test = np.array([3, 5, 8])
    found = yeast(yeast_file, train_samples=30, val_samples=10, test=test)
    assert found.test.labels.tolist() == all_rows[test, 103:].tolist()
    assert len(found.train) == 30


@pytest.mark.parametrize(
    ("ask", "lacking"),
    [
        (lambda: SETS["yeast"].path(None), r"datasets/yeast\.csv\.gz of river"),
        (lambda: SETS["watch"].path(None), r"data/watch_dataset\.npy of seglearn"),
        (lambda: SETS["films"].path(None), r"_data/movies\.db of bokeh_sampledata"),
        (lambda: embed(["Ran"]), r"weights/l2_supercat_256\.safetensors of wordllama"),
    ],
)
def test_a_package_that_is_not_installed_is_told(ask, lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda package: None)
    with pytest.raises(ImportError, match=rf"{lacking}: pip install 'balanceopt\[evidence\]'"):
        ask()


def test_diabetes_has_a_number_in_the_units_of_the_training_samples() -> None:
    found, again, other = (diabetes(train_samples=100, val_samples=40, seed=seed) for seed in (0, 0, 1))
    assert [len(part) for part in (found.train, found.val, found.test)] == [100, 40, 302]
    assert {m: x.shape[1] for m, x in found.test.inputs.items()} == {"person": 2, "body": 2, "blood": 6}
    assert found.num_classes == 1
    assert found.train.labels.mean().abs() < 1e-5
    assert found.train.labels.std() == pytest.approx(1)
    assert same(found, again)
    assert not same(found, other)


@pytest.fixture
def segments_file(tmp_path: Path) -> Path:
    """Like river's segment.csv.zip: 18 columns and a name, of 70 pieces; each column is its number and its row's."""
    names = [*(f"column{i}" for i in range(18)), "category"]
    lines = [[*(str(100 * i + row) for i in range(18)), f"class{row % 7}"] for row in range(70)]
    path = tmp_path / "segment.csv.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("any", "\n".join(",".join(line) for line in [names, *lines]))
    return path


def test_segments_are_seen_in_three_groups_of_columns(segments_file: Path) -> None:
    test = np.array([3, 8, 20])
    found, again = (segments(segments_file, train_samples=30, val_samples=10, test=test) for _ in range(2))
    assert [len(part) for part in (found.train, found.val, found.test)] == [30, 10, 3]
    assert {m: x.shape[1] for m, x in found.test.inputs.items()} == {"place": 2, "edges": 6, "colour": 10}
    assert found.test.labels.tolist() == [3, 1, 6]
    assert found.examples["place"][:, 0].tolist() == [8, 3, 20]  # a class each
    assert found.examples["edges"][0].tolist() == [208, 308, 408, 508, 608, 708]
    assert not rows(found, "train") & rows(found, "val")
    assert same(found, again)


@pytest.fixture
def watch_file(tmp_path: Path) -> Path:
    """Like seglearn's watch_dataset.npy: a recording of 8 seconds and a bit of each exercise, of each of 4 people."""
    rng = np.random.default_rng(0)
    subject, y = np.divmod(np.arange(28), 7)
    signals = [rng.normal(person, 1, (400, 6)) for person in subject]
    path = tmp_path / "watch_dataset.npy"
    recordings = {"X": signals, "y": y, "subject": subject + 1}
    np.save(path, np.array(recordings, dtype=object), allow_pickle=True)
    return path


def test_the_watch_is_tested_on_people_never_seen(watch_file: Path) -> None:
    found = watch(watch_file, (2, 4))
    assert found.test.groups is not None
    assert found.train.groups is not None
    assert set(found.test.groups.tolist()) == {2, 4}
    assert set(found.train.groups.tolist()) == {1, 3}
    assert [len(part) for part in (found.train, found.val, found.test)] == [26, 2, 28]
    assert {tuple(x.shape[1:]) for x in found.test.inputs.values()} == {(3, 17, 17)}
    assert found.test.labels.bincount().tolist() == [4] * 7
    assert not (rows(found, "train") | rows(found, "val")) & rows(found, "test")


def test_the_watch_tells_frequencies_apart(tmp_path: Path) -> None:
    seconds = np.arange(192) / 50
    still, shaken = np.zeros((2, 192, 6))
    shaken[:, 0] = np.sin(2 * np.pi * 12.5 * seconds)
    signals, y, subject = [still, shaken] * 12, np.arange(24) % 2, np.arange(24)
    signals[0] = shaken + np.random.default_rng(0).normal(size=shaken.shape)  # so that nothing is constant
    path = tmp_path / "watch_dataset.npy"
    np.save(path, np.array({"X": signals, "y": y, "subject": subject}, dtype=object), allow_pickle=True)
    one = watch(path, (2, 3)).examples["accelerometer"][1]
    assert one[0].mean(dim=1).argmax() == 8  # of 17 bins up to 25 Hz
    assert not one[1:].any()


@pytest.fixture
def films_file(tmp_path: Path) -> Path:
    """Like bokeh_sampledata's movies.db, as far as it is read: 30 films in three languages, some of them unfit."""
    path = tmp_path / "movies.db"
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE omdb (ID, Title, Director, Writer, Language)")
        database.execute("CREATE TABLE tomatoes (ID, Reviews, Rating, Meter)")
        for i in range(30):
            language = ("English", "Hindi", "Spanish")[i % 3]
            writer = None if i == 1 else f"writer{i}"
            database.execute(
                "INSERT INTO omdb VALUES (?, ?, ?, ?, ?)", (i, f"film{i}", f"director{i}", writer, language)
            )
            database.execute("INSERT INTO tomatoes VALUES (?, ?, ?, ?)", (i, i + 1, i / 10, 3 * i))
        for number, (director, language, reviews) in enumerate(
            [("", "English", 5), ("someone", "Welsh", 5), ("someone", "Hindi", 0), ("someone", "Hindi", None)]
        ):
            values = (100 + number, "unfit", director, "", language)
            database.execute("INSERT INTO omdb VALUES (?, ?, ?, ?, ?)", values)
            database.execute("INSERT INTO tomatoes VALUES (?, ?, 5.0, 50)", (100 + number, reviews))
    return path


def by_last_number(texts: Sequence[str]) -> np.ndarray:
    """Features that tell which film a text is of."""
    assert "unfit" not in texts
    digits = [[int("".join(c for c in text.split(", ")[-1] if c.isdigit())), len(text)] for text in texts]
    return np.array(digits, dtype=np.float32)


def test_films_are_seen_through_the_encoder_and_their_numbers(films_file: Path) -> None:
    found, again, other = (
        films(films_file, train_samples=15, val_samples=5, seed=seed, encode=by_last_number)
        for seed in (0, 0, 1)
    )
    assert [len(part) for part in (found.train, found.val, found.test)] == [15, 5, 10]
    assert {m: x.shape[1] for m, x in found.test.inputs.items()} == {"title": 2, "makers": 2, "critics": 3}
    title, makers, critics = found.examples.values()
    assert title[:, 0].tolist() == makers[:, 0].tolist()
    assert torch.allclose(critics[:, 0].exp(), title[:, 0] + 1)
    assert torch.allclose(critics[:, 2], 3 * title[:, 0])
    assert (title[:, 0] % 3).tolist() == [0, 1, 2]  # as the languages in alphabetical order
    assert same(found, again)
    assert not same(found, other)


def test_a_text_is_the_mean_of_its_tokens() -> None:
    vectors = np.array([[1, 2], [3, 4], [5, 0]], dtype=np.float16)
    means = mean_of_tokens([[0, 1], [], [2], [1, 1, 0]], vectors)
    assert means.dtype == np.float32
    np.testing.assert_allclose(means, np.array([[2, 3], [0, 0], [5, 0], [7 / 3, 10 / 3]]), rtol=1e-6)
