"""AV-MNIST: written digits with less contrast, and spectrograms of spoken ones with noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.originals.clips import Clip, ClipData, assemble, expect, split_off

ORIGIN = "avmnist.tar.gz of Vielzeuf et al. 2018 in the form that MultiBench ships (github.com/pliang279/MultiBench)"


def av_mnist(root: Path, seed: int = 0) -> ClipData:
    """`image/{train,test}_data.npy` (N, 784), `audio/{train,test}_data.npy` (N, 112, 112), `{train,test}_labels.npy`.

    A twelfth of the training samples is for validation (5,000 of 60,000, as usual).

    Raises:
        FileNotFoundError: saying what should be there.
        ValueError: for files of different lengths.
    """
    parts = {part: _clips(root, part) for part in ("train", "test")}
    train, val = split_off(parts["train"], 1 / 12, seed)
    labels = max(clip.label for clip in parts["train"])
    return assemble("av-mnist", (train, val, parts["test"]), {"image": _image, "audio": _audio}, labels + 1)


def _clips(root: Path, part: str) -> list[Clip]:
    image, audio = (
        np.load(expect(root / m / f"{part}_data.npy", ORIGIN), mmap_mode="r") for m in ("image", "audio")
    )
    labels = np.load(expect(root / f"{part}_labels.npy", ORIGIN)).astype(int)
    if not len(image) == len(audio) == len(labels):
        raise ValueError(
            f"the {part} files in {root} should be of one length. Found {len(image)}, {len(audio)}, {len(labels)}."
        )
    return [Clip({"image": (image, i), "audio": (audio, i)}, int(label)) for i, label in enumerate(labels)]


def _image(source: tuple[Any, int], training: bool) -> Tensor:
    side = round(source[0][0].size ** 0.5)
    return torch.from_numpy(np.array(source[0][source[1]], dtype=np.float32)).reshape(1, side, side) / 255


def _audio(source: tuple[Any, int], training: bool) -> Tensor:
    return torch.from_numpy(np.array(source[0][source[1]], dtype=np.float32))[None] / 255
