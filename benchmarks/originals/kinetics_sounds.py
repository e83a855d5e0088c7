"""Kinetics-Sounds: actions of Kinetics that are seen and heard."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path

from torch import Tensor

from benchmarks.originals.clips import Clip, ClipData, Read, assemble, expect, split_off
from benchmarks.originals.media import frames_of, log_spectrogram, read_pictures, spread

ORIGIN = (
    "rows of Kinetics' annotation files (github.com/cvdfoundation/kinetics-dataset) with the classes of "
    "Kinetics-Sounds (Arandjelovic and Zisserman 2017), columns label and youtube_id, time_start, time_end"
)


def kinetics_sounds(root: Path, seed: int = 0, *, frames: int = 3, size: int = 224) -> ClipData:
    """Clips of `train.csv` and `test.csv` with `audio/<clip>.wav` and pictures in `frames/<clip>/`.

    `<clip>` is as the original's files are named, `<youtube_id>_<start>_<end>` with six digits each. Clips that are
    listed and gone from the web, as many are, are left out. A tenth of the training clips is for validation.

    Args:
        root: folder of the data set.
        seed: of the split.
        frames: pictures of a clip.
        size: of the pictures.

    Raises:
        FileNotFoundError: saying what should be there.
        ValueError: for an annotation file without the columns.
    """
    how = "made of the clips by ffmpeg -i CLIP.mp4"
    expect(root / "audio", f"<youtube_id>_000010_000020.wav, {how} audio/CLIP.wav")
    expect(root / "frames", f"a folder of pictures for each clip, {how} -vf fps=1 frames/CLIP/%03d.jpg")
    listed = {part: _listed(expect(root / f"{part}.csv", ORIGIN)) for part in ("train", "test")}
    classes = sorted({label for label, _ in listed["train"]})
    found = {part: _there(root, rows, classes) for part, rows in listed.items()}
    train, val = split_off(found["train"], 0.1, seed)
    readers: dict[str, Read] = {"audio": _sound, "visual": partial(_pictures, frames=frames, size=size)}
    return assemble("kinetics-sounds", (train, val, found["test"]), readers, len(classes))


def _listed(path: Path) -> list[tuple[str, str]]:
    """(label, clip) of each row."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    needed = {"label", "youtube_id", "time_start", "time_end"}
    if not rows or not needed <= set(rows[0]):
        raise ValueError(
            f"{path} should have columns {sorted(needed)}. Found {sorted(rows[0]) if rows else 'no rows'}."
        )
    return [
        (
            row["label"],
            f"{row['youtube_id']}_{int(float(row['time_start'])):06d}_{int(float(row['time_end'])):06d}",
        )
        for row in rows
    ]


def _there(root: Path, rows: list[tuple[str, str]], classes: list[str]) -> list[Clip]:
    clips = [
        Clip(
            {"audio": root / "audio" / f"{name}.wav", "visual": root / "frames" / name}, classes.index(label)
        )
        for label, name in rows
        if label in classes
    ]
    clips = [clip for clip in clips if clip.sources["audio"].is_file() and clip.sources["visual"].is_dir()]
    if not clips:
        raise FileNotFoundError(
            f"there should be clips of the csv in {root / 'audio'} and {root / 'frames'}. Found none."
        )
    return clips


def _sound(path: Path, training: bool) -> Tensor:
    return log_spectrogram(path, rate=16_000, seconds=10.0, window=512, hop=353)


def _pictures(folder: Path, training: bool, *, frames: int, size: int) -> Tensor:
    return read_pictures(spread(frames_of(folder), frames, training), size, training)
