"""Small made files of the real data sets' form."""

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def av_file(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    count = 120
    path = tmp_path / "av_digits.npz"
    np.savez(
        path,
        audio=rng.normal(3, 2, (count, 32, 40)).astype(np.float16),
        image=rng.integers(0, 256, (count, 28, 28), dtype=np.uint8),
        label=(np.arange(count) % 10).astype(np.uint8),
        speaker=(np.arange(count) // 20).astype(np.uint8),
    )
    return path


@pytest.fixture
def mfeat_file(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    count = 100
    label = (np.arange(count) % 10).astype(np.uint8)
    fou, pix, mor, zer = rng.normal(label[:, None], 1, (4, count, 5))
    path = tmp_path / "mfeat.npz"
    np.savez(path, label=label, fou=fou, pix=pix, mor=mor, zer=zer)
    return path
