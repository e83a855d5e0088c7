"""A fit with BalanceCallback under the real Lightning Trainer, against the loop written by hand."""

from __future__ import annotations

import pytest

pytest.importorskip("lightning")


import torch

from tests.frameworks.loops import (
    METHODS,
    SEED,
    STEPS,
    counters,
    halving,
    method,
    model_and_batches,
    momentum,
    plain,
)
from tests.frameworks.under_lightning import MARKS, Lit, Manual, callback, fit, fp16, loader, trainer
from tests.training import distance, same_bits

pytestmark = MARKS


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


@pytest.mark.parametrize("name", METHODS)
def test_every_method_equals_the_plain_loop(name):
    lit = Lit()
    fit(lit, callback(METHODS[name]()))
    assert same_bits(lit.net, plain(model_and_batches()[1], modulation=METHODS[name]()))


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


def test_a_scaled_update_leaves_the_scheduler_alone():
    lit, scaled = Lit(schedule=halving), method(apply_to="update")
    run = fit(lit, callback(scaled))
    assert run.optimizers[0].param_groups[0]["lr"] == 0.1 / 4
    assert same_bits(lit.net, plain(model_and_batches()[1], schedule=halving, modulation=scaled))


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
