"""Training with BalanceCallback under the real Transformers Trainer, against the loop written by hand."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")


import os

import torch

import balanceopt as bo
from tests.frameworks import under_transformers
from tests.frameworks.loops import (
    ENCODERS,
    METHODS,
    SEED,
    STEPS,
    method,
    model_and_batches,
    momentum,
    plain,
)
from tests.frameworks.under_transformers import (
    MARKS,
    Net,
    callback,
    default_optimizer,
    linear,
    trainer,
)
from tests.training import distance, same_bits

pytestmark = MARKS


@pytest.fixture(autouse=True)
def _environment_kept():
    """TrainingArguments(torch_compile=True) tells Accelerate by the environment."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize(
    ("options", "steps", "same"),
    [
        ({}, STEPS, {"schedule": linear}),
        ({"lr_scheduler_type": "constant"}, STEPS, {}),
        (
            {"lr_scheduler_type": "constant", "gradient_accumulation_steps": 2, "max_steps": STEPS // 2},
            STEPS // 2,
            {"accumulate": 2},
        ),
        ({"lr_scheduler_type": "constant", "bf16": True}, STEPS, {"dtype": torch.bfloat16}),
    ],
    ids=["default", "constant", "accumulate", "bf16"],
)
def test_training_equals_the_plain_loop(options, steps, same, tmp_path):
    model, balance = Net(), callback()
    trainer(tmp_path, model, balance, **options).train()
    assert balance.stats() == {**balance.stats(), "modulated": steps, "without_scores": 0}
    assert balance.monitor.stats()["labels"] == {"model": STEPS}
    same = {"modulation": balance.modulation, "make": default_optimizer(tmp_path), "clip": 1.0, **same}
    assert same_bits(model, plain(model_and_batches()[1], **same))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_equals_the_plain_loop(name, tmp_path):
    model = Net()
    trainer(tmp_path, model, callback(METHODS[name]())).train()
    make = default_optimizer(tmp_path)
    assert same_bits(
        model,
        plain(model_and_batches()[1], modulation=METHODS[name](), make=make, clip=1.0, schedule=linear),
    )


class Scaled(under_transformers.InOrder):
    """With a GradScaler, as on a GPU: for fp16 on CPU the Trainer trains in float32."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.native_amp = True
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18)


def test_a_step_that_the_scaler_skips_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(under_transformers, "InOrder", Scaled)
    options = {"fp16": True, "optim": "adamw_torch", "lr_scheduler_type": "constant"}
    model, balance = Net(), callback()
    trainer(tmp_path, model, balance, **options).train()
    assert 0 < balance.stats()["modulated"] < STEPS
    assert same_bits(
        model,
        plain(
            model_and_batches()[1],
            modulation=balance.modulation,
            make=default_optimizer(tmp_path, optim="adamw_torch"),
            clip=1.0,
            dtype=torch.float16,
            scale=2.0**18,
        ),
    )


def test_the_default_optimizer_is_the_one_tried(tmp_path):
    optimizer = default_optimizer(tmp_path)(Net())
    assert isinstance(optimizer, torch.optim.AdamW)
    assert len(optimizer.param_groups) == 2  # with and without decay, across the modalities
    assert bool(optimizer.param_groups[0]["fused"]) == (
        "fused" in under_transformers.arguments(tmp_path).optim
    )


def test_an_optimizer_of_your_own_equals_the_plain_loop(tmp_path):
    model, balance = Net(), callback(method())
    trainer(tmp_path, model, balance, optimizers=(momentum(model), None), max_grad_norm=0).train()
    assert balance.stats()["modulated"] == STEPS
    assert same_bits(model, plain(model_and_batches()[1], schedule=linear))


def test_a_wrapped_optimizer_needs_no_callback(tmp_path):
    model = Net()
    monitor = bo.ModalityMonitor(model, ENCODERS, head="head")
    optimizer = bo.ModulatedOptimizer(momentum(model), monitor, method(), seed=SEED)
    trainer(tmp_path, model, optimizers=(optimizer, None), max_grad_norm=0).train()
    assert same_bits(model, plain(model_and_batches()[1], schedule=linear))
    with pytest.raises(ValueError, match="is modulated already"):
        trainer(tmp_path, model, callback(), optimizers=(optimizer, None)).train()


def test_evaluation_in_between_changes_nothing(tmp_path):
    results = []
    for options in ({}, {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}):
        model, balance = Net(), callback()
        trainer(tmp_path, model, balance, **options).train()
        assert balance.stats()["modulated"] == STEPS
        results.append(model)
    assert same_bits(*results)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of dynamo itself, where warnings are errors
def test_a_compiled_model_is_balanced(tmp_path):
    results = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        model, balance = Net(), callback()
        trainer(tmp_path, model, balance, **options).train()
        assert balance.stats()["modulated"] == STEPS
        results.append(model)
    assert distance(*results) < 1e-6
