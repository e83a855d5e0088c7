"""The data of the benchmark: each set in a part to tune on and splits to test on, and nothing is in both.

What is tuned on is never tested: two speakers, three writers, two people or a few hundred samples are kept for the
choice of hyper-parameters. The tests are on the others, in turn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch.nn.functional as F

from benchmarks.data import (
    MultimodalData,
    Split,
    av_digits,
    diabetes,
    digits_views,
    films,
    mfeat,
    segments,
    watch,
    yeast,
)
from benchmarks.extras import file_of, installed
from benchmarks.tasks import CLASS, LABELS, NUMBER, Task

Part = Literal["tune", "test"]

# Where the tests go to: two speakers at a time, consecutive seeds have none in common.
_TUNING_SPEAKERS = (4, 5)
_TEST_SPEAKERS = ((0, 1), (2, 3), (0, 2), (1, 3), (0, 3), (1, 2))
_TUNING_WRITERS = (11, 12, 13)
_WRITERS = 11
_TUNING_SAMPLES = 400
_PAIRS, _DIGITS = 900, 600
_TUNING_PATIENTS, _PATIENTS = 110, 442
_GENES = 2417
_SEGMENTS = 2310
_TUNING_FILMS, _FILMS = 250, 1242
_TUNING_PEOPLE = (9, 10)
_TEST_PEOPLE = ((1, 2), (3, 4), (5, 6), (7, 8), (1, 3), (2, 4), (5, 7), (6, 8), (1, 4), (2, 3))


@dataclass(frozen=True)
class EvidenceSet:
    """A data set in one setting.

    Args:
        name: short, for the command line and for files.
        title: for the reader.
        load: the data of (file, part, seed).
        modalities: their names.
        file: its name in the data folder, or in the first of its packages; None if it needs none.
        lrs: learning rates of SGD to choose from.
        adam_lrs: those of AdamW.
        lengths: numbers of epochs to choose from; the middle one while the learning rate is chosen.
        choices: runs of each candidate that is chosen from; the cheaper they are the more.
        tests: runs of each row that are tested.
        batch_size: samples in a step.
        task: what the targets are.
        packages: that it needs, beside those of the demo; its file comes with the first.
    """

    name: str
    title: str
    load: Callable[[Path | None, Part, int], MultimodalData]
    modalities: tuple[str, ...]
    file: str | None
    lrs: tuple[float, ...]
    adam_lrs: tuple[float, ...]
    lengths: tuple[int, ...]
    choices: int = 2
    tests: int = 10
    batch_size: int = 64
    task: Task = CLASS
    packages: tuple[str, ...] = ()

    def lacks(self, folder: Path | None) -> str | None:
        """The file or package that it needs and that is not there."""
        if self.packages:
            return next((package for package in self.packages if not installed(package)), None)
        return self.file if self.file is not None and not _has(folder, self.file) else None

    def path(self, folder: Path | None) -> Path | None:
        """Its file; None if it needs none.

        Raises:
            FileNotFoundError: if it needs one that is not there.
            ImportError: if the package that has it is not installed.
        """
        if self.file is None:
            return None
        if self.packages:
            return file_of(self.packages[0], self.file)
        if folder is None or not _has(folder, self.file):
            raise FileNotFoundError(f"{self.name} needs {self.file}. Found no such file in {folder}.")
        return folder / self.file


def _has(folder: Path | None, file: str) -> bool:
    return folder is not None and (folder / file).is_file()


def _av_digits(
    noise: Literal["image", "audio"] | None, path: Path | None, part: Part, seed: int
) -> MultimodalData:
    assert path is not None
    speakers = _TUNING_SPEAKERS if part == "tune" else _TEST_SPEAKERS[seed % len(_TEST_SPEAKERS)]
    return _halved(av_digits(path, noise=noise, seed=_seed(part, seed), speakers=speakers), _PAIRS)


def _halved(data: MultimodalData, train_samples: int) -> MultimodalData:
    """The means of 2x2 pixels, and the first of the training samples, which are in random order."""

    train, val, test = (
        replace(split, inputs={m: F.avg_pool2d(x, 2) for m, x in split.inputs.items()})
        for split in (_first(data.train, train_samples), data.val, data.test)
    )
    return replace(data, train=train, val=val, test=test)


def _first(split: Split, count: int) -> Split:
    """The first samples of a split in random order."""
    inputs = {m: x[:count] for m, x in split.inputs.items()}
    return Split(inputs, split.labels[:count], None if split.groups is None else split.groups[:count])


def _mfeat(views: tuple[str, ...], path: Path | None, part: Part, seed: int) -> MultimodalData:
    assert path is not None
    with np.load(path) as file:
        count = len(file["label"])
    # A fifth at most, so that small files of the same form split as well.
    kept = min(_TUNING_SAMPLES, count // 5)
    train = min(200, count // 5)
    order = np.random.default_rng(2026).permutation(count)
    tuning, others = order[:kept], order[kept:]
    if part == "tune":
        return mfeat(path, views, train_samples=train, seed=_seed(part, seed), test=tuning)
    test = np.random.default_rng(seed).permutation(others)[2 * train :]
    return mfeat(path, views, train_samples=train, seed=seed, test=test)


def _digits(path: Path | None, part: Part, seed: int) -> MultimodalData:
    in_turn = tuple((3 * seed + i) % _WRITERS for i in range(3))
    data = digits_views(_seed(part, seed), writers=_TUNING_WRITERS if part == "tune" else in_turn)
    return replace(data, train=_first(data.train, _DIGITS))


def _diabetes(path: Path | None, part: Part, seed: int) -> MultimodalData:
    test = _drawn_test(_PATIENTS, _TUNING_PATIENTS, 260, part, seed)
    return diabetes(train_samples=200, val_samples=60, seed=_seed(part, seed), test=test)


def _yeast(path: Path | None, part: Part, seed: int) -> MultimodalData:
    assert path is not None
    test = _drawn_test(_GENES, _TUNING_SAMPLES, 800, part, seed)
    return yeast(path, train_samples=600, val_samples=200, seed=_seed(part, seed), test=test)


def _segments(path: Path | None, part: Part, seed: int) -> MultimodalData:
    assert path is not None
    test = _drawn_test(_SEGMENTS, _TUNING_SAMPLES, 600, part, seed)
    return segments(path, train_samples=300, val_samples=300, seed=_seed(part, seed), test=test)


def _watch(path: Path | None, part: Part, seed: int) -> MultimodalData:
    assert path is not None
    people = _TUNING_PEOPLE if part == "tune" else _TEST_PEOPLE[seed % len(_TEST_PEOPLE)]
    return watch(path, people, seed=_seed(part, seed))


def _films(path: Path | None, part: Part, seed: int) -> MultimodalData:
    assert path is not None
    test = _drawn_test(_FILMS, _TUNING_FILMS, 650, part, seed)
    return films(path, train_samples=500, val_samples=150, seed=_seed(part, seed), test=test)


def _drawn_test(count: int, tuning: int, others: int, part: Part, seed: int) -> np.ndarray:
    """Indices for the test: the same `tuning` ones for choices, and all but `others` of the rest for a seed's test."""
    order = np.random.default_rng(2026).permutation(count)
    if part == "tune":
        return order[:tuning]
    return np.random.default_rng(seed).permutation(order[tuning:])[others:]


def _seed(part: Part, seed: int) -> int:
    """Tuning has initial weights, batches and noise of its own."""
    return seed + 1000 if part == "tune" else seed


def _spoken(name: str, title: str, noise: Literal["image", "audio"] | None) -> EvidenceSet:
    # Behind BatchNorm large rates do best: 0.1, with which one may well begin, costs joint training two points.
    return EvidenceSet(
        name, title, partial(_av_digits, noise), ("audio", "image"), "av_digits.npz",
        lrs=(0.1, 0.3, 0.6, 1.2), adam_lrs=(3e-3, 1e-2, 3e-2, 1e-1), lengths=(8, 12, 16), tests=8,
    )  # fmt: skip


def _numerals(name: str, title: str, views: tuple[str, ...]) -> EvidenceSet:
    return EvidenceSet(
        name, title, partial(_mfeat, views), views, "mfeat.npz",
        lrs=(0.01, 0.03, 0.1, 0.3), adam_lrs=(1e-3, 3e-3, 1e-2, 3e-2), lengths=(15, 25, 50), choices=3,
    )  # fmt: skip


SETS: dict[str, EvidenceSet] = {
    found.name: found
    for found in (
        _spoken("av_clean", "Spoken and written digits, speakers never heard", None),
        _spoken("av_noise_image", "Spoken and written digits, noise on the image", "image"),
        _spoken("av_noise_audio", "Spoken and written digits, noise on the audio", "audio"),
        _numerals("mfeat_3", "Numerals in three views, 200 training samples", ("fou", "pix", "mor")),
        _numerals(
            "mfeat_6",
            "Numerals in six views, 200 training samples",
            ("fou", "fac", "kar", "pix", "zer", "mor"),
        ),
        EvidenceSet(
            "digits", "Written digits, picture and spectrum, writers never seen", _digits, ("image", "spectrum"),
            None, lrs=(0.01, 0.03, 0.1, 0.3), adam_lrs=(1e-3, 3e-3, 1e-2, 3e-2), lengths=(15, 25, 40), tests=8,
        ),
        EvidenceSet(
            "diabetes", "How far a diabetes went, from person, body and blood (regression)", _diabetes,
            ("person", "body", "blood"),
            None, lrs=(0.001, 0.003, 0.01, 0.03), adam_lrs=(3e-4, 1e-3, 3e-3, 1e-2), lengths=(8, 15, 30), choices=3,
            batch_size=32, task=NUMBER,
        ),
        EvidenceSet(
            "yeast", "Functions of genes, from expression and phylogeny (14 labels)", _yeast,
            ("expression", "phylogeny"), "datasets/yeast.csv.gz",
            lrs=(0.03, 0.1, 0.3, 1.0), adam_lrs=(3e-4, 1e-3, 3e-3, 1e-2), lengths=(8, 15, 30), choices=2,
            task=LABELS, packages=("river",),
        ),
        EvidenceSet(
            "watch", "Exercises of a shoulder, from two sensors of a smartwatch, people never seen", _watch,
            ("accelerometer", "gyroscope"), "data/watch_dataset.npy",
            lrs=(0.03, 0.1, 0.3, 1.0), adam_lrs=(1e-3, 3e-3, 1e-2, 3e-2), lengths=(8, 12, 16), tests=8,
            packages=("seglearn",),
        ),
        EvidenceSet(
            "films", "Languages of films, from title, makers (frozen text features) and critics", _films,
            ("title", "makers", "critics"), "_data/movies.db",
            lrs=(0.01, 0.03, 0.1, 0.3), adam_lrs=(3e-4, 1e-3, 3e-3, 1e-2), lengths=(8, 15, 30), choices=3,
            packages=("bokeh_sampledata", "wordllama"),
        ),
        EvidenceSet(
            "segments", "Pieces of photographs, from place, edges and colour, 300 training samples", _segments,
            ("place", "edges", "colour"), "datasets/segment.csv.zip",
            lrs=(0.03, 0.1, 0.3, 1.0), adam_lrs=(1e-3, 3e-3, 1e-2, 3e-2), lengths=(15, 25, 50), choices=3,
            packages=("river",),
        ),
    )
}  # fmt: skip


@lru_cache(maxsize=8)
def data_of(name: str, folder: Path | None, part: Part, seed: int) -> MultimodalData:
    """The data of one run; the last few are kept."""
    found = SETS[name]
    return found.load(found.path(folder), part, seed)


@lru_cache
def fingerprint(name: str, folder: Path | None) -> str:
    """Of the set's file: results of other data are other results."""
    path = SETS[name].path(folder)
    return "embedded" if path is None else hashlib.sha256(path.read_bytes()).hexdigest()[:12]
