"""Real data sets seen in two or more views, split so that the test is on people never met in training."""

from __future__ import annotations

import csv
import gzip
import io
import sqlite3
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.extras import need
from benchmarks.tasks import CLASS, LABELS, NUMBER, Task
from benchmarks.text import embed
from benchmarks.views import VIEWS

# First sample of each writer's block in scikit-learn's digits: the file keeps each writer's samples together, the
# bounds are those of scikit-learn's own course (INRIA/scikit-learn-mooc, "Sample grouping").
WRITERS = (0, 130, 256, 386, 516, 646, 776, 915, 1029, 1157, 1287, 1415, 1545, 1667, 1797)

AV_DIGITS_ORIGIN = (
    "It pairs recordings of the Free Spoken Digit Dataset (github.com/Jakobovski/free-spoken-digit-dataset, "
    "CC BY-SA 4.0) with MNIST test images of the same digit (Y. LeCun, C. Cortes, C. Burges); the project keeps a copy "
    "in ../shared/data. Arrays: audio (N, 32, 40) log-mel, image (N, 28, 28), label, speaker 0-5."
)
MFEAT_ORIGIN = (
    "It is the UCI Multiple Features data set (archive.ics.uci.edu/dataset/72, R. Duin, CC BY 4.0); the project keeps "
    "a copy in ../shared/data. Arrays: fou, fac, kar, pix, zer, mor (2000, D) and label."
)


@dataclass(frozen=True)
class Split:
    """Samples: each modality's tensor `(N, ...)`, labels `(N,)` or targets `(N, C)`, and who each is from, if known."""

    inputs: dict[str, Tensor]
    labels: Tensor
    groups: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class MultimodalData:
    """A data set, split and normalised.

    Args:
        name: short name.
        train: what models and normalisation statistics are fitted on.
        val: for choices.
        test: for the numbers that are reported.
        num_classes: C; the number of labels or numbers for other tasks.
        about: what each modality is, for a reader.
        protocol: how it was split, for a reader.
        examples: a test sample of each class, for each modality, as it was before normalisation.
        task: what the targets are.
    """

    name: str
    train: Split
    val: Split
    test: Split
    num_classes: int
    about: dict[str, str]
    protocol: str
    examples: dict[str, Tensor]
    task: Task = CLASS

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities, in the order of the model's inputs."""
        return tuple(self.about)


def digits_views(
    seed: int = 0, *, views: Sequence[str] = ("image", "spectrum"), writers: Sequence[int] | None = None
) -> MultimodalData:
    """Handwritten digits of scikit-learn as two views: the picture, and its spatial spectrum without the phase.

    The spectrum tells how much there is of each spatial frequency and not where, so it says less. The two are used side
    by side in the field (`pix` and `fou` of UCI Multiple Features). choose_views.py has the other pairs that were
    measured, and the numbers by which this one was chosen.

    Three of the 14 writers' blocks are for the test, others with each seed; a tenth of the rest is for validation.

    Args:
        seed: chooses the writers for the test, and the samples for validation.
        views: names in `benchmarks.views.VIEWS`.
        writers: blocks, 0 to 13, for the test instead of those that the seed chooses.

    Raises:
        ImportError: without scikit-learn (extra `demo`).
        ValueError: for an unknown view.
    """
    if not set(views) <= set(VIEWS):
        raise ValueError(f"`views` should be among {list(VIEWS)}. Found {tuple(views)}.")
    digits = need("sklearn.datasets").load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    blocks = [(3 * seed + i) % (len(WRITERS) - 1) for i in range(3)] if writers is None else writers
    test = np.concatenate([np.arange(WRITERS[b], WRITERS[b + 1]) for b in blocks])
    return _assemble(
        "digits",
        {name: VIEWS[name].of(pixels) for name in views},
        torch.tensor(digits.target),
        _parts(test, len(pixels), seed),
        about={name: VIEWS[name].about for name in views},
        protocol="handwritten digits that come with scikit-learn; the test is on writers never seen in training",
        per_feature=[name for name in views if VIEWS[name].per_feature],
        groups=np.searchsorted(WRITERS, np.arange(len(pixels)), side="right") - 1,
    )


def av_digits(
    path: str | Path,
    fold: int = 0,
    *,
    noise: Literal["image", "audio"] | None = None,
    seed: int = 0,
    speakers: Sequence[int] | None = None,
) -> MultimodalData:
    """Spoken and written digits; two of the six speakers, chosen by `fold`, are for the test.

    Args:
        path: of av_digits.npz.
        fold: speakers `fold` and `fold + 1` (counted round) are for the test; a tenth of the rest is for validation.
        noise: modality that gets white noise of standard deviation 1 after normalisation.
        seed: of the split and of the noise.
        speakers: for the test instead of those of `fold`.

    Raises:
        FileNotFoundError: saying where the data come from.
        ValueError: for an unknown modality in `noise`.
    """
    if noise not in (None, "image", "audio"):
        raise ValueError(f"`noise` should be None, 'image' or 'audio'. Found {noise!r}.")
    arrays = _arrays(path, AV_DIGITS_ORIGIN)
    in_turn = np.unique(arrays["speaker"]).take([fold, fold + 1], mode="wrap")
    unheard = in_turn if speakers is None else list(speakers)
    test = np.flatnonzero(np.isin(arrays["speaker"], unheard))
    return _assemble(
        "av_digits",
        {
            "audio": torch.tensor(arrays["audio"], dtype=torch.float32)[:, None],
            "image": torch.tensor(arrays["image"], dtype=torch.float32)[:, None] / 255,
        },
        torch.tensor(arrays["label"], dtype=torch.int64),
        _parts(test, len(arrays["label"]), seed),
        about={
            "audio": "a spoken digit: energy in 32 frequency bands over 0.8 s",
            "image": "a written digit: 28x28 pixels",
        },
        protocol="spoken and written digits; the test is on speakers never heard in training",
        noise=None if noise is None else (noise, seed),
        groups=arrays["speaker"].astype(np.int64),
    )


def mfeat(
    path: str | Path,
    views: Sequence[str] = ("fou", "pix", "mor"),
    *,
    train_samples: int = 200,
    seed: int = 0,
    test: np.ndarray | None = None,
) -> MultimodalData:
    """Handwritten numerals in several views, few of them for training.

    Args:
        path: of mfeat.npz.
        views: two or more of `fou`, `fac`, `kar`, `pix`, `zer`, `mor`.
        train_samples: for training; as many are for validation, the rest for the test.
        seed: of the split.
        test: indices for the test instead; training and validation samples are then among the others.

    Raises:
        FileNotFoundError: saying where the data come from.
        ValueError: for a view that the file does not have.
    """
    arrays = _arrays(path, MFEAT_ORIGIN)
    known = sorted(set(arrays) - {"label"})
    if len(views) < 2 or not set(views) <= set(known):
        raise ValueError(f"`views` should be two or more of {known}. Found {tuple(views)}.")
    return _assemble(
        "mfeat",
        {view: torch.tensor(arrays[view], dtype=torch.float32) for view in views},
        torch.tensor(arrays["label"], dtype=torch.int64),
        _drawn(len(arrays["label"]), seed, train_samples, train_samples, test),
        about={view: f"{arrays[view].shape[1]} {_MFEAT_VIEWS.get(view, 'features')}" for view in views},
        protocol=f"handwritten numerals in {len(views)} views, only {train_samples} of them for training",
        per_feature=views,
    )


def diabetes(
    *, train_samples: int = 200, val_samples: int = 60, seed: int = 0, test: np.ndarray | None = None
) -> MultimodalData:
    """How far a diabetes went within a year, of 442 patients, from who they are, from body and from blood.

    Scikit-learn's copy of the set of B. Efron, T. Hastie, I. Johnstone and R. Tibshirani, Least Angle Regression,
    Annals of Statistics 2004. The target is standardised over the training samples.

    Args:
        train_samples: for training.
        val_samples: for validation; the rest is for the test.
        seed: of the split.
        test: indices for the test instead; training and validation samples are then among the others.

    Raises:
        ImportError: without scikit-learn (extra `demo`).
    """
    loaded = need("sklearn.datasets").load_diabetes(scaled=False)
    return _assemble(
        "diabetes",
        _columns(loaded.data, {"person": slice(0, 2), "body": slice(2, 4), "blood": slice(4, 10)}),
        torch.tensor(loaded.target, dtype=torch.float32)[:, None],
        _drawn(len(loaded.target), seed, train_samples, val_samples, test),
        about={
            "person": "age and sex",
            "body": "body mass index and blood pressure",
            "blood": "six measurements of blood serum",
        },
        protocol=f"how far a diabetes went within a year, {train_samples} patients for training",
        per_feature=("person", "body", "blood"),
        task=NUMBER,
    )


def yeast(
    path: str | Path,
    *,
    train_samples: int = 600,
    val_samples: int = 200,
    seed: int = 0,
    test: np.ndarray | None = None,
) -> MultimodalData:
    """Which of 14 functions a gene of yeast has, from its expression and from its relatives in other genomes.

    The set of A. Elisseeff and J. Weston, A kernel method for multi-labelled classification, NIPS 2001, which joins the
    two kinds of data of P. Pavlidis, J. Weston, J. Cai and W. Noble, Learning gene functional classifications from
    multiple data types, 2002: 79 measurements on microarrays, and phylogenetic profiles over 24 genomes. The columns
    have no names; that the first 79 are the microarrays' shows in the correlations, which are smallest between the
    columns before and after that place. A copy comes with river.

    Args:
        path: of yeast.csv.gz.
        train_samples: for training.
        val_samples: for validation; the rest is for the test.
        seed: of the split.
        test: indices for the test instead; training and validation samples are then among the others.
    """
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        names, *rows = csv.reader(file)
    values = np.array(rows, dtype=np.float64)
    features = sum(name.startswith("Att") for name in names)
    return _assemble(
        "yeast",
        _columns(values, {"expression": slice(0, _MICROARRAYS), "phylogeny": slice(_MICROARRAYS, features)}),
        torch.tensor(values[:, features:], dtype=torch.float32),
        _drawn(len(values), seed, train_samples, val_samples, test),
        about={
            "expression": f"{_MICROARRAYS} measurements on microarrays",
            "phylogeny": f"relatives in {features - _MICROARRAYS} other genomes",
        },
        protocol=f"functions of genes, {train_samples} genes for training",
        per_feature=("expression", "phylogeny"),
        task=LABELS,
    )


_MICROARRAYS = 79


def segments(
    path: str | Path,
    *,
    train_samples: int = 300,
    val_samples: int = 300,
    seed: int = 0,
    test: np.ndarray | None = None,
) -> MultimodalData:
    """What a piece of an outdoor photograph shows, from where it lies, from its edges and from its colour.

    The UCI Image Segmentation data set (archive.ics.uci.edu/dataset/50, Vision Group of the University of
    Massachusetts, 1990, CC BY 4.0): 3x3 pixels of seven photographs, 330 of each class. A copy comes with river.

    Args:
        path: of segment.csv.zip.
        train_samples: for training.
        val_samples: for validation; the rest is for the test.
        seed: of the split.
        test: indices for the test instead; training and validation samples are then among the others.
    """
    with (
        zipfile.ZipFile(path) as archive,
        archive.open(archive.namelist()[0]) as file,
        io.TextIOWrapper(file, encoding="utf-8", newline="") as text,
    ):
        _, *rows = csv.reader(text)
    values = np.array([row[:-1] for row in rows], dtype=np.float64)
    about = {
        "place": "column and row in the photograph",
        "edges": "lines and contrasts to the neighbouring pixels",
        "colour": "intensity, red, green, blue, saturation and hue",
    }
    return _assemble(
        "segments",
        _columns(values, {"place": slice(0, 2), "edges": slice(2, 8), "colour": slice(8, None)}),
        torch.from_numpy(np.unique([row[-1] for row in rows], return_inverse=True)[1]),
        _drawn(len(values), seed, train_samples, val_samples, test),
        about=about,
        protocol=f"pieces of outdoor photographs, {train_samples} of them for training",
        per_feature=tuple(about),
    )


def watch(path: str | Path, people: Sequence[int] = (9, 10), *, seed: int = 0) -> MultimodalData:
    """Which of seven exercises a shoulder does, from the accelerometer and the gyroscope of a smartwatch.

    Ten of the twenty people of D. Burns, N. Leung, M. Hardisty, C. Whyne, P. Henry and S. McLachlin, Shoulder
    physiotherapy exercise recognition, Physiological Measurement 2018; a sample is 4 seconds of a recording. A copy
    comes with seglearn.

    Args:
        path: of watch_dataset.npy.
        people: 1 to 10, for the test; a tenth of the others' samples is for validation.
        seed: of the split.
    """
    recordings = np.load(path, allow_pickle=True).item()
    windows = [_windows(signal) for signal in recordings["X"]]
    counts = [len(x) for x in windows]
    signals = torch.tensor(np.concatenate(windows), dtype=torch.float32)
    whose = np.repeat(recordings["subject"], counts)
    return _assemble(
        "watch",
        {"accelerometer": _spectrogram(signals[:, :3]), "gyroscope": _spectrogram(signals[:, 3:])},
        torch.from_numpy(np.repeat(recordings["y"], counts)),
        _parts(np.flatnonzero(np.isin(whose, people)), len(whose), seed),
        about={
            "accelerometer": "how strong each frequency up to 25 Hz is over 4 seconds, along three axes",
            "gyroscope": "the same of the rotation about three axes",
        },
        protocol="exercises of a shoulder; the test is on people never seen in training",
        groups=whose,
    )


_WINDOW = 192  # at 50 Hz


def _windows(signal: np.ndarray) -> np.ndarray:
    """Pieces `(N, C, 192)` of a recording `(T, C)`; the rest is left out."""
    count = len(signal) // _WINDOW
    return signal[: count * _WINDOW].reshape(count, _WINDOW, -1).transpose(0, 2, 1)


def _spectrogram(signals: Tensor) -> Tensor:
    """Log-magnitude `(N, C, 17, 17)` of signals `(N, C, 192)`."""
    spectra = torch.stft(
        signals.flatten(0, 1), 32, 12, window=torch.hann_window(32), pad_mode="constant", return_complex=True
    )
    return spectra.abs().log1p().unflatten(0, signals.shape[:2])


def films(
    path: str | Path,
    *,
    train_samples: int = 500,
    val_samples: int = 150,
    seed: int = 0,
    test: np.ndarray | None = None,
    encode: Callable[[Sequence[str]], np.ndarray] = embed,
) -> MultimodalData:
    """In which of seven languages a film was made, from its English title, its makers' names and its critics' scores.

    Titles and names are seen through a frozen pre-trained text encoder. Films of Wikidata (CC0), at most 200 of a
    language; a copy comes with bokeh_sampledata.

    Args:
        path: of movies.db.
        train_samples: for training.
        val_samples: for validation; the rest is for the test.
        seed: of the split.
        test: indices for the test instead; training and validation samples are then among the others.
        encode: from N texts to features `(N, D)`.

    Raises:
        ImportError: without wordllama (extra `evidence`), by the default of `encode`.
    """
    views, labels = _films(Path(path), encode)
    return _assemble(
        "films",
        views,
        labels,
        _drawn(len(labels), seed, train_samples, val_samples, test),
        about={
            "title": "its English title, through a frozen text encoder",
            "makers": "the names of director and writers, through the same encoder",
            "critics": "their number, mean score and share of praise",
        },
        protocol=f"languages of films, {train_samples} films for training",
        per_feature=("title", "makers", "critics"),
    )


_LANGUAGES = ("English", "French", "German", "Hindi", "Italian", "Japanese", "Spanish")
_FILMS_OF_A_LANGUAGE = 200
_FILMS_QUERY = """
    SELECT Title, Director, Writer, t.Reviews, t.Rating, Meter FROM omdb JOIN tomatoes t USING (ID)
    WHERE Language = ? AND Director <> '' AND t.Reviews > 0 AND t.Rating IS NOT NULL AND Meter IS NOT NULL ORDER BY ID
"""


@lru_cache(maxsize=1)
def _films(path: Path, encode: Callable[[Sequence[str]], np.ndarray]) -> tuple[dict[str, Tensor], Tensor]:
    """Views and labels of the films in the file, which each split takes its part of."""
    rows = []
    labels = []
    order = np.random.default_rng(2026)
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as connection:
        for label, language in enumerate(_LANGUAGES):
            there = connection.execute(_FILMS_QUERY, (language,)).fetchall()
            chosen = order.permutation(len(there))[:_FILMS_OF_A_LANGUAGE]
            rows += [there[i] for i in chosen]
            labels += [label] * len(chosen)
    titles, directors, writers, reviews, *scores = zip(*rows, strict=True)
    makers = [", ".join(filter(None, names)) for names in zip(directors, writers, strict=True)]
    return {
        "title": torch.from_numpy(encode(titles)),
        "makers": torch.from_numpy(encode(makers)),
        "critics": torch.tensor(np.stack([np.log(reviews), *scores], axis=1), dtype=torch.float32),
    }, torch.tensor(labels)


def load(path: str | Path | None, seed: int) -> MultimodalData:
    """The data of one seed: scikit-learn's digits, or those of a file, known by the arrays in it.

    Raises:
        FileNotFoundError: saying where the data come from.
        ValueError: for a file with other arrays.
    """
    if path is None:
        return digits_views(seed)
    names = set(_arrays(path, f"{AV_DIGITS_ORIGIN} Or mfeat.npz: {MFEAT_ORIGIN}"))
    if {"audio", "image", "speaker", "label"} <= names:
        return av_digits(path, fold=seed, seed=seed)
    if {"fou", "pix", "mor", "label"} <= names:
        return mfeat(path, seed=seed)
    raise ValueError(
        f"`path` should be av_digits.npz or mfeat.npz. Found {path} with arrays {sorted(names)}."
    )


_MFEAT_VIEWS = {
    "fou": "Fourier coefficients of the shape",
    "fac": "profile correlations",
    "kar": "Karhunen-Loeve coefficients",
    "pix": "pixel averages",
    "zer": "Zernike moments",
    "mor": "morphological features",
}


def _arrays(path: str | Path, origin: str) -> dict[str, np.ndarray]:
    """What is in the file.

    Raises:
        FileNotFoundError: saying where the data come from.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no {path}. {origin}")
    with np.load(path) as file:
        return dict(file)


def _parts(test: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of train, val and test: a tenth of what is not for the test is for validation."""
    rest = np.setdiff1d(np.arange(count), test)
    rest = np.random.default_rng(seed).permutation(rest)
    held = len(rest) // 10
    return rest[held:], rest[:held], test


def _drawn(
    count: int, seed: int, train: int, val: int, test: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of train, val and test, drawn at random; the rest is for the test, or the given ones are."""
    order = np.random.default_rng(seed).permutation(count)
    if test is not None:
        order = np.concatenate([order[~np.isin(order, test)][: train + val], test])
    return order[:train], order[train : train + val], order[train + val :]


def _columns(values: np.ndarray, columns: Mapping[str, slice]) -> dict[str, Tensor]:
    return {name: torch.tensor(values[:, part], dtype=torch.float32) for name, part in columns.items()}


def _assemble(
    name: str,
    views: Mapping[str, Tensor],
    labels: Tensor,
    parts: tuple[np.ndarray, np.ndarray, np.ndarray],
    *,
    about: dict[str, str],
    protocol: str,
    per_feature: Collection[str] = (),
    noise: tuple[str, int] | None = None,
    groups: np.ndarray | None = None,
    task: Task = CLASS,
) -> MultimodalData:
    whose = None if groups is None else torch.from_numpy(groups)
    train, val, test = (torch.from_numpy(part) for part in parts)
    if task is NUMBER:
        labels = (labels - labels[train].mean(dim=0)) / labels[train].std(dim=0)
    inputs = {m: _standardised(view, train, per_feature=m in per_feature) for m, view in views.items()}
    if noise is not None:
        modality, seed = noise
        clean = inputs[modality]
        inputs[modality] = clean + torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    train_split, val_split, test_split = (
        Split({m: x[part] for m, x in inputs.items()}, labels[part], None if whose is None else whose[part])
        for part in (train, val, test)
    )
    if task.has_classes:
        first = torch.stack([test[labels[test] == label][0] for label in labels[test].unique()])
    else:
        first = test[:1]
    return MultimodalData(
        name=name,
        train=train_split,
        val=val_split,
        test=test_split,
        num_classes=task.outputs(labels),
        about=about,
        protocol=protocol,
        examples={m: view[first] for m, view in views.items()},
        task=task,
    )


def _standardised(view: Tensor, train: Tensor, *, per_feature: bool) -> Tensor:
    """Mean 0 and standard deviation 1 over the training samples, of the whole view or of each feature by itself."""
    seen = view[train]
    if not per_feature:
        return (view - seen.mean()) / seen.std()
    # A feature that hardly varies in a few training samples would be huge elsewhere.
    return ((view - seen.mean(dim=0)) / seen.std(dim=0).clamp(min=1e-6)).clamp(-5, 5)
