"""How BalanceCallback is set up under the real Transformers Trainer, and taken off."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")


from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, BertModel, PreTrainedModel, ViTConfig, ViTModel
from transformers.modeling_outputs import SequenceClassifierOutput

import balanceopt as bo
from balanceopt.integrations.transformers import BalanceCallback, _base_of
from tests.frameworks.loops import (
    SEED,
    STEPS,
    bare,
    counters,
    method,
    unchanged,
)
from tests.frameworks.under_transformers import MARKS, InOrder, Net, arguments, callback, trainer

pytestmark = MARKS

SMALL = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


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
        lambda model: dict(model.encoders.items()),
        lambda model: model.head,
        method(apply_to="update"),
        seed=SEED,
    )
    trainer(tmp_path, Net(), balance).train()
    assert balance.stats()["modulated"] == STEPS


class TextAndPicture(PreTrainedModel):
    """A pre-trained model's own class, with encoders of Transformers; their outputs have a `pooler_output`."""

    config_class = BertConfig

    def __init__(self, config):
        super().__init__(config)
        self.text = BertModel(config)
        self.picture = ViTModel(
            ViTConfig(
                image_size=8, patch_size=4, num_channels=1, **{name: getattr(config, name) for name in SMALL}
            )
        )
        self.classifier = nn.Linear(2 * config.hidden_size, 3)
        self.post_init()

    def forward(self, input_ids, pixel_values, labels=None):
        parts = (self.text(input_ids).pooler_output, self.picture(pixel_values).pooler_output)
        logits = self.classifier(torch.cat(parts, -1))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def test_a_pretrained_model_is_balanced(tmp_path):
    samples = [
        {"input_ids": torch.tensor([1, i % 3 + 2]), "pixel_values": torch.randn(1, 8, 8), "labels": i % 3}
        for i in range(8)
    ]
    model = TextAndPicture(BertConfig(vocab_size=9, **SMALL))
    balance = BalanceCallback({"text": "text", "picture": "picture"}, "classifier", method(apply_to="update"))
    args = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    InOrder(model, args, train_dataset=samples, callbacks=[balance]).train()
    assert balance.monitor.stats() == {**balance.monitor.stats(), "scores": "split", "labels": {"model": 2}}
    assert balance.stats()["modulated"] == 2
    assert (tmp_path / "checkpoint-2" / "optimizer.pt").is_file()


def test_there_is_no_monitor_before_training():
    with pytest.raises(RuntimeError, match="built when training starts"):
        callback().monitor.stats()


def test_labels_that_the_trainer_keeps_to_itself_come_from_the_gradient(tmp_path):
    balance = callback()
    run = trainer(tmp_path, Net(), balance)
    run.compute_loss_func = lambda outputs, labels, **_: F.cross_entropy(outputs["logits"], labels)
    run.train()
    assert balance.monitor.stats()["labels"] == {"gradient": STEPS}


def test_windows_count_epochs_if_asked_to(tmp_path):
    balance = callback(method(start=1, end=1, unit="epoch", apply_to="update"))
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
    args, state = SimpleNamespace(n_gpu=gpus, label_smoothing_factor=0.0), SimpleNamespace(global_step=0)
    with pytest.raises(NotImplementedError, match=message):
        callback().on_train_begin(args, state, None, model=Net(), optimizer=optimizer)
