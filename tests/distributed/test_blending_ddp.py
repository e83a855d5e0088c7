"""Gradient blending over ranks with uneven batches: one blend for all, also where one rank wrote the checkpoint."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from tests.blending import Run
from tests.ranks import on_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(180)]


class Part(Run):
    """A rank's part of the run: seven samples of each batch, or the rest; nothing of the first validation batch."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rows = [slice(0, 7), slice(7, None)][rank]
        self.caller = DistributedDataParallel(self.model)

    def training(self, epoch: int) -> list[Any]:
        return [self.part(one) for one in super().training(epoch)]

    def validation(self) -> list[Any]:
        return [part for one in super().validation() if len((part := self.part(one))[1])]

    def part(self, one: Any) -> Any:
        return [x[self.rows] for x in one[0]], one[1][self.rows]


def work(rank: int) -> dict[str, Any]:
    run = Part(rank)
    for epoch in range(4):
        run.epoch(epoch)
    box = [None]
    if rank == 0:
        file = io.BytesIO()
        torch.save(run.state(), file)
        box = [file.getvalue()]  # type: ignore[list-item]
    dist.broadcast_object_list(box)
    assert box[0] is not None
    twin = Part(rank)
    twin.load(torch.load(io.BytesIO(box[0]), weights_only=True))
    found = {}
    for name, one in (("run", run), ("twin", twin)):
        one.epoch(4)
        found[name] = {**one.objective.weight}, [p.detach() for p in one.model.parameters()]
    model = run.model.eval()
    with torch.no_grad():
        pairs = [(model(*inputs), labels) for inputs, labels in Run.validation(run)]
    joint = F.cross_entropy(torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs]))
    return {**found, "joint": float(joint), "losses": run.scheduler.state_dict()["losses"]}


def test_ranks_agree_on_the_blend(tmp_path):
    first, second = on_ranks(work, tmp_path)
    weights, params = first["run"]
    assert weights != {"audio": 1.0, "visual": 1.0}
    for found in (first["twin"], second["run"], second["twin"]):
        assert found[0] == weights
        for p, q in zip(found[1], params, strict=True):
            assert torch.equal(p, q)
    assert torch.equal(first["losses"], second["losses"])
    # The mean is over all ranks' samples, not over the ranks' means.
    assert float(first["losses"][1, -1]) == pytest.approx(first["joint"], rel=1e-5)
