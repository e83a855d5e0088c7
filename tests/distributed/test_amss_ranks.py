"""AMSS over ranks: DDP's draw the same masks, fully_shard's are those of one process, for units of every kind."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import balanceopt as bo
from tests.ranks import SHARDS, on_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(180)]

STEPS, BATCH = 4, 16
OPTIONS: dict[str, dict[str, Any]] = {
    "AMSS": {},
    "AMSS+": {"scale": "unbiased"},
    "official": {"scale": "official"},
}


class Heads(nn.Module):
    """Attention over four tokens, heads for units."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Linear(5, 24)
        self.attention = nn.MultiheadAttention(6, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        z = self.tokens(x).unflatten(1, (4, 6))
        mixed: Tensor = self.attention(z, z, z, need_weights=False)[0].mean(1)
        return mixed


class Filters(nn.Module):
    """Convolutions, a grouped and a transposed one among them, of which some leave a rank without a row."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 6, 3)
        self.grouped = nn.Conv1d(6, 9, 3, groups=3)
        self.back = nn.ConvTranspose1d(9, 6, 3, groups=3)
        self.last = nn.ConvTranspose1d(6, 5, 2)

    def forward(self, x: Tensor) -> Tensor:
        z = self.grouped(F.relu(self.conv(x[:, None])))
        return self.last(F.relu(self.back(z))).mean(2)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.audio, self.visual = Heads(), Filters()
        self.head = nn.Linear(11, 5)

    def forward(self, x_audio: Tensor, x_visual: Tensor) -> Tensor:
        return self.head(torch.cat([self.visual(x_visual), self.audio(x_audio)], 1))


def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(5, (BATCH,), generator=generator)
    audio = torch.randn(BATCH, 5, generator=generator) + 2 * F.one_hot(labels, 5)
    return audio, torch.randn(BATCH, 9, generator=generator), labels


def whole(x: Tensor) -> Tensor:
    full = getattr(x, "full_tensor", None)
    return (x if full is None else full()).detach().clone()


def train(wrap: str, options: dict[str, Any], rows: slice) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters after some steps, and which elements of each gradient that is masked the steps left non-zero."""
    torch.manual_seed(1)
    model = Net()
    caller: nn.Module = model
    if wrap == "fully_shard":
        mesh = init_device_mesh("cpu", (2,))
        for part in (model.audio, model.visual, model.head, model):
            fully_shard(part, mesh=mesh)
    if wrap in ("ddp", "zero"):
        caller = DistributedDataParallel(model)
    encoders = {"audio": model.audio, "visual": model.visual}
    monitor = bo.ModalityMonitor(model, encoders, head="head")
    groups = bo.modality_groups(model, encoders)
    settings: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
    optimizer: bo.MaskedSubnetworkSGD | bo.ModulatedOptimizer
    if wrap == "zero":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, on import
            from torch.distributed.optim import ZeroRedundancyOptimizer
        base = ZeroRedundancyOptimizer(groups, torch.optim.SGD, **settings)
        optimizer = bo.ModulatedOptimizer(base, monitor, bo.AMSS(**options), seed=7)
    else:
        optimizer = bo.MaskedSubnetworkSGD(groups, monitor, **settings, seed=7, **options)
    # Biases are not masked; the gradient of attention's key bias is zero but for rounding, which differs by processor.
    masks: dict[str, list[Tensor]] = {name: [] for name, p in model.named_parameters() if p.dim() > 1}
    for step in range(STEPS):
        audio, visual, labels = (x[rows] for x in batch(step))
        optimizer.zero_grad()
        F.cross_entropy(caller(audio, visual), labels).backward()
        optimizer.step()
        for name, masked in masks.items():
            gradient = model.get_parameter(name).grad
            assert gradient is not None
            masked.append(whole(gradient) != 0)
    assert optimizer.stats()["modulated"] == STEPS
    parameters = {name: whole(p) for name, p in model.named_parameters()}
    return parameters, {name: torch.stack(found) for name, found in masks.items()}


WRAPS = ("ddp", "fully_shard") if SHARDS else ("ddp",)
CASES = [(wrap, name) for wrap in WRAPS for name in OPTIONS] + [("zero", "AMSS")]


def on_a_rank(rank: int) -> dict[tuple[str, str], Any]:
    rows = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    return {(wrap, name): train(wrap, OPTIONS[name], rows) for wrap, name in CASES}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return on_ranks(on_a_rank, tmp_path_factory.mktemp("amss"))


@pytest.mark.parametrize(("wrap", "name"), CASES)
def test_masks_and_parameters_are_those_of_one_process(two_ranks, wrap, name):
    parameters, masks = train("none", OPTIONS[name], slice(None))
    assert any(not bool(mask.all()) for mask in masks.values())
    for own in two_ranks:
        found, drawn = own[wrap, name]
        for key in masks:
            assert torch.equal(drawn[key], masks[key]), key
        for key in parameters:
            torch.testing.assert_close(found[key], parameters[key], rtol=1e-4, atol=2e-6, msg=key)


@pytest.mark.parametrize(("wrap", "name"), CASES)
def test_ranks_agree_bit_for_bit(two_ranks, wrap, name):
    first, second = (own[wrap, name][0] for own in two_ranks)
    assert all(torch.equal(first[key], second[key]) for key in first)
