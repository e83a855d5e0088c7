"""CMU-MOSI: opinions on film, as words, voice and face."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.originals.clips import Clip, ClipData, assemble, expect

ORIGIN = (
    "mosi_data.pkl of MultiBench (github.com/pliang279/MultiBench) "
    "or aligned_50.pkl of MMSA (github.com/thuiar/MMSA)"
)
_FILES = ("mosi_data.pkl", "aligned_50.pkl")
_LABELS = ("labels", "regression_labels")
_MODALITIES = ("text", "audio", "vision")


def cmu_mosi(root: Path, seed: int = 0) -> ClipData:
    """Sequences `(T, D)` of each modality; the class is whether the opinion is negative. The official split.

    Raises:
        FileNotFoundError: saying what should be there.
        ValueError: for a file of another form.
    """
    path = next((root / name for name in _FILES if (root / name).is_file()), root / _FILES[0])
    content = _load(expect(path, ORIGIN))
    parts = tuple(_clips(content, part, path) for part in ("train", "valid", "test"))
    readers = dict.fromkeys(_MODALITIES, _sequence)
    return assemble("cmu-mosi", (parts[0], parts[1], parts[2]), readers, 2)


def _clips(content: Any, part: str, path: Path) -> list[Clip]:
    found = content.get(part, {}) if isinstance(content, dict) else {}
    key = next((name for name in _LABELS if name in found), None)
    if key is None or not set(_MODALITIES) <= set(found):
        raise ValueError(
            f"{path} should have {part!r} with {_MODALITIES} and 'labels'. Found {sorted(found)}."
        )
    scores = np.asarray(found[key], dtype=np.float32).reshape(len(found["text"]), -1)[:, 0]
    return [
        Clip({m: np.asarray(found[m][i], dtype=np.float32) for m in _MODALITIES}, int(score >= 0))
        for i, score in enumerate(scores)
    ]


def _sequence(source: np.ndarray, training: bool) -> Tensor:
    # The voice of silence is minus infinity in the originals.
    return torch.from_numpy(source).nan_to_num(0.0, 0.0, 0.0)


_HARMLESS = {("numpy", n) for n in ("_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer")}
_HARMLESS |= {("_codecs", "encode")}


class _ArraysOnly(pickle.Unpickler):
    """A pickle from the web may run anything; this one makes arrays and plain values."""

    def find_class(self, module: str, name: str) -> Any:
        if (module.split(".")[0], name) in _HARMLESS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(
            f"the file should hold arrays and plain values only. Found {module}.{name}."
        )


def _load(path: Path) -> Any:
    with path.open("rb") as file:
        try:
            return _ArraysOnly(file, encoding="latin1").load()
        except (pickle.UnpicklingError, EOFError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} can't be read: {error}") from error
