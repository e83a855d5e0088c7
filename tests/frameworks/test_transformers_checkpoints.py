"""What a checkpoint brings back: BalanceCallback, OPM and re-learning under the real Transformers Trainer."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")


from typing import Any

import torch

import balanceopt as bo
from tests.frameworks.loops import (
    SEED,
    counters,
    unchanged,
)
from tests.frameworks.under_transformers import MARKS, Net, callback, everything, trainer
from tests.models import with_dropout
from tests.training import same_bits

pytestmark = MARKS


# Shuffled, with dropout, and saved in the middle of an epoch: what the Trainer resumes itself.
LONG: dict[str, Any] = {
    "count": 4,
    "max_steps": 10,
    "save_strategy": "steps",
    "save_steps": 5,
    "shuffle": True,
}


def resume(folder, make_callback, **options):
    """Train 10 steps; then resume a new Trainer from step 5. Returns both models and the second callback."""
    whole, resumed = Net(encoder=with_dropout), Net(encoder=with_dropout)
    trainer(folder, whole, make_callback(), **LONG, **options).train()
    balance = make_callback(seed=SEED + 1)  # the checkpoint's seed holds
    trainer(folder, resumed, balance, **LONG, **options).train(
        resume_from_checkpoint=f"{folder}/checkpoint-5"
    )
    return whole, resumed, balance


def test_resuming_is_exact(tmp_path):
    whole, resumed, balance = resume(tmp_path, callback)
    assert balance.stats()["modulated"] == 5
    assert same_bits(resumed, whole)
    saved = torch.load(tmp_path / "checkpoint-5" / "optimizer.pt", weights_only=True)
    assert counters(saved) == {
        "balanceopt_step": 5,
        "balanceopt_seed": SEED,
        "balanceopt_epoch": 1,
        "balanceopt_methods": None,
    }


def test_a_method_s_own_state_is_resumed(tmp_path):
    def agm(**options):
        return callback(bo.AGM(2.0, apply_to="update"), **options)

    whole, resumed, balance = resume(tmp_path, agm)
    assert balance.stats()["modulated"] == 5
    assert same_bits(resumed, whole)


def test_resuming_is_exact_with_accumulation(tmp_path):
    whole, resumed, balance = resume(tmp_path, callback, gradient_accumulation_steps=2)
    assert balance.stats()["modulated"] == 5
    assert same_bits(resumed, whole)


def test_a_checkpoint_without_balancing_says_so(tmp_path):
    trainer(tmp_path, Net(encoder=with_dropout), **LONG).train()
    balance = callback()
    again = trainer(tmp_path, Net(encoder=with_dropout), balance, **LONG)
    with pytest.warns(UserWarning, match="a bare optimizer's state"):
        again.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-5")
    assert balance.stats()["modulated"] == 5


def test_a_checkpoint_with_balancing_goes_on_without(tmp_path):
    trainer(tmp_path, Net(encoder=with_dropout), callback(), **LONG).train()
    model = Net(encoder=with_dropout)
    trainer(tmp_path, model, **LONG).train(resume_from_checkpoint=f"{tmp_path}/checkpoint-5")
    assert unchanged(model)


# -- OPM and re-learning beside it ---------------------------------------------------------------------------------


def test_all_methods_together_are_resumed(tmp_path):
    options = {"count": 3, "max_steps": 12, "save_strategy": "steps", "save_steps": 1}
    whole, balance = Net(), everything()
    trainer(tmp_path, whole, balance, **options).train()
    assert balance.modulator.stats()["dropping"] > 0
    assert balance.scheduler.relearns == 1
    assert unchanged(whole)
    for step in (2, 5, 6, 7, 9):  # in the middle of epochs, and between them before and after re-learning
        resumed = Net()
        run = trainer(tmp_path, resumed, everything(), **options, save_total_limit=12)
        run.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-{step}")
        assert same_bits(resumed, whole)


def test_a_checkpoint_without_their_state_says_so(tmp_path):
    trainer(tmp_path, Net(encoder=with_dropout), callback(), **LONG).train()
    run = trainer(tmp_path, Net(encoder=with_dropout), everything(), **LONG)
    with pytest.warns(UserWarning, match="no state of `relearn`"), pytest.warns(match="of `prediction`"):
        run.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-5")


def test_training_again_goes_on_counting(tmp_path):
    balance = everything()
    run = trainer(tmp_path, Net(), balance, count=3, max_steps=6)
    run.train()
    run.train()
    assert balance.scheduler.last_epoch == 2
    assert balance.scheduler.relearns == 1
    assert balance.modulator.stats()["forwards"] == 12
