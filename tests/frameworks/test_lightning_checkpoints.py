"""What a `.ckpt` brings back: BalanceCallback, OPM and re-learning under the real Lightning Trainer."""

from __future__ import annotations

import pytest

pytest.importorskip("lightning")


import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import balanceopt as bo
from balanceopt.integrations.lightning import BalanceCallback
from tests.frameworks.loops import (
    SEED,
    STEPS,
    counters,
    flat,
    halving,
    method,
    model_and_batches,
    momentum,
    unchanged,
)
from tests.frameworks.under_lightning import ENCODERS, MARKS, Lit, callback, everything, fit, loader, trainer
from tests.training import same_bits, train

pytestmark = MARKS


def test_resuming_is_exact(tmp_path):
    whole = Lit(schedule=halving)
    fit(whole, callback(), max_epochs=3)

    saver = ModelCheckpoint(tmp_path, "{epoch}", every_n_epochs=1, save_top_k=-1)
    trainer(callback(), saver, max_epochs=1).fit(Lit(schedule=halving), loader())
    path = tmp_path / "epoch=0.ckpt"
    saved = torch.load(path, weights_only=True)
    assert counters(saved["optimizer_states"][0]) == {
        "balanceopt_step": STEPS,
        "balanceopt_seed": SEED,
        "balanceopt_epoch": 0,
        "balanceopt_methods": None,
    }

    resumed, balance = Lit(schedule=halving), callback(seed=SEED + 1)  # the checkpoint's seed holds
    trainer(balance, max_epochs=3).fit(resumed, loader(), ckpt_path=path)
    assert balance.stats()["modulated"] == 2 * STEPS
    assert same_bits(resumed.net, whole.net)


def test_a_method_s_own_state_is_resumed(tmp_path):
    whole = Lit()
    fit(whole, callback(bo.AGM(2.0)), max_epochs=3)
    saver = ModelCheckpoint(tmp_path, "{epoch}", every_n_epochs=1, save_top_k=-1)
    trainer(callback(bo.AGM(2.0)), saver, max_epochs=1).fit(Lit(), loader())
    resumed = Lit()
    trainer(callback(bo.AGM(2.0)), max_epochs=3).fit(resumed, loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert same_bits(resumed.net, whole.net)


class Remembering:
    """A loader that says where it is, as Lightning asks for to resume in the middle of an epoch."""

    def __init__(self):
        self.batches, self.at = model_and_batches()[1], 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.at %= len(self.batches)
        while self.at < len(self.batches):
            self.at += 1
            yield self.batches[self.at - 1]

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resuming_in_the_middle_of_an_epoch_is_exact(accumulate, tmp_path):
    options = {"max_epochs": 2, "accumulate_grad_batches": accumulate}
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole = Lit()
    trainer(callback(), saver, **options).fit(whole, Remembering())
    resumed, balance = Lit(), callback()
    trainer(balance, **options).fit(resumed, Remembering(), ckpt_path=tmp_path / "step=2.ckpt")
    assert balance.stats()["modulated"] == 2 * STEPS // accumulate - 2
    assert same_bits(resumed.net, whole.net)


def test_a_checkpoint_written_after_the_fit_resumes_too(tmp_path):
    whole = Lit()
    fit(whole, callback(), max_epochs=2)
    run = fit(Lit(), callback())
    run.save_checkpoint(tmp_path / "end.ckpt")
    resumed = Lit()
    trainer(callback(), max_epochs=2).fit(resumed, loader(), ckpt_path=tmp_path / "end.ckpt")
    assert same_bits(resumed.net, whole.net)


def test_a_checkpoint_without_balancing_says_so(tmp_path):
    run = trainer()
    run.fit(Lit(), loader())
    run.save_checkpoint(tmp_path / "bare.ckpt")
    balance = callback()
    with pytest.warns(UserWarning, match="a bare optimizer's state"):
        trainer(balance, max_epochs=2).fit(Lit(), loader(), ckpt_path=tmp_path / "bare.ckpt")
    assert balance.stats()["modulated"] == STEPS


def test_a_checkpoint_with_balancing_goes_on_without(tmp_path):
    run = fit(Lit(), callback())
    run.save_checkpoint(tmp_path / "end.ckpt")
    lit = Lit()
    trainer(max_epochs=2).fit(lit, loader(), ckpt_path=tmp_path / "end.ckpt")
    assert unchanged(lit)


# -- OPM and re-learning beside it ---------------------------------------------------------------------------------


def plain_everything(epochs):
    model, given = model_and_batches()
    monitor = bo.ModalityMonitor(model, dict(model.encoders.items()), head="head")
    optimizer = bo.ModulatedOptimizer(momentum(model), monitor, method(), seed=SEED)
    modulator = bo.OPM(monitor, seed=SEED)
    scheduler = bo.ReLearnScheduler(
        optimizer, monitor, flat(3), flat(2, first=3), every=2, optimizer_state="keep", seed=SEED, epochs=99
    )
    for epoch in range(epochs):
        train(model, optimizer, given)
        if epoch < epochs - 1:
            scheduler.step()
    assert modulator.stats()["dropping"] > 0
    return model


def test_all_methods_together_equal_the_plain_loop():
    lit, balance = Lit(), everything()
    fit(lit, balance, max_epochs=4)
    assert balance.modulator.stats()["dropping"] > 0
    assert balance.scheduler.relearns == 1
    assert same_bits(lit.net, plain_everything(4))
    assert unchanged(lit)


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_all_methods_together_are_resumed(epochs, tmp_path):
    saver = ModelCheckpoint(tmp_path, "{epoch}", every_n_epochs=1, save_top_k=-1)
    trainer(everything(), saver, max_epochs=epochs).fit(Lit(), loader())
    path = tmp_path / f"epoch={epochs - 1}.ckpt"
    torch.load(path, weights_only=True)
    resumed = Lit()
    trainer(everything(), max_epochs=4).fit(resumed, loader(), ckpt_path=path)
    assert same_bits(resumed.net, plain_everything(4))


def test_a_checkpoint_without_their_state_says_so(tmp_path):
    run = fit(Lit(), callback())
    run.save_checkpoint(tmp_path / "end.ckpt")
    with pytest.warns(UserWarning, match="no state of `relearn`"), pytest.warns(match="of `prediction`"):
        trainer(everything(), max_epochs=2).fit(Lit(), loader(), ckpt_path=tmp_path / "end.ckpt")


def test_prediction_modulation_alone():
    balance = BalanceCallback(ENCODERS, "net.head", (), prediction=bo.OPM)
    fit(Lit(), balance)
    assert balance.handles == []
    assert balance.modulator.stats()["forwards"] == STEPS
