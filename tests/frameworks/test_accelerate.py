"""The Accelerate recipe: prepare a ModulatedOptimizer as any other, or attach to the optimizer inside."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("accelerate")

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader

import balanceopt as bo
from tests.frameworks.loops import (
    ENCODERS,
    METHODS,
    SEED,
    STEPS,
    counters,
    flat,
    halving,
    method,
    model_and_batches,
    momentum,
    plain,
)
from tests.training import same_bits, small_model

# The framework's own warnings are not ours to mend; balanceopt's remain errors.
pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.filterwarnings("ignore:::accelerate", "ignore:::torch"),
]


def setup(form="wrapper", schedule=None, dropout=False, modulation=None, **options) -> Any:
    """What a user prepares: accelerator, model, optimizer, scheduler, and whoever counts the steps."""
    accelerator = Accelerator(cpu=True, **options)
    if accelerator.mixed_precision == "fp16":  # on CPU Accelerate trains in float32 then; here as on a GPU
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu")
    model, _ = model_and_batches(dropout=dropout)
    monitor = bo.ModalityMonitor(model, ENCODERS, head="head")
    optimizer: Any = momentum(model)
    counter: Any = None
    if form == "wrapper":
        modulation = modulation or method()
        optimizer = counter = bo.ModulatedOptimizer(optimizer, monitor, modulation, seed=SEED)
    elif form == "attach before":
        counter = bo.attach(optimizer, monitor, method(), seed=SEED)
    scheduler = schedule(optimizer) if schedule else None
    model, optimizer = accelerator.prepare(model, optimizer)
    if form == "attach after":
        counter = bo.attach(optimizer.optimizer, monitor, method(), seed=SEED)
    return accelerator, model, optimizer, accelerator.prepare(scheduler) if scheduler else None, counter


def train(parts, given, clip=None):
    """Accelerate's own loop; nothing in it knows of balanceopt."""
    accelerator, model, optimizer, scheduler, _ = parts
    for inputs, labels in given:
        with accelerator.accumulate(model):
            with accelerator.autocast():
                loss = F.cross_entropy(model(*inputs), labels)
            accelerator.backward(loss)
            if clip is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            optimizer.zero_grad()  # not at the start: there it would throw away the earlier micro-batches


@pytest.mark.parametrize("form", ["wrapper", "attach before", "attach after"])
@pytest.mark.parametrize(
    ("options", "steps", "same"),
    [
        ({}, STEPS, {}),
        ({"gradient_accumulation_steps": 2}, STEPS // 2, {"accumulate": 2}),
        ({}, STEPS, {"clip": 0.1}),
        ({}, STEPS, {"schedule": halving}),
        ({"mixed_precision": "bf16"}, STEPS, {"dtype": torch.bfloat16}),
        ({"mixed_precision": "fp16"}, STEPS, {"dtype": torch.float16, "clip": 0.1}),
    ],
    ids=["plain", "accumulate", "clip", "schedule", "bf16", "fp16"],
)
def test_the_loop_equals_the_plain_one(form, options, steps, same):
    parts = setup(form, same.get("schedule"), **options)
    model, counter = parts[1], parts[-1]
    train(parts, model_and_batches()[1], same.get("clip"))
    assert counter.stats() == {**counter.stats(), "modulated": steps, "without_scores": 0}
    assert same_bits(parts[0].unwrap_model(model), plain(model_and_batches()[1], **same))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_equals_the_plain_loop(name):
    parts = setup(modulation=METHODS[name]())
    train(parts, model_and_batches()[1])
    assert same_bits(parts[1], plain(model_and_batches()[1], modulation=METHODS[name]()))


@pytest.mark.parametrize("form", ["wrapper", "attach before", "attach after"])
def test_resuming_is_exact(form, tmp_path):
    given = model_and_batches(10)[1]
    whole = setup(form, halving, dropout=True)
    train(whole, given[:5])
    whole[0].save_state(tmp_path)
    train(whole, given[5:])

    AcceleratorState._reset_state(True)
    resumed = setup(form, halving, dropout=True)
    resumed[0].load_state(tmp_path)
    assert counters(resumed[2].state_dict())["balanceopt_step"] == 5
    train(resumed, given[5:])
    assert same_bits(resumed[1], whole[1])


def test_a_method_s_own_state_is_resumed(tmp_path):
    given = model_and_batches(10)[1]
    whole = setup(modulation=bo.AGM(2.0))
    train(whole, given[:5])
    whole[0].save_state(tmp_path)
    train(whole, given[5:])

    AcceleratorState._reset_state(True)
    resumed = setup(modulation=bo.AGM(2.0))
    resumed[0].load_state(tmp_path)
    train(resumed, given[5:])
    assert same_bits(resumed[1], whole[1])


def beside(parts):
    """OPM and re-learning on the same monitor, registered for checkpoints."""
    accelerator, _, optimizer, _, counter = parts
    modulator = bo.OPM(counter.monitor, seed=SEED)
    scheduler = bo.ReLearnScheduler(
        optimizer.optimizer, counter.monitor, flat(3), flat(2, first=3), every=1, seed=SEED, epochs=99
    )
    accelerator.register_for_checkpointing(modulator, scheduler)
    return scheduler


def test_all_methods_together_are_resumed(tmp_path):
    given = model_and_batches(10)[1]
    whole = setup()
    scheduler = beside(whole)
    train(whole, given[:5])
    assert scheduler.step() is not None
    whole[0].save_state(tmp_path)
    train(whole, given[5:])
    scheduler.step()

    AcceleratorState._reset_state(True)
    resumed = setup()
    scheduler = beside(resumed)
    resumed[0].load_state(tmp_path)
    train(resumed, given[5:])
    scheduler.step()
    assert same_bits(resumed[1], whole[1])


def test_a_prepared_loader_changes_nothing():
    given: Any = model_and_batches()[1]
    parts = setup()
    accelerator, model, counter = parts[0], parts[1], parts[-1]
    train(parts, accelerator.prepare(DataLoader(given, batch_size=None)))
    assert counter.stats()["modulated"] == STEPS
    assert same_bits(model, plain(model_and_batches()[1]))


def test_attaching_to_the_outer_optimizer_says_where_to():
    model = small_model()
    optimizer = Accelerator(cpu=True).prepare(momentum(model))
    monitor = bo.ModalityMonitor(model, ENCODERS, head="head")
    with pytest.raises(TypeError, match=r"attach to the optimizer inside it \(`.optimizer`\)"):
        bo.attach(optimizer, monitor, method())
