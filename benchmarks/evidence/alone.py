"""Models of encoders that were trained alone: their ensemble, and joint training that starts from them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks import training
from benchmarks.evidence.sets import SETS, Part, data_of
from benchmarks.models import MultimodalClassifier
from benchmarks.tasks import NUMBER, Task
from benchmarks.training import Recipe

# What is averaged in an ensemble: probabilities, or logits, which is the normalised geometric mean of probabilities.
Pool = Literal["logits", "probabilities"]


@dataclass(frozen=True)
class Alone:
    """An encoder with a head of its own, trained on one modality, and the CPU seconds that this took."""

    model: MultimodalClassifier
    seconds: float


@lru_cache(maxsize=64)
def train_alone(
    name: str,
    folder: Path | None,
    part: Part,
    seed: int,
    weights_seed: int,
    modality: str,
    lr: float,
    epochs: int,
) -> Alone:
    """The modality's encoder, trained by SGD without the others; the last few are kept, so leave them as they are."""
    data = data_of(name, folder, part, seed)
    recipe = Recipe(epochs, lr, batch_size=SETS[name].batch_size)
    began = time.process_time()
    model = training.train_alone(data, modality, recipe, seed=weights_seed)
    return Alone(model, time.process_time() - began)


class Ensemble(nn.Module):
    """UME: the mean prediction of models that were trained on one modality each.

    Args:
        alone: a trained model for each modality.
        pool: what is averaged; numbers are averaged as they are.
        task: what the predictions are.
    """

    def __init__(self, alone: Mapping[str, MultimodalClassifier], pool: Pool, task: Task) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({m: model.encoders[m] for m, model in alone.items()})
        self.heads = nn.ModuleDict({m: model.head for m, model in alone.items()})
        self.pool = pool
        self.task = task

    def forward(self, *inputs: Tensor) -> Tensor:
        """Logits `(B, C)` of the modalities' inputs, given in the order of `encoders`."""
        logits = torch.stack(
            [
                self.heads[name](encoder(x))
                for (name, encoder), x in zip(self.encoders.items(), inputs, strict=True)
            ]
        )
        if self.pool == "logits" or self.task is NUMBER:
            return logits.mean(0)
        if self.task.has_classes:
            return logits.softmax(-1).mean(0).log()
        return torch.logit(logits.sigmoid().mean(0), eps=1e-7)


class Frozen(nn.Module):
    """An encoder that training leaves as it is, with the statistics of its norms."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.train(False)

    def forward(self, x: Tensor) -> Tensor:
        """Features `(B, D)`."""
        features: Tensor = self.encoder(x)
        return features

    def train(self, mode: bool = True) -> Frozen:
        """Stay in eval mode."""
        return super().train(False)


def start_from(
    model: MultimodalClassifier, alone: Mapping[str, MultimodalClassifier], *, frozen: bool
) -> None:
    """Give `model` copies of encoders that were trained alone."""
    for name, other in alone.items():
        encoder = deepcopy(other.encoders[name])
        model.encoders[name] = Frozen(encoder) if frozen else encoder
