"""A LightningModule and a Trainer for the tests of the Lightning callback."""

from __future__ import annotations

from typing import Any

import pytest
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
    flat,
    method,
    model_and_batches,
    momentum,
)
from tests.training import small_model

# The framework's own warnings are not ours to mend; balanceopt's remain errors.
MARKS = [
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


class Direct(LightningModule):
    """The same with everything right on it, and a forward of its own."""

    def __init__(self):
        super().__init__()
        net = small_model()
        self.encoders, self.head = net.encoders, net.head

    def forward(self, audio, visual):
        features = [self.encoders["audio"](audio), self.encoders["visual"](visual)]
        return self.head(torch.cat(features, -1))

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        return F.cross_entropy(self(*inputs), labels)

    def configure_optimizers(self):
        return momentum(self)


class Manual(Lit):
    def __init__(self, **options):
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


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


def callback(modulation=None, *, direct=False, **options):
    encoders = {name: path.removeprefix("net.") for name, path in ENCODERS.items()} if direct else ENCODERS
    head = "head" if direct else "net.head"
    return BalanceCallback(encoders, head, modulation or method(), **{"seed": SEED, **options})


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


def everything(**options):
    """OGM-GE, OPM and re-learning after every second epoch."""
    return callback(
        prediction=lambda monitor: bo.OPM(monitor, seed=SEED),
        relearn=lambda optimizer, monitor: bo.ReLearnScheduler(
            optimizer, monitor, flat(3), flat(2, first=3), every=2, seed=SEED, epochs=99
        ),
        **options,
    )
