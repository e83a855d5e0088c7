"""MMPareto over ranks: each rank judges its own part of the batch, as one process judges micro-batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import balanceopt as bo
from tests.models import CLASSES, Concat, batch
from tests.parallel import shard_encoders
from tests.ranks import SHARDS, on_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(180)]

RANKS, ROWS = 2, 12
SCOPES: list[Any] = ["output", "encoder"]


def made() -> Concat:
    torch.manual_seed(0)
    return Concat().double()


def train(model: Any, scope: Any, parts: list[slice]) -> dict[str, torch.Tensor]:
    """Three steps, each on these parts of a batch."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    monitor = bo.ModalityMonitor(model, inner.modalities, head=inner.head)
    objective = bo.UnimodalObjective(monitor, CLASSES, inject=True, seed=0).double()
    groups = [{"params": list(model.parameters())}, {"params": list(objective.parameters())}]
    method = bo.MMPareto(objective, scope=scope)
    optimizer = bo.ModulatedOptimizer(torch.optim.SGD(groups, lr=0.5), monitor, method)
    for number in range(3):
        torch.manual_seed(10 + number)
        inputs, labels = batch(ROWS)
        optimizer.zero_grad()
        for rows in parts:
            logits = model(*(x.double()[rows] for x in inputs))
            (F.cross_entropy(logits, (labels + number)[rows] % CLASSES) / len(parts)).backward()
        optimizer.step()
    parameters = {**dict(inner.named_parameters()), **dict(objective.named_parameters())}
    whole = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in parameters.items()}
    return {name: p.detach().clone() for name, p in whole.items()}


def in_ranks(rank: int) -> list[dict[str, torch.Tensor]]:
    part = [slice(rank * ROWS // RANKS, (rank + 1) * ROWS // RANKS)]
    results = [train(DistributedDataParallel(made()), scope, part) for scope in SCOPES]
    if not SHARDS:
        return results
    sharded = shard_encoders(made())
    with pytest.raises(NotImplementedError, match="scope='output'"):
        train(sharded, "encoder", part)
    return [*results, train(sharded, "output", part)]


def test_equals_one_process_on_micro_batches(tmp_path):
    first, second = on_ranks(in_ranks, tmp_path)
    parts = [slice(0, 6), slice(6, 12)]
    expected = [train(made(), scope, parts) for scope in (*SCOPES, "output")[: len(first)]]
    for a, b, whole in zip(first, second, expected, strict=True):
        for name, value in whole.items():
            assert torch.equal(a[name], b[name]), name
            torch.testing.assert_close(a[name], value, msg=name, rtol=1e-6, atol=1e-8)
