"""A model, a data set and a Trainer for the tests of the Transformers callback."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

import balanceopt as bo
from balanceopt.integrations.transformers import BalanceCallback
from tests.frameworks.loops import (
    ENCODERS,
    SEED,
    STEPS,
    as_samples,
    flat,
    method,
    model_and_batches,
)
from tests.models import HuggingFaceStyle
from tests.training import small_model

# The framework's own warnings are not ours to mend; balanceopt's remain errors.
MARKS = [
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


class InOrder(Trainer):
    """Takes the samples in their order; the option for that is not in every version."""

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)


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
    }
    return TrainingArguments(str(folder), **{**quiet, **options})


def callback(modulation=None, **options):
    # The default optimizer is AdamW; what it does to the coefficient is not what is tried here.
    return BalanceCallback(
        ENCODERS, "head", modulation or method(apply_to="update"), **{"seed": SEED, **options}
    )


def trainer(folder, model, *callbacks, count=STEPS, optimizers=(None, None), shuffle=False, **options):
    samples: Any = as_samples(model_and_batches(count)[1])
    return (Trainer if shuffle else InOrder)(
        model,
        arguments(folder, **options),
        train_dataset=samples,
        eval_dataset=samples,
        callbacks=list(callbacks),
        optimizers=optimizers,
    )


def default_optimizer(folder, **options):
    """What the Trainer itself makes for a model."""
    return lambda model: InOrder(model, arguments(folder, **options)).create_optimizer()


def linear(optimizer):
    """The Trainer's default schedule."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / STEPS))


def everything(**options):
    """OGM-GE, OPM and re-learning after every second epoch."""
    return callback(
        prediction=lambda monitor: bo.OPM(monitor, seed=SEED),
        relearn=lambda optimizer, monitor: bo.ReLearnScheduler(
            optimizer, monitor, flat(3), flat(2, first=3), every=2, seed=SEED, epochs=99
        ),
        **options,
    )
