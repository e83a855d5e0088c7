"""What the tests of gradient blending share: a run with an objective, probes and the scheduler of its weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import balanceopt as bo
from tests.models import CLASSES, Concat, watch

TRAIN, VAL = 3, 2  # batches an epoch
Batch = tuple[list[Tensor], Tensor]


def batch(number: int, model: Concat, size: int = 12) -> Batch:
    """The first modality shows the class, the others nothing."""
    generator = torch.Generator().manual_seed(number)
    inputs = [torch.randn(size, e[0].in_features, generator=generator) for e in model.modalities.values()]  # type: ignore[index]
    labels = torch.randint(CLASSES, (size,), generator=generator)
    inputs[0] = inputs[0] + 2 * F.one_hot(labels, inputs[0].shape[1])
    return inputs, labels


class Run:
    """A model in training, the same each time."""

    def __init__(self, *, inject: bool = False, **options: Any) -> None:
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            self.model = Concat()
        self.caller: nn.Module = self.model
        self.monitor = watch(self.model)
        self.objective = bo.UnimodalObjective(self.monitor, CLASSES, inject=inject, seed=0)
        self.probes = bo.ProbeMonitor(self.monitor, losses=True)
        groups = [*self.model.parameters(), *self.objective.parameters()]
        self.optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        self.scheduler = bo.BlendScheduler(self.objective, self.probes, **{"every": 2, **options})

    def train(self, batches: Iterator[Batch] | list[Batch]) -> None:
        self.model.train()
        for inputs, labels in batches:
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.caller(*inputs), labels)
            (loss if self.objective.inject else loss + self.objective(labels)).backward()
            self.optimizer.step()

    @torch.no_grad()
    def validate(self, batches: Iterator[Batch] | list[Batch], **seen: Any) -> None:
        self.model.eval()
        for inputs, labels in batches:
            self.model(*inputs)
            self.monitor.observe(labels, **seen)
        self.model.train()

    def training(self, epoch: int) -> list[Batch]:
        return [batch(TRAIN * epoch + i, self.model) for i in range(TRAIN)]

    def validation(self) -> list[Batch]:
        return [batch(1000 + i, self.model, 7 + i) for i in range(VAL)]

    def epoch(self, number: int) -> dict[str, float] | None:
        self.train(self.training(number))
        self.validate(self.validation())
        return self.scheduler.step()

    def state(self) -> list[dict[str, Any]]:
        parts = (self.model, self.objective, self.optimizer, self.probes, self.scheduler)
        return [part.state_dict() for part in parts]

    def load(self, states: list[dict[str, Any]]) -> None:
        parts: tuple[Any, ...] = (self.model, self.objective, self.optimizer, self.probes, self.scheduler)
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(state)
