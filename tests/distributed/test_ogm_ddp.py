"""OGM over ranks: DDP equals one process on the concatenated batch, and ranks stay the same bit for bit."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import balanceopt as bo
from tests.models import watch
from tests.ranks import on_ranks
from tests.training import Batch, batch, groups_of, sgd, small_model

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(180)]

HALF = 4  # rows of each of two ranks
BASES: dict[str, Any] = {
    "sgd": lambda groups: sgd(groups, momentum=0.9),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01),
    "sgd update": lambda groups: sgd(groups),
}


class Run:
    """Training on some rows of each batch, under DDP where there are several processes."""

    def __init__(self, base: str = "sgd", modulation: bo.OGM | None = None, **options: Any) -> None:
        self.model = small_model()
        monitor = options.pop("monitor", {})
        self.caller: Any = self.model
        if dist.is_initialized():
            self.caller = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        chosen = bo.OGM(0.5) if modulation is None else modulation
        self.optimizer = bo.ModulatedOptimizer(
            BASES[base](groups_of(self.model)), watch(self.model, **monitor), chosen, **options
        )

    def train(self, steps: int, rows: slice, *, unlabelled: bool = False, first: int = 0) -> Run:
        for number in range(first, first + steps):
            inputs, labels = batch(number, self.model, size=2 * HALF)
            self.step(([x[rows] for x in inputs], labels[rows]), unlabelled=unlabelled)
        return self

    def step(self, given: Batch, *, unlabelled: bool = False) -> None:
        inputs, labels = given
        self.optimizer.zero_grad()
        logits = self.caller(*inputs)
        # As a user writes it: a mean over the rank's rows, of which DDP takes the mean.
        (logits.sum() * 0 if unlabelled else F.cross_entropy(logits, labels)).backward()
        self.optimizer.step()

    def told(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "step": self.optimizer.param_groups[0]["balanceopt_step"],
            "seed": self.optimizer.param_groups[0]["balanceopt_seed"],
            "stats": self.optimizer.stats(),
            "state": pickle.dumps(self.optimizer.state_dict()["param_groups"]),
        }


def rows_of(rank: int) -> slice:
    return slice(rank * HALF, (rank + 1) * HALF)


UPDATE = bo.OGM(0.5, noise=False, apply_to="update")


def work(rank: int) -> dict[str, Any]:
    rows = rows_of(rank)
    told = {
        "sgd": Run("sgd", seed=5).train(5, rows).told(),
        "adamw": Run("adamw", seed=5).train(5, rows).told(),
        "sgd update": Run("sgd update", UPDATE, seed=5).train(5, rows).told(),
        "long": Run("adamw").train(50, rows).told(),  # seed=None: the first rank's
        "own seeds": Run("sgd", seed=rank).train(3, rows).told(),
        "rank without labels": Run("sgd", seed=5).train(5, rows, unlabelled=rank == 1).told(),
        "alone": Run("sgd", monitor={"group": False}, seed=5).train(1, rows).told(),
    }
    silent = Run("sgd", strict=False)
    silent.model.eval()
    with pytest.warns(UserWarning, match="no scores"):
        silent.train(2, rows)
    told["silent"] = silent.told()
    silent.optimizer.zero_grad()
    silent.optimizer.step()  # without gradients it asks nobody and counts nothing
    told["after"] = silent.told()
    return told


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return on_ranks(work, Path(tmp_path_factory.mktemp("ranks")))


def largest_difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    return max(float((a["model"][key] - b["model"][key]).abs().max()) for key in a["model"])


@pytest.mark.parametrize(("name", "tolerance"), [("sgd", 1e-6), ("sgd update", 1e-6), ("adamw", 1e-5)])
def test_two_ranks_equal_one_process(ranks: list[Any], name: str, tolerance: float):
    modulation = UPDATE if name == "sgd update" else None
    alone = Run(name, modulation, seed=5).train(5, slice(0, 2 * HALF)).told()
    assert largest_difference(alone, ranks[0][name]) < tolerance
    assert alone["stats"] == ranks[0][name]["stats"]


@pytest.mark.parametrize(
    "name", ["sgd", "adamw", "sgd update", "long", "own seeds", "rank without labels", "silent"]
)
def test_ranks_are_the_same_bit_for_bit(ranks: list[Any], name: str):
    assert largest_difference(ranks[0][name], ranks[1][name]) == 0
    assert ranks[0][name]["state"] == ranks[1][name]["state"]


def test_the_seed_is_the_first_ranks(ranks: list[Any]):
    assert ranks[1]["long"]["seed"] == 100
    assert ranks[1]["own seeds"]["seed"] == 0


def test_a_rank_without_labels_takes_part(ranks: list[Any]):
    """Scores come from the other rank alone; the gradient is half of what that rank has."""
    alone = Run("sgd", seed=5)
    for number in range(5):
        inputs, labels = batch(number, alone.model, size=2 * HALF)
        alone.optimizer.zero_grad()
        logits = alone.model(*[x[:HALF] for x in inputs])
        (F.cross_entropy(logits, labels[:HALF]) / 2).backward()
        alone.optimizer.step()
    assert largest_difference(alone.told(), ranks[0]["rank without labels"]) < 1e-6
    assert ranks[1]["rank without labels"]["stats"]["modulated"] == 5


def test_without_communication_ranks_score_alone(ranks: list[Any]):
    assert largest_difference(ranks[0]["alone"], ranks[1]["alone"]) > 0


def test_silent_steps_count_on_every_rank(ranks: list[Any]):
    for rank in ranks:
        assert rank["silent"]["step"] == rank["after"]["step"] == 2
        assert rank["silent"]["stats"]["without_scores"] == 2
