"""BalanceCallback under the real Lightning Trainer."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("lightning")

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader

import balanceopt as bo
from balanceopt.integrations.lightning import BalanceCallback
from tests.frameworks.loops import (
    SEED,
    STEPS,
    bare,
    counters,
    flat,
    halving,
    method,
    model_and_batches,
    momentum,
    plain,
    unchanged,
)
from tests.training import distance, same_bits, small_model, train

# The framework's own warnings are not ours to mend; balanceopt's remain errors.
pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.filterwarnings("ignore:::lightning", "ignore:.*LeafSpec:FutureWarning"),
]

ENCODERS = {"audio": "net.encoders.audio", "visual": "net.encoders.visual"}


class Lit(LightningModule):
    """A user's module: nothing in it knows of balanceopt."""

    def __init__(self, make=momentum, schedule=None):
        super().__init__()
        self.net = small_model()
        self.make, self.schedule = make, schedule

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        return F.cross_entropy(self.net(*inputs), labels)

    def configure_optimizers(self):
        optimizer = self.make(self)
        if self.schedule is None:
            return optimizer
        scheduler = {"scheduler": self.schedule(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def trainer(*callbacks, **options):
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(callbacks=list(callbacks), **{"max_epochs": 1, **quiet, **options})


def callback(modulation=None, **options):
    return BalanceCallback(ENCODERS, "net.head", modulation or method(), **{"seed": SEED, **options})


def loader(count=STEPS):
    given: Any = model_and_batches(count)[1]
    return DataLoader(given, batch_size=None)


def fit(lit, balance, *, count=STEPS, **options):
    run = trainer(balance, **options)
    run.fit(lit, loader(count))
    return run


def fp16(scale=2.0**16):
    """On CPU Lightning takes bfloat16 for "16-mixed", unless it is given the plugin."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))


@pytest.mark.parametrize(
    ("options", "steps", "same"),
    [
        ({}, STEPS, {}),
        ({"accumulate_grad_batches": 2}, STEPS // 2, {"accumulate": 2}),
        ({"gradient_clip_val": 0.1}, STEPS, {"clip": 0.1}),
        ({"precision": "bf16-mixed"}, STEPS, {"dtype": torch.bfloat16}),
        ({"plugins": fp16()}, STEPS, {"dtype": torch.float16}),
        (
            {"plugins": fp16(), "gradient_clip_val": 0.1, "accumulate_grad_batches": 2},
            STEPS // 2,
            {"dtype": torch.float16, "clip": 0.1, "accumulate": 2},
        ),
    ],
    ids=["plain", "accumulate", "clip", "bf16", "fp16", "fp16-clip-accumulate"],
)
def test_a_fit_equals_the_plain_loop(options, steps, same):
    lit, balance = Lit(), callback()
    fit(lit, balance, **options)
    assert balance.stats() == {**balance.stats(), "modulated": steps, "without_scores": 0}
    assert same_bits(lit.net, plain(model_and_batches()[1], **same))


def test_a_step_that_the_scaler_skips_is_none():
    lit, balance = Lit(), callback()
    run = fit(lit, balance, plugins=fp16(2.0**18))
    skipped = STEPS - balance.stats()["modulated"]
    assert 0 < skipped < STEPS
    assert counters(run.optimizers[0].state_dict())["balanceopt_step"] == STEPS - skipped
    assert same_bits(lit.net, plain(model_and_batches()[1], dtype=torch.float16, scale=2.0**18))


def test_a_scheduler_acts_as_in_the_plain_loop():
    lit = Lit(schedule=halving)
    fit(lit, callback())
    assert same_bits(lit.net, plain(model_and_batches()[1], schedule=halving))


def test_the_learning_rate_form_leaves_the_scheduler_alone():
    lit, lr = Lit(schedule=halving), method(apply_to="lr")
    run = fit(lit, callback(lr))
    assert run.optimizers[0].param_groups[0]["lr"] == 0.1 / 4
    assert same_bits(lit.net, plain(model_and_batches()[1], schedule=halving, modulation=lr))


class Manual(Lit):
    def __init__(self, **options):
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def test_manual_optimization_equals_the_plain_loop():
    lit, balance = Manual(), callback()
    fit(lit, balance)
    assert balance.stats()["modulated"] == STEPS
    assert same_bits(lit.net, plain(model_and_batches()[1]))


class OneEach(Manual):
    """An optimizer for each encoder and one for the head."""

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(Lit.training_step(self, batch, batch_idx))
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self):
        encoders = self.net.encoders
        return [momentum(part) for part in (encoders["audio"], self.net.head, encoders["visual"])]


def test_several_optimizers_equal_one():
    lit, balance = OneEach(), callback(method(noise=False))
    fit(lit, balance)
    assert balance.stats()["modulated"] == 2 * STEPS
    assert same_bits(lit.net, plain(model_and_batches()[1], modulation=method(noise=False)))


def test_several_optimizers_draw_different_noise():
    lit, balance = OneEach(), callback()
    run = fit(lit, balance)
    seeds = [counters(optimizer.state_dict()).get("balanceopt_seed") for optimizer in run.optimizers]
    assert seeds == [SEED, None, SEED + 1]


class Validated(Lit):
    def validation_step(self, batch, batch_idx):
        self.training_step(batch, batch_idx)


def test_validation_in_between_changes_nothing():
    lit, balance = Validated(), callback()
    trainer(balance, val_check_interval=2).fit(lit, loader(), loader(2))
    assert balance.stats()["without_scores"] == 0
    assert same_bits(lit.net, plain(model_and_batches()[1]))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of dynamo itself, where warnings are errors
def test_a_compiled_module_is_balanced():
    lit, balance = Lit(), callback()
    fit(torch.compile(lit, backend="eager"), balance)
    assert balance.stats()["modulated"] == STEPS
    assert distance(lit.net, plain(model_and_batches()[1])) < 1e-6


# -- checkpoints ---------------------------------------------------------------------------------------------------


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
        "balanceopt_epoch": None,
    }

    resumed, balance = Lit(schedule=halving), callback(seed=SEED + 1)  # the checkpoint's seed holds
    trainer(balance, max_epochs=3).fit(resumed, loader(), ckpt_path=path)
    assert balance.stats()["modulated"] == 2 * STEPS
    assert same_bits(resumed.net, whole.net)


def test_a_checkpoint_written_after_the_fit_resumes_too(tmp_path):
    whole = Lit()
    fit(whole, callback(), max_epochs=2)
    run = fit(Lit(), callback())
    run.save_checkpoint(tmp_path / "end.ckpt")
    resumed = Lit()
    trainer(callback(), max_epochs=2).fit(resumed, loader(), ckpt_path=tmp_path / "end.ckpt")
    assert same_bits(resumed.net, whole.net)


def test_scores_that_hold_for_several_steps_are_resumed(tmp_path):
    options = {"scores": "zero-out", "every": 4}
    whole = Lit()
    fit(whole, callback(**options), max_epochs=2)
    run = fit(Lit(), callback(**options))
    run.save_checkpoint(tmp_path / "end.ckpt")
    resumed = Lit()
    trainer(callback(**options), max_epochs=2).fit(resumed, loader(), ckpt_path=tmp_path / "end.ckpt")
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


# -- how it is set up and taken off --------------------------------------------------------------------------------


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


# -- labels --------------------------------------------------------------------------------------------------------


class Smooth(Lit):
    def __init__(self):
        super().__init__()
        self.criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.3)

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        return self.criterion(self.net(*inputs), labels)


@pytest.mark.parametrize(
    ("labels", "source"), [("criterion", "loss"), (lambda batch: batch[1], "observe")], ids=["loss", "batch"]
)
def test_labels_come_from_where_you_say(labels, source):
    balance = callback(labels=labels)
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


# -- OPM and re-learning beside it ---------------------------------------------------------------------------------


def everything(**options):
    """OGM-GE, OPM and re-learning after every second epoch."""
    return callback(
        prediction=lambda monitor: bo.PredictionModulator(monitor, seed=SEED),
        relearn=lambda optimizer, monitor: bo.ReLearnScheduler(
            optimizer, monitor, flat(3), flat(2, first=3), every=2, seed=SEED
        ),
        **options,
    )


def plain_everything(epochs):
    model, given = model_and_batches()
    monitor = bo.ModalityMonitor(model, dict(model.encoders.items()), head="head")
    optimizer = bo.ModulatedOptimizer(momentum(model), monitor, method(), seed=SEED)
    bo.PredictionModulator(monitor, seed=SEED)
    scheduler = bo.ReLearnScheduler(
        optimizer, monitor, flat(3), flat(2, first=3), every=2, optimizer_state="keep", seed=SEED
    )
    for epoch in range(epochs):
        train(model, optimizer, given)
        if epoch < epochs - 1:
            scheduler.step()
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
    balance = BalanceCallback(ENCODERS, "net.head", (), prediction=bo.PredictionModulator)
    fit(Lit(), balance)
    assert balance.handles == []
    assert balance.modulator.stats()["forwards"] == STEPS


# -- windows, records ----------------------------------------------------------------------------------------------


def test_windows_count_epochs_if_asked_to():
    balance = callback(method(start=1, end=1), count_epochs=True)
    fit(Lit(), balance, max_epochs=3)
    assert balance.stats() == {**balance.stats(), "modulated": STEPS, "outside_window": 2 * STEPS}


def test_a_recorder_hears_every_step():
    balance = callback()
    recorder = bo.Recorder(balance)
    fit(Lit(), balance, max_epochs=2)
    steps, _ = recorder.series("coefficient")["audio"]
    assert steps == list(range(2 * STEPS))
