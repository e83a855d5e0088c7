"""How BalanceCallback is set up under the real Lightning Trainer, and taken off."""

from __future__ import annotations

import pytest

pytest.importorskip("lightning")


from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import balanceopt as bo
from balanceopt.integrations.lightning import BalanceCallback
from tests.frameworks.loops import (
    SEED,
    STEPS,
    bare,
    method,
    model_and_batches,
    momentum,
    plain,
    unchanged,
)
from tests.frameworks.under_lightning import (
    ENCODERS,
    MARKS,
    Lit,
    Manual,
    callback,
    fit,
    loader,
    trainer,
)
from tests.training import same_bits, small_model

pytestmark = MARKS


def test_nothing_is_left_after_the_fit():
    lit, balance = Lit(), callback()
    run = fit(lit, balance)
    assert unchanged(lit)
    assert bare(run.optimizers[0])


class Broken(Lit):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 2:
            raise ArithmeticError("the user's own")
        return loss


def test_nothing_is_left_after_an_exception():
    lit, balance = Broken(), callback()
    run = trainer(balance)
    with pytest.raises(ArithmeticError, match="the user's own"):
        run.fit(lit, loader())
    assert unchanged(lit)
    assert bare(run.optimizers[0])


def test_a_second_fit_starts_anew():
    balance = callback()
    fit(Lit(), balance)
    lit = Lit()
    fit(lit, balance)
    assert balance.stats()["modulated"] == STEPS
    assert same_bits(lit.net, plain(model_and_batches()[1]))


@pytest.mark.parametrize(
    ("encoders", "head"),
    [
        (lambda lit: dict(lit.net.encoders.items()), lambda lit: lit.net.head),
        (ENCODERS, "net"),  # the model itself: zero-out scores, which run its forward again
    ],
    ids=["functions", "zero-out"],
)
def test_encoders_and_head_are_found(encoders, head):
    balance = BalanceCallback(encoders, head, method(), seed=SEED)
    fit(Lit(), balance)
    assert balance.stats()["modulated"] == STEPS


def test_a_monitor_of_your_own_stays_yours():
    lit = Lit()
    with bo.ModalityMonitor(lit.net, dict(lit.net.encoders.items()), head=lit.net.head) as monitor:
        balance = BalanceCallback(monitor, modulation=method(), seed=SEED)
        fit(lit, balance)
        assert balance.stats()["modulated"] == STEPS
        assert not unchanged(lit)
    assert same_bits(lit.net, plain(model_and_batches()[1]))


def test_a_monitor_is_refused_beside_what_it_is_built_from():
    lit = Lit()
    monitor = bo.ModalityMonitor(lit.net, dict(lit.net.encoders.items()), head=lit.net.head)
    with pytest.raises(ValueError, match="to it, not to the callback"):
        BalanceCallback(monitor, "net.head")


def test_a_wrapped_optimizer_needs_no_callback():
    class Wrapping(Lit):
        def configure_optimizers(self):
            monitor = bo.ModalityMonitor(self.net, dict(self.net.encoders.items()), head=self.net.head)
            return bo.ModulatedOptimizer(momentum(self), monitor, method(), seed=SEED)

    lit = Wrapping()
    trainer().fit(lit, loader())
    assert same_bits(lit.net, plain(model_and_batches()[1]))
    with pytest.raises(ValueError, match="is modulated already"):
        fit(Wrapping(), callback())


def test_an_optimizer_that_is_replaced_is_followed():
    class Replacing(Lit):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.trainer.strategy.optimizers = [momentum(self)]

    lit, balance = Replacing(), callback()
    run = fit(lit, balance, max_epochs=2)
    assert balance.stats()["modulated"] == STEPS
    assert bare(run.optimizers[0])


def test_the_older_package_works_too():
    older: Any = pytest.importorskip("pytorch_lightning")

    base: Any = older.LightningModule

    class Older(base):
        training_step = Lit.training_step

        def __init__(self):
            super().__init__()
            self.net = small_model()

        def configure_optimizers(self):
            return momentum(self)

    lit, balance = Older(), callback()
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    older.Trainer(callbacks=[balance], accelerator="cpu", devices=1, max_epochs=1, **options).fit(
        lit, loader()
    )
    assert balance.stats()["modulated"] == STEPS
    assert same_bits(lit.net, plain(model_and_batches()[1]))


@pytest.mark.parametrize("kind", ["DataParallel", "deepspeed"])
def test_what_has_no_gradients_to_modulate_is_refused(kind):
    lit, balance = Lit(), callback()
    wrapped = {
        "DataParallel": nn.DataParallel(lit),
        "deepspeed": type("Engine", (nn.Module,), {"__module__": "deepspeed"})(),
    }
    strategy = SimpleNamespace(model=wrapped[kind], optimizers=[momentum(lit)])
    with pytest.raises(NotImplementedError, match=f"(?i){kind} is not supported"):
        balance.on_fit_start(SimpleNamespace(strategy=strategy), lit)
    assert unchanged(lit)


# -- labels --------------------------------------------------------------------------------------------------------


class Smooth(Lit):
    def __init__(self):
        super().__init__()
        self.criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.3)

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        return self.criterion(self.net(*inputs), labels)


@pytest.mark.parametrize(
    ("options", "source"),
    [({"loss": "criterion"}, "loss"), ({"labels": lambda batch: batch[1]}, "observe")],
    ids=["loss", "batch"],
)
def test_labels_come_from_where_you_say(options, source):
    balance = callback(**options)
    fit(Smooth(), balance, accumulate_grad_batches=2)
    assert balance.monitor.stats()["labels"] == {source: STEPS}


def test_labels_of_a_batch_go_to_its_own_pass_where_it_has_two_backwards():
    class Twice(Manual):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            loss = Lit.training_step(self, batch, batch_idx)
            self.manual_backward(loss, retain_graph=True)
            self.manual_backward(sum(p.square().sum() for p in self.parameters()) * 0)
            optimizer.step()

    lit, balance = Twice(), callback(labels=lambda batch: batch[1])
    fit(lit, balance)
    assert balance.monitor.stats()["labels"] == {"observe": STEPS}
    assert same_bits(lit.net, plain(model_and_batches()[1]))


# -- windows, records ----------------------------------------------------------------------------------------------


def test_windows_count_epochs_if_asked_to():
    balance = callback(method(start=1, end=1, unit="epoch"))
    fit(Lit(), balance, max_epochs=3)
    assert balance.stats() == {**balance.stats(), "modulated": STEPS, "outside_window": 2 * STEPS}


def test_a_recorder_hears_every_step():
    balance = callback()
    recorder = bo.Recorder(balance)
    fit(Lit(), balance, max_epochs=2)
    steps, _ = recorder.series("coefficient")["audio"]
    assert steps == list(range(2 * STEPS))
