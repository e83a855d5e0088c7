"""Data sets too large for memory: lists of clips, read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

# From a clip's source and whether it is for training to its tensor.
Read = Callable[[Any, bool], Tensor]


@dataclass(frozen=True)
class Clip:
    """A sample: where each modality is, its class, and who it is of where that is known."""

    sources: Mapping[str, Any]
    label: int
    person: str | None = None


class Clips(Dataset[tuple[Tensor, ...]]):
    """Samples `(*inputs, label)` in the order of `readers`.

    Args:
        clips: what there is.
        readers: modality -> what reads it.
        training: whether readers may augment.
    """

    def __init__(self, clips: Sequence[Clip], readers: Mapping[str, Read], *, training: bool) -> None:
        self.clips = list(clips)
        self.readers = dict(readers)
        self.training = training

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        clip = self.clips[index]
        inputs = (read(clip.sources[m], self.training) for m, read in self.readers.items())
        return (*inputs, torch.tensor(clip.label))


@dataclass(frozen=True)
class ClipData:
    """A data set, split.

    Args:
        name: short name.
        train: with augmentation.
        val: for choices and for re-learning's diagnosis.
        test: for the numbers that are reported.
        num_classes: C.
        modalities: their names, in the order of the samples.
    """

    name: str
    train: Clips
    val: Clips
    test: Clips
    num_classes: int
    modalities: tuple[str, ...]


def split_off(clips: Sequence[Clip], share: float, seed: int) -> tuple[list[Clip], list[Clip]]:
    """A random part for training and a random `share`, at least one clip, held out."""
    order = np.random.default_rng(seed).permutation(len(clips))
    held = max(1, round(share * len(clips)))
    return [clips[i] for i in sorted(order[held:])], [clips[i] for i in sorted(order[:held])]


def assemble(
    name: str,
    parts: tuple[Sequence[Clip], Sequence[Clip], Sequence[Clip]],
    readers: Mapping[str, Read],
    num_classes: int,
) -> ClipData:
    """Training, validation and test clips with their readers."""
    train, val, test = (
        Clips(clips, readers, training=training)
        for clips, training in zip(parts, (True, False, False), strict=True)
    )
    return ClipData(name, train, val, test, num_classes, tuple(readers))


def expect(path: Path, what: str) -> Path:
    """`path`, if it is there.

    Raises:
        FileNotFoundError: saying what should be there and where it comes from.
    """
    if not path.exists():
        raise FileNotFoundError(f"there should be {path}: {what}")
    return path
