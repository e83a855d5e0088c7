"""The callbacks and recipes on two processes: one small model, as in one process on the whole batch."""

from __future__ import annotations

import pytest
import torch

from tests.frameworks import rank_runs
from tests.frameworks.loops import STEPS, model_and_batches, plain
from tests.ranks import on_ranks

pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore:::accelerate"),
]


def check(results, reference):
    """Both ranks have the same bits, and within rounding those of one process."""
    (first, stats), (second, others) = results
    assert stats == others == {**stats, "modulated": STEPS, "without_scores": 0}
    assert all(torch.equal(first[name], second[name]) for name in first)
    expected = reference.state_dict()
    assert max(float((first[name] - expected[name]).abs().max()) for name in expected) < 1e-6


def test_lightning(tmp_path):
    pytest.importorskip("lightning")
    runs = list(zip(*on_ranks(rank_runs.lightning, tmp_path, fresh=True), strict=True))
    assert len(runs) == 4
    for results in runs:
        check(results, plain(model_and_batches()[1]))


def test_fabric(tmp_path):
    pytest.importorskip("lightning")
    check(on_ranks(rank_runs.fabric, tmp_path, fresh=True), plain(model_and_batches()[1]))


def test_accelerate(tmp_path):
    pytest.importorskip("accelerate")
    check(on_ranks(rank_runs.accelerate, tmp_path, fresh=True), plain(model_and_batches()[1]))


def test_transformers(tmp_path):
    pytest.importorskip("transformers")
    from balanceopt import OGM
    from tests.frameworks.under_transformers import default_optimizer, linear

    make = default_optimizer(tmp_path)
    scaled = OGM(0.5, apply_to="update")
    results = on_ranks(rank_runs.transformers, tmp_path, str(tmp_path / "out"), fresh=True)
    check(results, plain(model_and_batches()[1], modulation=scaled, make=make, clip=1.0, schedule=linear))
