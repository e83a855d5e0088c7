"""Small made files in the form of the public originals."""

from __future__ import annotations

import pickle
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest

image = pytest.importorskip("PIL.Image")

EMOTIONS = ("ANG", "HAP", "SAD")


def write_sound(path: Path, pitch: float, *, rate: int = 8000, seconds: float = 0.2, width: int = 2) -> None:
    """A tone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tone = np.sin(2 * np.pi * pitch * np.arange(round(rate * seconds)) / rate)
    kind = {1: np.uint8, 2: np.int16, 4: np.int32}[width]
    samples = (tone * 0.5 + 1) * 128 if width == 1 else tone * 0.5 * 2 ** (8 * width - 1)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(samples.astype(kind).tobytes())


def write_pictures(folder: Path, count: int, *, value: int = 100, gray: bool = False) -> None:
    """Pictures of 40 x 48 pixels, brighter from one to the next."""
    folder.mkdir(parents=True)
    for i in range(count):
        shape = (40, 48) if gray else (40, 48, 3)
        image.fromarray(np.full(shape, value + 10 * i, dtype=np.uint8)).save(folder / f"frame{i + 1:06d}.png")


@pytest.fixture
def crema_root(tmp_path: Path) -> Path:
    """20 clips of three emotions."""
    for i in range(20):
        name = f"{1001 + i // 6}_DFA_{EMOTIONS[i % 3]}_X{i}"
        write_sound(tmp_path / "AudioWAV" / f"{name}.wav", 300 + 300 * (i % 3))
        write_pictures(tmp_path / "Frames" / name, 2, value=40 + 60 * (i % 3))
    write_sound(tmp_path / "AudioWAV" / "1076_MTI_SAD_XX.wav", 300)  # as in the original, without a picture
    return tmp_path


@pytest.fixture
def kinetics_root(tmp_path: Path) -> Path:
    """8 + 4 clips of two classes; one more is listed and gone."""
    for part, numbers in (("train", range(8)), ("test", range(8, 12))):
        rows = ["label,youtube_id,time_start,time_end,split"]
        for i in numbers:
            name = f"id{i}_000010_000020"
            rows.append(f"{('tap dancing', 'singing')[i % 2]},id{i},10,20,{part}")
            write_sound(tmp_path / "audio" / f"{name}.wav", 500)
            write_pictures(tmp_path / "frames" / name, 4)
        rows.append(f"singing,gone,10,20,{part}")
        (tmp_path / f"{part}.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


@pytest.fixture
def ucf_root(tmp_path: Path) -> Path:
    """Two classes, the official lists, frames and flow."""
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 ApplyEyeMakeup\r\n2 Archery\r\n")
    lines: dict[str, list[str]] = {"train": [], "test": []}
    for i in range(14):
        name = ("ApplyEyeMakeup", "Archery")[i % 2]
        video = f"v_{name}_g{i:02d}_c01"
        lines["test" if i < 4 else "train"].append(
            f"{name}/{video}.avi" + (f" {i % 2 + 1}" if i >= 4 else "")
        )
        write_pictures(tmp_path / "jpegs_256" / video, 6)
        for direction, value in (("u", 50), ("v", 150)):
            write_pictures(tmp_path / "tvl1_flow" / direction / video, 5, value=value, gray=True)
    for part, found in lines.items():
        (lists / f"{part}list01.txt").write_text("\n".join(found) + "\n")
    return tmp_path


@pytest.fixture
def mosi_root(tmp_path: Path) -> Path:
    """20, 6 and 8 sequences of ten steps."""
    rng = np.random.default_rng(0)
    content: dict[str, dict[str, Any]] = {}
    for part, count in (("train", 20), ("valid", 6), ("test", 8)):
        widths = {"text": 12, "audio": 5, "vision": 7}
        content[part] = {m: rng.normal(size=(count, 10, d)).astype(np.float32) for m, d in widths.items()}
        content[part]["labels"] = np.linspace(-3, 3, count).reshape(-1, 1, 1)
        content[part]["id"] = [f"clip{i}" for i in range(count)]
    content["train"]["audio"][0, 0, 0] = -np.inf
    (tmp_path / "mosi_data.pkl").write_bytes(pickle.dumps(content))
    return tmp_path


@pytest.fixture
def av_mnist_root(tmp_path: Path) -> Path:
    """36 + 10 pairs."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 36), ("test", 10)):
        for modality, shape in (("image", (784,)), ("audio", (112, 112))):
            (tmp_path / modality).mkdir(exist_ok=True)
            np.save(tmp_path / modality / f"{part}_data.npy", rng.uniform(0, 255, (count, *shape)))
        np.save(tmp_path / f"{part}_labels.npy", np.arange(count) % 10)
    return tmp_path
