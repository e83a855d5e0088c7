"""The competition over ranks: one seed for all, each part of the batch permuted by itself, gradients averaged."""

from __future__ import annotations

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import balanceopt as bo
from tests.models import Concat, batch
from tests.parallel import shard_encoders
from tests.ranks import SHARDS, on_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(180)]

RANKS = 2


def made():
    torch.manual_seed(0)
    return Concat().double()


def gradients(model, rank, seed=None):
    """Of one batch's part."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    monitor = bo.ModalityMonitor(
        model, inner.modalities, head=inner.head, group=None if seed is None else False
    )
    competition = bo.CompetitionObjective(monitor, seed=seed)
    torch.manual_seed(7)
    inputs = [x.double()[6 * rank : 6 * rank + 6] for x in batch(6 * RANKS)[0]]
    model(*inputs)
    competition().backward()
    competition.remove()
    monitor.remove()
    grads = {name: p.grad for name, p in inner.named_parameters()}
    return competition.seed, {
        n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in grads.items()
    }


def in_ddp_and_shards(rank):
    models = [DistributedDataParallel(made())]
    if SHARDS:
        models.append(shard_encoders(made()))
    results = []
    for model in models:
        torch.manual_seed(100 + rank)
        results.append(gradients(model, rank))
    return results


def test_equals_the_mean_of_each_part_alone(tmp_path):
    ranks = on_ranks(in_ddp_and_shards, tmp_path)
    seed = ranks[0][0][0]
    parts = [gradients(made(), rank, seed=seed)[1] for rank in range(RANKS)]
    for results in ranks:
        for own_seed, found in results:
            assert own_seed == seed
            for name, value in found.items():
                torch.testing.assert_close(value, sum(part[name] for part in parts) / RANKS, msg=name)
