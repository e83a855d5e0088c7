"""BalanceCallback under the real Transformers Trainer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import torch
import torch.nn.functional as F
from transformers import Trainer, TrainingArguments

import balanceopt as bo
from balanceopt.integrations.transformers import BalanceCallback, _base_of
from tests.frameworks.loops import (
    ENCODERS,
    SEED,
    STEPS,
    as_samples,
    bare,
    counters,
    flat,
    method,
    model_and_batches,
    momentum,
    plain,
    unchanged,
)
from tests.models import HuggingFaceStyle, with_dropout
from tests.training import distance, same_bits, small_model

# The framework's own warnings are not ours to mend; balanceopt's remain errors.
pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.filterwarnings("ignore:::transformers", "ignore:::accelerate", "ignore:::torch"),
]


class Net(HuggingFaceStyle):
    """The same weights as `small_model()`; returns a loss where it is given labels, as Hugging Face's models do."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.load_state_dict(small_model(**options).state_dict())

    def forward(self, audio, visual, labels=None):  # type: ignore[override]
        logits = self.fuse([self.encoders["audio"](audio), self.encoders["visual"](visual)])
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits} if loss is not None else {"logits": logits}


def arguments(folder, **options):
    quiet: dict[str, Any] = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "per_device_train_batch_size": 8,
        "max_steps": STEPS,
        "learning_rate": 0.01,
        "train_sampling_strategy": "sequential",
    }
    return TrainingArguments(str(folder), **{**quiet, **options})


def callback(modulation=None, **options):
    # The default optimizer is AdamW; what it does to the coefficient is not what is tried here.
    return BalanceCallback(ENCODERS, "head", modulation or method(apply_to="lr"), **{"seed": SEED, **options})


def trainer(folder, model, *callbacks, count=STEPS, optimizers=(None, None), **options):
    samples: Any = as_samples(model_and_batches(count)[1])
    return Trainer(
        model,
        arguments(folder, **options),
        train_dataset=samples,
        eval_dataset=samples,
        callbacks=list(callbacks),
        optimizers=optimizers,
    )


def default_optimizer(folder, **options):
    """What the Trainer itself makes for a model."""
    return lambda model: Trainer(model, arguments(folder, **options)).create_optimizer()


def linear(optimizer):
    """The Trainer's default schedule."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / STEPS))


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


class Scaled(Trainer):
    """With a GradScaler, as on a GPU: for fp16 on CPU the Trainer trains in float32."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.native_amp = True
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18)


def test_a_step_that_the_scaler_skips_is_none(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "Trainer", Scaled)
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
    assert optimizer.param_groups[0]["fused"]


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


# -- checkpoints ---------------------------------------------------------------------------------------------------

# Shuffled, with dropout, and saved in the middle of an epoch: what the Trainer resumes itself.
LONG: dict[str, Any] = {
    "count": 4,
    "max_steps": 10,
    "save_strategy": "steps",
    "save_steps": 5,
    "train_sampling_strategy": "random",
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
    assert counters(saved) == {"balanceopt_step": 5, "balanceopt_seed": SEED, "balanceopt_epoch": None}


def test_resuming_is_exact_with_accumulation(tmp_path):
    whole, resumed, balance = resume(tmp_path, callback, gradient_accumulation_steps=2)
    assert balance.stats()["modulated"] == 5
    assert same_bits(resumed, whole)


def test_scores_that_hold_for_several_steps_are_resumed(tmp_path):
    whole, resumed, _ = resume(tmp_path, lambda **options: callback(scores="zero-out", every=4, **options))
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


def everything(**options):
    """OGM-GE, OPM and re-learning after every second epoch."""
    return callback(
        prediction=lambda monitor: bo.PredictionModulator(monitor, seed=SEED),
        relearn=lambda optimizer, monitor: bo.ReLearnScheduler(
            optimizer, monitor, flat(3), flat(2, first=3), every=2, seed=SEED
        ),
        **options,
    )


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


# -- how it is set up and taken off --------------------------------------------------------------------------------


def test_nothing_is_left_after_training(tmp_path):
    model = Net()
    run = trainer(tmp_path, model, callback())
    run.train()
    assert unchanged(model)
    assert bare(_base_of(run.optimizer))


class Broken(Net):
    def forward(self, audio, visual, labels=None):  # type: ignore[override]
        output = super().forward(audio, visual, labels)
        self.passes = getattr(self, "passes", 0) + 1
        if self.passes == 3:
            raise ArithmeticError("the user's own")
        return output


def test_after_an_exception_remove_or_train_again(tmp_path):
    model, balance = Broken(), callback()
    run = trainer(tmp_path, model, balance)
    with pytest.raises(ArithmeticError, match="the user's own"):
        run.train()
    assert not unchanged(model)
    balance.remove()
    assert unchanged(model)
    assert bare(_base_of(run.optimizer))
    run.train()
    assert balance.stats()["modulated"] == STEPS
    assert counters(run.optimizer.state_dict())["balanceopt_step"] == 2 + STEPS


def test_encoders_and_head_may_be_functions_of_the_model(tmp_path):
    balance = BalanceCallback(
        lambda model: dict(model.encoders.items()), lambda model: model.head, method(apply_to="lr"), seed=SEED
    )
    trainer(tmp_path, Net(), balance).train()
    assert balance.stats()["modulated"] == STEPS


def test_labels_that_the_trainer_keeps_to_itself_come_from_the_gradient(tmp_path):
    balance = callback()
    run = trainer(tmp_path, Net(), balance)
    run.compute_loss_func = lambda outputs, labels, **_: F.cross_entropy(outputs["logits"], labels)
    run.train()
    assert balance.monitor.stats()["labels"] == {"gradient": STEPS}


def test_windows_count_epochs_if_asked_to(tmp_path):
    balance = callback(method(start=1, end=1, apply_to="lr"), count_epochs=True)
    trainer(tmp_path, Net(), balance, max_steps=3 * STEPS).train()
    assert balance.stats() == {**balance.stats(), "modulated": STEPS, "outside_window": 2 * STEPS}


def test_a_recorder_hears_every_step(tmp_path):
    balance = callback()
    recorder = bo.Recorder(balance)
    trainer(tmp_path, Net(), balance).train()
    assert recorder.series("coefficient")["audio"][0] == list(range(STEPS))


class DeepSpeedOptimizerWrapper:
    """Of the name that it has in accelerate."""


class AdaLomo:
    """Of the name that it has in lomo_optim."""


@pytest.mark.parametrize(
    ("gpus", "optimizer", "message"),
    [
        (1, DeepSpeedOptimizerWrapper(), "DeepSpeed is not supported"),
        (1, AdaLomo(), "AdaLomo steps inside backward"),
        (2, None, "DataParallel is not supported"),
    ],
)
def test_what_has_no_gradients_to_modulate_is_refused(gpus, optimizer, message):
    args, state = SimpleNamespace(n_gpu=gpus), SimpleNamespace(global_step=0)
    with pytest.raises(NotImplementedError, match=message):
        callback().on_train_begin(args, state, None, model=Net(), optimizer=optimizer)
