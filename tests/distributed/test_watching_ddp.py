"""Probes over ranks, as on one process with all samples; recorders that no other rank waits for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import balanceopt as bo
from tests.models import CLASSES, INPUTS, Concat, watch
from tests.parallel import shard
from tests.ranks import needs_shards, on_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(180)]

STEPS, BATCH = 8, 16


def batch(number: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    inputs = [torch.randn(BATCH, n, generator=generator) for n in INPUTS[:2]]
    labels = torch.randint(CLASSES, (BATCH,), generator=generator)
    inputs[0] += F.one_hot(labels, INPUTS[0])
    return inputs, labels


def part_of(given: Any, rank: int, ranks: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    inputs, labels = given
    rows = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    return [x[rows] for x in inputs], labels[rows]


def run(rank: int = 0, ranks: int = 1, validates: str = "all", wrap: str = "ddp") -> dict[str, Any]:
    """Train, validate, train one step more; results of the probes, and rows of the first rank's recorder."""
    torch.manual_seed(1)
    model = Concat()
    caller: torch.nn.Module = model
    if wrap == "fully_shard":
        shard(model)
    elif ranks > 1:
        caller = DistributedDataParallel(model)
    monitor = watch(model)
    probes = bo.ProbeMonitor(monitor, losses=True)
    recorder = bo.Recorder(monitor, probes) if rank == 0 else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    told: dict[str, torch.Tensor] = {}
    probes.listeners.append(lambda step, quantity, names, values: told.update({quantity: values}))
    for number in range(STEPS):
        if number == STEPS - 1 and (validates == "all" or rank == 0):
            model.eval()
            with torch.no_grad():
                for extra in range(3):
                    inputs, labels = part_of(batch(100 + extra), rank, ranks)
                    model(*inputs)
                    monitor.observe(labels)
            model.train()
        inputs, labels = part_of(batch(number), rank, ranks)
        optimizer.zero_grad()
        F.cross_entropy(caller(*inputs), labels).backward()
        optimizer.step()
    weights = {name: probe.weight for name, probe in probes._probes.items()}
    rows = [] if recorder is None else recorder.rows()
    losses = probes.take_losses()
    return {"weights": weights, "told": told, "losses": losses, "quantities": {row.quantity for row in rows}}


def work(rank: int, validates: str, wrap: str) -> dict[str, Any]:
    return run(rank, dist.get_world_size(), validates, wrap)


def test_probes_are_those_of_one_process_with_all_samples(tmp_path, ranks):
    alone = run()
    found = on_ranks(work, tmp_path, "all", "ddp", ranks=ranks)
    for one in found:
        for name, weight in alone["weights"].items():
            assert torch.equal(one["weights"][name], found[0]["weights"][name])
            torch.testing.assert_close(one["weights"][name], weight, rtol=1e-3, atol=1e-4)
        for quantity in ("probe", "probe_train"):
            torch.testing.assert_close(one["told"][quantity], alone["told"][quantity])
        for losses, expected in zip(one["losses"], alone["losses"], strict=True):
            torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("wrap", ["ddp", pytest.param("fully_shard", marks=needs_shards)])
def test_one_rank_may_record_and_validate_alone(wrap, tmp_path):
    if wrap == "fully_shard":  # a sharded model's forward is a collective
        first, second = on_ranks(work, tmp_path, "all", wrap)
    else:
        first, second = on_ranks(work, tmp_path, "first", wrap)
        assert second["told"] == {}
    assert set(first["told"]) == {"probe", "probe_train"}
    assert {"score", "gradient_norm", "update_ratio", "effective_rank", "probe"} <= first["quantities"]
    for a, b in zip(first["losses"], second["losses"], strict=True):
        assert torch.equal(a, b)
        assert bool(a.isfinite().all())
    for name in first["weights"]:
        assert torch.equal(first["weights"][name], second["weights"][name])


def without_targets(rank: int) -> int:
    """Training forwards without a backward, before the first pass that tells a target."""
    model = Concat()
    probes = bo.ProbeMonitor(watch(model))
    for backward in (False, False, True, True):
        inputs, labels = part_of(batch(0), rank, 2)
        loss = F.cross_entropy(model(*inputs), labels)
        if backward:
            loss.backward()
    return probes.passes


def test_first_passes_without_targets_build_no_probe(tmp_path):
    assert on_ranks(without_targets, tmp_path) == [1, 1]
