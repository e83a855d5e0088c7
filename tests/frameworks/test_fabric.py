"""The Fabric recipe: set up a ModulatedOptimizer as any other, or attach before the set-up."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("lightning")

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from torch.utils.data import DataLoader

import balanceopt as bo
from tests.frameworks.loops import (
    ENCODERS,
    METHODS,
    SEED,
    STEPS,
    flat,
    halving,
    method,
    model_and_batches,
    momentum,
    plain,
)
from tests.training import same_bits

# The framework's own warnings are not ours to mend; balanceopt's remain errors.
pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.filterwarnings("ignore:::lightning", "ignore:.*LeafSpec:FutureWarning"),
]


def setup(form="wrapper", schedule=None, modulation=None, **options) -> Any:
    """What a user sets up: fabric, model, optimizer, scheduler, and whoever counts the steps."""
    fabric = Fabric(**{"accelerator": "cpu", "devices": 1, **options})
    fabric.launch()
    model, _ = model_and_batches()
    monitor = bo.ModalityMonitor(model, ENCODERS, head="head")
    optimizer: Any = momentum(model)
    counter: Any = None
    if form == "wrapper":
        modulation = modulation or method()
        optimizer = counter = bo.ModulatedOptimizer(optimizer, monitor, modulation, seed=SEED)
    elif form == "attach before":
        counter = bo.attach(optimizer, monitor, method(), seed=SEED)
    scheduler = schedule(optimizer) if schedule else None
    model, optimizer = fabric.setup(model, optimizer)
    if form == "attach after":
        counter = bo.attach(optimizer.optimizer, monitor, method(), seed=SEED)
    return fabric, model, optimizer, scheduler, counter


def train(parts, given, *, clip=None, accumulate=1):
    """Fabric's own loop; nothing in it knows of balanceopt."""
    fabric, model, optimizer, scheduler, _ = parts
    for number, (inputs, labels) in enumerate(given):
        if number % accumulate == 0:
            optimizer.zero_grad()
        last = (number + 1) % accumulate == 0
        with fabric.no_backward_sync(model, enabled=not last):
            fabric.backward(F.cross_entropy(model(*inputs), labels) / accumulate)
        if last:
            if clip is not None:
                fabric.clip_gradients(model, optimizer, max_norm=clip)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()


@pytest.mark.parametrize("form", ["wrapper", "attach before", "attach after"])
@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({}, {}),
        ({}, {"accumulate": 2}),
        ({}, {"clip": 0.1}),
        ({}, {"schedule": halving}),
        ({"precision": "bf16-mixed"}, {"dtype": torch.bfloat16}),
        ({"plugins": MixedPrecision("16-mixed", "cpu")}, {"dtype": torch.float16, "clip": 0.1}),
    ],
    ids=["plain", "accumulate", "clip", "schedule", "bf16", "fp16"],
)
def test_the_loop_equals_the_plain_one(form, options, same):
    parts = setup(form, same.get("schedule"), **options)
    model, counter = parts[1], parts[-1]
    loop = {name: same[name] for name in ("clip", "accumulate") if name in same}
    train(parts, model_and_batches()[1], **loop)
    steps = STEPS // same.get("accumulate", 1)
    assert counter.stats() == {**counter.stats(), "modulated": steps, "without_scores": 0}
    assert same_bits(model.module, plain(model_and_batches()[1], **same))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_equals_the_plain_loop(name):
    parts = setup(modulation=METHODS[name]())
    train(parts, model_and_batches()[1])
    assert same_bits(parts[1].module, plain(model_and_batches()[1], modulation=METHODS[name]()))


@pytest.mark.parametrize("form", ["wrapper", "attach before", "attach after"])
def test_resuming_is_exact(form, tmp_path):
    given = model_and_batches(10)[1]
    whole = setup(form, halving)
    train(whole, given[:5])
    names = ("model", "optimizer", "scheduler")
    whole[0].save(tmp_path / "state.ckpt", dict(zip(names, whole[1:4], strict=True)))
    train(whole, given[5:])

    resumed = setup(form, halving)
    resumed[0].load(tmp_path / "state.ckpt", dict(zip(names, resumed[1:4], strict=True)))
    assert resumed[2].param_groups[0]["balanceopt_step"] == 5
    train(resumed, given[5:])
    assert same_bits(resumed[1].module, whole[1].module)


def beside(parts):
    """OPM and re-learning on the same monitor: what to save with the rest."""
    _, model, optimizer, _, counter = parts
    modulator = bo.OPM(counter.monitor, seed=SEED)
    scheduler = bo.ReLearnScheduler(
        optimizer.optimizer, counter.monitor, flat(3), flat(2, first=3), every=1, seed=SEED, epochs=99
    )
    return {"model": model, "optimizer": optimizer, "prediction": modulator, "relearn": scheduler}


def test_all_methods_together_are_resumed(tmp_path):
    given = model_and_batches(10)[1]
    whole = setup()
    state = beside(whole)
    train(whole, given[:5])
    assert state["relearn"].step() is not None
    whole[0].save(tmp_path / "state.ckpt", state)
    train(whole, given[5:])
    state["relearn"].step()

    resumed = setup()
    state = beside(resumed)
    resumed[0].load(tmp_path / "state.ckpt", state)
    train(resumed, given[5:])
    state["relearn"].step()
    assert same_bits(resumed[1].module, whole[1].module)


def test_a_loader_that_was_set_up_changes_nothing():
    given: Any = model_and_batches()[1]
    parts = setup()
    fabric, model, counter = parts[0], parts[1], parts[-1]
    train(parts, fabric.setup_dataloaders(DataLoader(given, batch_size=None)))
    assert counter.stats()["modulated"] == STEPS
    assert same_bits(model.module, plain(model_and_batches()[1]))
