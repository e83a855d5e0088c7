"""A small grid on made data: two sets that need no time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.evidence import sets
from benchmarks.evidence.grid import Grid
from benchmarks.evidence.rows import JOINT, rows_of, with_needs
from benchmarks.evidence.running import Job

DROPOUT = "modality dropout, fixed rate"
ENSEMBLE = "ensemble of encoders alone (UME)"
RECIPE = "recipe: uni-modal losses"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With an mfeat.npz of 300 samples and an av_digits.npz of 120."""
    rng = np.random.default_rng(0)
    label = np.arange(300) % 10
    fou, pix, mor = rng.normal(label[:, None], 2, (3, len(label), 5))
    np.savez(tmp_path / "mfeat.npz", label=label.astype(np.uint8), fou=fou, pix=pix, mor=mor)
    np.savez(
        tmp_path / "av_digits.npz",
        audio=rng.normal(3, 2, (120, 32, 40)).astype(np.float16),
        image=rng.integers(0, 256, (120, 28, 28), dtype=np.uint8),
        label=(np.arange(120) % 10).astype(np.uint8),
        speaker=(np.arange(120) // 20).astype(np.uint8),
    )
    sets.data_of.cache_clear()
    sets.fingerprint.cache_clear()
    return tmp_path


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> sets.EvidenceSet:
    """mfeat_3 with few choices, in place of the real one."""
    made = replace(sets.SETS["mfeat_3"], lrs=(0.03, 0.1), lengths=(1, 2), adam_lrs=(1e-3,), choices=2)
    monkeypatch.setitem(sets.SETS, "mfeat_3", made)
    return made


@pytest.fixture
def grid(folder: Path, small: sets.EvidenceSet) -> Grid:
    """Joint training, each encoder alone and their ensemble, two controls, one recipe and its vote; two seeds."""
    rows = rows_of(small)
    wanted = with_needs(rows, {JOINT, DROPOUT, "uni-modal losses", f"{RECIPE}, heads vote", RECIPE, ENSEMBLE})
    return Grid({"mfeat_3": wanted}, 2, folder)


def made_up(job: Job) -> dict[str, Any]:
    """A result that depends on the job and nothing else: no training."""
    rng = np.random.default_rng(int(job.key, 16))
    modalities = sets.SETS[job.set].modalities if job.modality is None else (job.modality,)
    bonus = 5.0 * ("alone" in job.row) + 3.0 * ("recipe" in job.row)
    accuracy = 80 + bonus + 10 * job.options.get("lr", 0) + rng.normal()
    said = {
        "metric": accuracy,
        "ece": 2.0,
        "groups": {"1": accuracy - 5, "2": accuracy},
        "missing": {} if job.modality else dict.fromkeys(modalities, 50.0),
    }
    vote = {**said, "metric": accuracy + 1} if job.options.get("unimodal_heads") == "own" else None
    return {
        **said,
        "probes": {m: 60 + bonus + rng.normal() for m in modalities},
        **({} if vote is None else {"vote": vote}),
        "train_s": 1.0,
        "all_s": 1.5,
        "clock": [1000.0 + job.seed, 1001.5 + job.seed],
    }
