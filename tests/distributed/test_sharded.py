"""fully_shard and ZeroRedundancyOptimizer: the parameters of one process on the concatenated batch."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import balanceopt as bo
from tests.ranks import SHARDS, on_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(180)]

STEPS, BATCH = 8, 16
METHODS = {
    "OGM": lambda: bo.OGM(0.5, noise=False),
    "OGM-GE": lambda: bo.OGM(0.5),
    "AMSS": lambda: bo.AMSS(),
    "AMSS+": lambda: bo.AMSS(scale="unbiased"),
}


class Net(nn.Module):
    """Widths that two ranks cannot share evenly, one row that leaves a rank without any, a fusion of choice."""

    def __init__(self, linear_head: bool) -> None:
        super().__init__()
        self.audio = nn.Sequential(nn.Linear(5, 17), nn.ReLU(), nn.Linear(17, 8))
        self.visual = nn.Sequential(nn.Linear(7, 1), nn.Tanh(), nn.Linear(1, 12))
        self.head = (
            nn.Linear(20, 4) if linear_head else nn.Sequential(nn.Linear(20, 9), nn.ReLU(), nn.Linear(9, 4))
        )

    def forward(self, x_audio: torch.Tensor, x_visual: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat([self.visual(x_visual), self.audio(x_audio)], 1))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(4, (BATCH,), generator=generator)
    audio = torch.randn(BATCH, 5, generator=generator) + 2 * F.one_hot(labels, 5)
    return audio, torch.randn(BATCH, 7, generator=generator), labels


def train(method: str, linear_head: bool, wrap: str, rows: slice) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    model = Net(linear_head)
    caller: nn.Module = model
    if wrap == "fully_shard":
        mesh = init_device_mesh("cpu", (2,))
        for part in (model.audio, model.visual, model.head, model):
            fully_shard(part, mesh=mesh)
    if wrap == "zero":
        caller = DistributedDataParallel(model)
    groups = bo.modality_groups(model, {"audio": "audio", "visual": "visual"})
    base: torch.optim.Optimizer
    if wrap == "zero":
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # torch's own: its import compiles with torch.jit
            from torch.distributed.optim import ZeroRedundancyOptimizer
        base = ZeroRedundancyOptimizer(groups, torch.optim.SGD, lr=0.1, momentum=0.9)
    else:
        base = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    monitor = bo.ModalityMonitor(model, {"audio": "audio", "visual": "visual"}, head="head")
    optimizer = bo.ModulatedOptimizer(base, monitor, METHODS[method](), seed=7)
    for step in range(STEPS):
        audio, visual, labels = (x[rows] for x in batch(step))
        optimizer.zero_grad()
        F.cross_entropy(caller(audio, visual), labels).backward()
        optimizer.step()
    assert optimizer.stats()["modulated"] == STEPS
    state = model.state_dict()
    return {name: (v.full_tensor() if hasattr(v, "full_tensor") else v).detach() for name, v in state.items()}


def sharded(rank, cases):
    rows = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    return {(method, linear, wrap): train(method, linear, wrap, rows) for method, linear, wrap in cases}


CASES = [
    *((method, True, "fully_shard") for method in METHODS),
    ("OGM-GE", False, "fully_shard"),
    ("OGM-GE", True, "zero"),
]
CASES = [case for case in CASES if SHARDS or case[2] != "fully_shard"]


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    return on_ranks(sharded, tmp_path_factory.mktemp("sharded"), CASES)


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case[0]}-{'split' if case[1] else 'zero-out'}-{case[2]}"
)
def test_shards_give_the_parameters_of_one_process(on_two_ranks, case):
    alone = train(case[0], case[1], "none", slice(None))
    for own in on_two_ranks:
        for name, value in alone.items():
            # Sums over 16 samples in another order; eight steps at learning rate 0.1.
            torch.testing.assert_close(own[case][name], value, rtol=1e-4, atol=2e-6, msg=f"{case} {name}")
