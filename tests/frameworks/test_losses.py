"""Losses that models of Transformers compute inside, under each framework, against a plain loop or one over samples."""

from __future__ import annotations

import copy
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("lightning")

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from lightning.pytorch import LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

import balanceopt as bo
from balanceopt.integrations import lightning as under_lightning
from balanceopt.integrations import transformers as under_transformers
from benchmarks.loss_models import Case, llava, llava_encoders
from benchmarks.loss_pairs import naive_scores
from tests.frameworks.under_transformers import InOrder, arguments

pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.filterwarnings(
        "ignore:::transformers", "ignore:::accelerate", "ignore:::torch", "ignore:::lightning"
    ),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]

WORDS, BATCH, STEPS = 40, 4, 3


# -- tokens --------------------------------------------------------------------------------------------------------


def dialogues(count: int) -> list[dict[str, Tensor]]:
    """Samples of a picture, a prompt and an answer of another length each, padded; labels are -100 elsewhere."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for i in range(count):
        ids = torch.cat([torch.full((4,), WORDS - 1), torch.randint(5, 20, (8,), generator=generator)])
        mask = (torch.arange(12) < 9 + i % 4).long()
        labels = torch.where(mask.bool() & (torch.arange(12) >= 7), ids, -100)
        pixels = torch.randn(3, 16, 16, generator=generator)
        samples.append({"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "labels": labels})
    return samples


def stacked(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def by_hand(
    model: Any, samples: list[dict[str, Tensor]], smoothing: float, accumulate: int, bf16: bool
) -> Any:
    """Train in a plain loop that tells the monitor the label of each row of the logits; return the record.

    The loop shifts the labels itself, except with label smoothing, for which the Trainer shifts those of no
    vision-language model.
    """
    loss = nn.CrossEntropyLoss(label_smoothing=smoothing) if smoothing else None
    monitor = bo.ModalityMonitor(model, llava_encoders(model), model.get_output_embeddings(), loss=loss)
    base = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.0)
    optimizer = bo.ModulatedOptimizer(base, monitor, bo.OGM(0.5, noise=False))
    recorder = bo.Recorder(optimizer)
    batches = [stacked(samples[i : i + BATCH]) for i in range(0, len(samples), BATCH)]
    for step in range(STEPS):
        micro = batches[step * accumulate : (step + 1) * accumulate]
        number = sum(int((batch["labels"] != -100).sum()) for batch in micro)
        optimizer.zero_grad()
        for batch in micro:
            labels = batch.pop("labels")
            if not smoothing:
                labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)
            monitor.observe(labels)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = model(**batch).logits.flatten(0, 1).float()
            total = F.cross_entropy(logits, labels.flatten(), label_smoothing=smoothing, reduction="sum")
            (total / number).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return recorder


@pytest.mark.parametrize(
    ("smoothing", "accumulate", "bf16"),
    [(0.0, 1, False), (0.0, 2, False), (0.0, 1, True), (0.1, 1, False)],
    ids=["plain", "accumulate", "bf16", "smoothing"],
)
def test_a_language_model_under_the_trainer_equals_a_loop_that_tells_the_labels(
    smoothing, accumulate, bf16, tmp_path
):
    torch.manual_seed(0)
    model = llava(WORDS)
    samples = dialogues(BATCH * STEPS * accumulate)
    plain = by_hand(copy.deepcopy(model), samples, smoothing, accumulate, bf16)
    balance = under_transformers.BalanceCallback(
        llava_encoders, lambda model: model.get_output_embeddings(), bo.OGM(0.5, noise=False)
    )
    recorder = bo.Recorder(balance)
    args = arguments(
        tmp_path,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=accumulate,
        label_smoothing_factor=smoothing,
        lr_scheduler_type="constant",
        bf16=bf16,
    )
    InOrder(model, args, train_dataset=samples, callbacks=[balance]).train()
    source = "gradient" if smoothing else "model"
    assert balance.monitor.stats()["labels"] == {source: STEPS * accumulate}
    assert balance.stats() == {**balance.stats(), "modulated": STEPS, "without_scores": 0}
    for quantity in ("score", "coefficient"):
        ours, theirs = recorder.series(quantity), plain.series(quantity)
        assert ours.keys() == theirs.keys() == {"image", "text"}
        for name in ours:
            assert ours[name][1] == pytest.approx(theirs[name][1], rel=2e-2 if bf16 else 1e-3)


# -- numbers and several labels, whose loss module the user never sees ---------------------------------------------


class Opinions(PreTrainedModel):
    """A model whose loss is chosen by `config.problem_type`, as Transformers' classifiers choose it."""

    config_class = PretrainedConfig

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.text, self.audio = nn.Linear(5, 8), nn.Linear(6, 8)
        self.classifier = nn.Linear(16, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass

    def forward(self, text: Tensor, audio: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        logits = self.classifier(torch.cat([self.text(text), self.audio(audio)], 1))
        loss = None
        if labels is not None and self.config.problem_type == "regression":
            loss = nn.MSELoss()(logits.squeeze(), labels.squeeze())
        elif labels is not None:
            loss = nn.BCEWithLogitsLoss()(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


PROBLEMS: dict[str, tuple[int, nn.Module]] = {
    "regression": (1, nn.MSELoss()),
    "multi_label_classification": (3, nn.BCEWithLogitsLoss()),
}


def problem(kind: str) -> tuple[Opinions, nn.Module, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    outputs, criterion = PROBLEMS[kind]
    model = Opinions(PretrainedConfig(num_labels=outputs, problem_type=kind))
    generator = torch.Generator().manual_seed(1)
    samples = []
    for _ in range(16):
        text, audio = torch.randn(5, generator=generator), torch.randn(6, generator=generator)
        number = 2 + text[0] + 0.3 * torch.randn((), generator=generator)
        labels = number if kind == "regression" else (text[:3] + audio[:3] > 0).float()
        samples.append({"text": text, "audio": audio, "labels": labels})
    return model, criterion, samples


def expected(model: Opinions, criterion: nn.Module, samples: list[dict[str, Tensor]]) -> dict[str, float]:
    """Return the first step's scores by a loop over samples."""
    batch = stacked(samples)
    target = batch.pop("labels").reshape(len(samples), -1)
    encoders: dict[str, nn.Module] = {"text": model.text, "audio": model.audio}
    case = Case(
        copy.deepcopy(model), encoders, model.classifier, batch, lambda out: out, target, criterion, "split"
    )
    case.encoders = {name: getattr(case.model, name) for name in encoders}
    return naive_scores(case)


def check(recorder: bo.Recorder, want: dict[str, float]) -> None:
    scores = recorder.series("score")
    assert {name: values[0] for name, (_, values) in scores.items()} == pytest.approx(want, rel=1e-5)


ENCODERS = {"text": "text", "audio": "audio"}


@pytest.mark.parametrize("kind", PROBLEMS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_labels_of_numbers_under_the_trainer(kind, accumulate, tmp_path):
    model, criterion, samples = problem(kind)
    want = expected(model, criterion, samples)
    balance = under_transformers.BalanceCallback(ENCODERS, "classifier", bo.OGM(0.5), loss=criterion)
    recorder = bo.Recorder(balance)
    args = arguments(
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=16 // accumulate,
        gradient_accumulation_steps=accumulate,
    )
    InOrder(model, args, train_dataset=samples, callbacks=[balance]).train()
    assert balance.monitor.stats()["labels"] == {"model": 2 * accumulate}
    assert balance.stats()["modulated"] == 2
    check(recorder, want)


class Lit(LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        return self.net(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("kind", PROBLEMS)
def test_labels_of_numbers_under_lightning(kind):
    model, criterion, samples = problem(kind)
    want = expected(model, criterion, samples)
    encoders = {name: f"net.{name}" for name in ENCODERS}
    balance = under_lightning.BalanceCallback(encoders, "net.classifier", bo.OGM(0.5), loss=criterion)
    recorder = bo.Recorder(balance)
    trainer = LightningTrainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        callbacks=[balance],
        accumulate_grad_batches=2,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Lit(model), DataLoader(samples, 8))  # type: ignore[arg-type]
    assert balance.monitor.stats()["labels"] == {"model": 4}
    check(recorder, want)


@pytest.mark.parametrize("kind", PROBLEMS)
def test_labels_of_numbers_under_accelerate(kind):
    model, criterion, samples = problem(kind)
    want = expected(model, criterion, samples)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    monitor = bo.ModalityMonitor(model, ENCODERS, "classifier", loss=criterion)
    base = torch.optim.SGD(model.parameters(), 0.1)
    counter = bo.ModulatedOptimizer(base, monitor, bo.OGM(0.5))
    recorder = bo.Recorder(counter)
    prepared, optimizer, loader = accelerator.prepare(model, counter, DataLoader(samples, 8))  # type: ignore[arg-type]
    for batch in loader:
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    assert monitor.stats()["labels"] == {"model": 2}
    assert counter.stats()["modulated"] == 1
    check(recorder, want)
