"""TCMax over ranks: combinations of the whole batch, whatever part of it each rank has, in one collective."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import balanceopt as bo
from tests.models import CLASSES, Concat, SumHeads, batch
from tests.parallel import counting_collectives, shard_encoders, whole
from tests.ranks import SHARDS, on_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(180)]

ROWS = 12
# Rows of each rank: the halves, an uneven cut, and a rank whose samples are all ignored or lack a modality.
CUTS = {"halves": 6, "uneven": 11, "nothing on one": 8}
KINDS: list[Any] = [Concat, SumHeads]


def made(kind: Any) -> Any:
    torch.manual_seed(0)
    return kind().double()


def train(
    model: Any, cut: str, parts: list[slice], **options: Any
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and parameters of two steps, each on these parts of a batch."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    monitor = bo.ModalityMonitor(model, inner.modalities, head=inner.heads)
    objective = bo.TotalCorrelationLoss(monitor, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for number in range(2):
        torch.manual_seed(10 + number)
        inputs, labels = batch(ROWS)
        present = torch.arange(ROWS) % 3 > 0
        if cut == "nothing on one":
            present[CUTS[cut] :] = False
            if number:
                labels[CUTS[cut] :] = -100
        optimizer.zero_grad()
        for rows in parts:
            monitor.observe(labels[rows], present={"visual": present[rows]})
            model(*(x.double()[rows] for x in inputs))
            loss = objective(labels[rows])
            (loss / len(parts)).backward()
            losses.append(float(loss.detach()))
        optimizer.step()
    objective.remove()
    return losses, {name: whole(p) for name, p in inner.named_parameters()}


def in_ranks(rank: int) -> list[Any]:
    def part(cut: str) -> list[slice]:
        return [slice(0, CUTS[cut]) if rank == 0 else slice(CUTS[cut], ROWS)]

    results = [train(DistributedDataParallel(made(kind)), cut, part(cut)) for kind in KINDS for cut in CUTS]
    if SHARDS:
        results.append(train(shard_encoders(made(Concat)), "uneven", part("uneven")))
    apart = DistributedDataParallel(made(Concat))
    with counting_collectives() as calls:
        results.append(train(apart, "halves", part("halves"), group_negatives=False))
    assert calls == []
    with counting_collectives() as calls:
        train(DistributedDataParallel(made(Concat)), "halves", part("halves"))
    # A row of M x C log-sums, the labels' sum and a count from each of two ranks, once a step.
    assert calls == [("all_reduce", 2 * (2 * CLASSES + 2))] * 2
    return results


def test_two_ranks_are_as_one(tmp_path: Any):
    ranks = on_ranks(in_ranks, tmp_path)
    expected = [train(made(kind), cut, [slice(None)]) for kind in KINDS for cut in CUTS]
    if SHARDS:
        expected.append(train(made(Concat), "uneven", [slice(None)]))
    for first, second, (losses, params) in zip(*(results[:-1] for results in ranks), expected, strict=True):
        assert first[0] == second[0] == pytest.approx(losses, rel=1e-9)
        for name, value in params.items():
            assert torch.equal(first[1][name], second[1][name]), name
            torch.testing.assert_close(first[1][name], value, msg=name, rtol=1e-9, atol=1e-10)
    # Without common combinations each rank's batch is as a micro-batch.
    losses, params = train(made(Concat), "halves", [slice(0, 6), slice(6, 12)])
    (first, first_params), (second, second_params) = (results[-1] for results in ranks)
    assert [*first, *second] == pytest.approx([losses[0], losses[2], losses[1], losses[3]])
    for name, value in params.items():
        torch.testing.assert_close(first_params[name], value, msg=name)
        assert torch.equal(first_params[name], second_params[name])
