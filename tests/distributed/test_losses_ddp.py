"""Losses without classes over ranks: scores and steps of two ranks equal those of one process on the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import balanceopt as bo
from balanceopt.optim import _engine
from tests.models import INPUTS, watch
from tests.ranks import on_ranks
from tests.training import groups_of, sgd, small_model

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(180)]

ROWS, OUTPUTS, STEPS = 8, 3, 3
LOSSES: dict[str, Any] = {
    "mse": nn.MSELoss,
    "l1": nn.L1Loss,
    "bce": nn.BCEWithLogitsLoss,
    "function": lambda: lambda f, y: (f - y).abs(),
    "function of classes": lambda: lambda f, y: F.nll_loss(f.log_softmax(1), y, reduction="none"),
}
# Rows of each of two ranks.
EQUAL, UNEVEN, ONE, NONE = (4, 4), (5, 3), (7, 1), (8, 0)
CASES = {
    f"{loss} {name}": (loss, rows)
    for loss in LOSSES
    for name, rows in {"equal": EQUAL, "uneven": UNEVEN, "one sample": ONE, "no pass": NONE}.items()
}


def batch(number: int, name: str) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(number)
    inputs = [torch.randn(ROWS, n, generator=generator) for n in INPUTS[:2]]
    target = inputs[0][:, :OUTPUTS] + 0.3 * torch.randn(ROWS, OUTPUTS, generator=generator) + 2
    if name == "function of classes":
        return inputs, target.argmax(1)
    return inputs, (target > 2).float() if name == "bce" else target


class Run:
    """Training on some rows of each batch, whose gradients are those of the mean over all rows."""

    def __init__(self, name: str, rows: slice, *, ddp: bool = False) -> None:
        self.name, self.rows, self.loss = name, rows, LOSSES[name]()
        self.model = small_model(classes=OUTPUTS)
        self.caller: Any = DistributedDataParallel(self.model) if ddp else self.model
        self.ranks = dist.get_world_size() if ddp else 1
        self.monitor = watch(self.model, loss=self.loss)
        self.scores = self.monitor.scores(needs_entropy=True)
        self.optimizer = bo.ModulatedOptimizer(
            sgd(groups_of(self.model)), self.monitor, bo.OGM(0.5, noise=False), seed=1
        )

    def train(self, steps: int) -> dict[str, Any]:
        seen = []
        for number in range(steps):
            inputs, target = batch(number, self.name)
            inputs, target = [x[self.rows] for x in inputs], target[self.rows]
            self.optimizer.zero_grad()
            if len(target):
                if self.name.startswith("function"):
                    self.monitor.observe(target)
                # DDP takes the mean of ranks, of which each has its own number of rows.
                share = len(target) * self.ranks / ROWS
                (self.loss(self.caller(*inputs), target).mean() * share).backward()
            if dist.is_initialized() and self.ranks == 1:
                self.sum_gradients()
            taken = self.scores.take()
            assert taken is not None
            seen.append([getattr(taken, field) for field in FIELDS])
            self.optimizer.step()
        return {"scores": seen, "model": self.model.state_dict(), "stats": self.optimizer.stats()}

    def sum_gradients(self) -> None:
        """A loop of its own, since under DDP each rank needs a pass."""
        for parameter in self.model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)


FIELDS = ("score", "count", "cross_entropy", "feature_entropy", "baseline")


def work(rank: int) -> dict[str, Any]:
    told = {}
    for case, (name, rows) in CASES.items():
        part = slice(0, rows[0]) if rank == 0 else slice(rows[0], ROWS)
        told[case] = Run(name, part, ddp=0 not in rows).train(STEPS)
    return told


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return on_ranks(work, Path(tmp_path_factory.mktemp("ranks")))


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one_process_on_the_whole_batch(ranks: list[Any], case: str):
    alone = Run(CASES[case][0], slice(0, ROWS)).train(STEPS)
    assert alone["stats"]["modulated"] == STEPS
    for told in (rank[case] for rank in ranks):
        assert told["stats"] == alone["stats"]
        for found, expected in zip(told["scores"], alone["scores"], strict=True):
            for field, x, y in zip(FIELDS, found, expected, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6, msg=field)
        for name, parameter in alone["model"].items():
            torch.testing.assert_close(told["model"][name], parameter, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_ranks_stay_the_same_bit_for_bit(ranks: list[Any], case: str):
    first, second = (rank[case]["model"] for rank in ranks)
    assert all(torch.equal(first[name], second[name]) for name in first)


class MayLack(nn.Module):
    """Two encoders, of which the second runs only where its input is given."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(8, 2)

    def forward(self, a: Tensor, b: Tensor | None) -> Tensor:
        z = torch.zeros(len(a), 4) if b is None else self.b(b)
        return self.head(torch.cat([self.a(a), z], 1))


def lacking_at_first(rank: int) -> int:
    """Steps in a process with compiled code, the first without a modality on one rank."""
    model = MayLack()
    monitor = bo.ModalityMonitor(
        model, {"a": "a", "b": "b"}, "head", slices={"a": slice(4), "b": slice(4, 8)}
    )
    optimizer = bo.ModulatedOptimizer(sgd(model.parameters()), monitor, bo.OGM(0.5, noise=False))
    with mock.patch.object(_engine, "holds_compiled_code", return_value=True):
        for number in range(3):
            optimizer.zero_grad()
            x = torch.randn(4, 3)
            output = model(x, None if rank == 1 and number == 0 else x)
            F.cross_entropy(output, torch.tensor([0, 1, 0, 1])).backward()
            optimizer.step()
    return optimizer.stats()["modulated"]


def test_ranks_look_for_compiled_code_together(tmp_path: Path):
    assert on_ranks(lacking_at_first, tmp_path) == [3, 3]
