"""OPM over ranks: one q for all, masks of their own, parameters that stay the same; one collective a forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import balanceopt as bo
from tests.models import Concat, watch
from tests.parallel import shard
from tests.ranks import SHARDS, needs_shards, on_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(180)]

STEPS, BATCH = 6, 16
SCENARIOS: dict[str, dict[str, Any]] = {
    "plain": {},
    "with OGM-GE": {"modulation": lambda: bo.OGM(0.5)},
    "gated": {"options": {"p_exe": 0.5, "rescale": "official"}},
    "watched": {"options": {"start": 99}},
    "checkpointed": {"again": True},
    "rank without labels": {"unlabelled": 1},
}
if SHARDS:
    SCENARIOS["sharded"] = {"wrap": "fully_shard"}
    SCENARIOS["sharded, watched"] = {"wrap": "fully_shard", "options": {"start": 99}}


class Net(Concat):
    again = False

    def encode(self, *inputs):
        pairs = zip(self.encoders.values(), inputs, strict=True)
        if self.again:
            return [checkpoint(encoder, x, use_reentrant=False) for encoder, x in pairs]
        return [encoder(x) for encoder, x in pairs]


def batch(step):
    generator = torch.Generator().manual_seed(step)
    inputs = [torch.randn(BATCH, n, generator=generator) for n in (5, 6)]
    labels = torch.randint(5, (BATCH,), generator=generator)
    inputs[0] += 2 * F.one_hot(labels, 5)
    return inputs, labels


class Run:
    def __init__(self, *, wrap="ddp", modulation=None, options=None, again=False, unlabelled=None, seed=None):
        torch.manual_seed(1)
        self.model = Net()
        self.model.again = again
        self.caller: torch.nn.Module = self.model
        if wrap == "fully_shard":
            shard(self.model)
        elif wrap == "ddp":
            self.caller = DistributedDataParallel(self.model)
        torch.manual_seed(50 + (dist.get_rank() if dist.is_initialized() else 0))
        self.monitor = watch(self.model)
        self.modulator = bo.OPM(self.monitor, seed=seed, **(options or {}))
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(self.model.parameters(), lr=0.3)
        if modulation is not None:
            self.optimizer = bo.ModulatedOptimizer(self.optimizer, self.monitor, modulation())
        self.unlabelled = unlabelled
        self.qs: list[torch.Tensor] = []
        self.masks: list[torch.Tensor] = []
        self.model.head.register_forward_pre_hook(self.look)

    def look(self, module, args):
        self.masks.append(torch.stack([(part != 0).any(1) for part in args[0].detach().split(4, 1)]))

    def train(self, rows, first=0, steps=STEPS):
        for number in range(first, first + steps):
            inputs, labels = batch(number)
            labels = labels[rows].clone()
            if self.unlabelled is not None and dist.get_rank() == self.unlabelled:
                labels[:] = -100
            self.optimizer.zero_grad()
            self.monitor.observe(labels)
            loss = F.cross_entropy(self.caller(*[x[rows] for x in inputs]), labels, reduction="sum")
            (loss / len(labels)).backward()  # DDP takes the mean over ranks
            self.optimizer.step()
            self.qs.append(self.modulator.q)
        return self

    def parameters(self):
        whole = [getattr(p, "full_tensor", lambda p=p: p)() for p in self.model.parameters()]
        return [p.detach().clone() for p in whole]

    def told(self):
        return {
            "q": torch.stack(self.qs),
            "masks": torch.stack(self.masks),
            "parameters": self.parameters(),
            "stats": self.modulator.stats(),
            "seed": self.modulator.state_dict()["seed"],
        }


def rows_of(rank):
    half = BATCH // 2
    return slice(rank * half, (rank + 1) * half)


def train_all(rank):
    return {name: Run(**given).train(rows_of(rank)).told() for name, given in SCENARIOS.items()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_ranks(train_all, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", SCENARIOS)
def test_ranks_have_one_q_and_one_model(ranks, name):
    first, second = (rank[name] for rank in ranks)
    assert torch.equal(first["q"], second["q"])
    assert first["q"].any()
    assert first["stats"] == second["stats"]
    assert first["seed"] == second["seed"]
    for a, b in zip(first["parameters"], second["parameters"], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", [name for name in SCENARIOS if "watched" not in name])
def test_masks_are_each_ranks_own(ranks, name):
    first, second = (rank[name]["masks"] for rank in ranks)
    assert not first.all()
    assert not torch.equal(first, second)
    assert first.any(1).all()
    assert second.any(1).all()


@pytest.mark.parametrize("name", [name for name in SCENARIOS if "watched" in name])
def test_q_is_that_of_one_process_on_the_whole_batch(ranks, name):
    alone = Run(wrap="none", options={"start": 99}).train(slice(0, BATCH)).told()
    torch.testing.assert_close(ranks[0][name]["q"], alone["q"])
    torch.testing.assert_close(ranks[0][name]["parameters"], alone["parameters"])


def test_checkpointing_changes_nothing(ranks):
    torch.testing.assert_close(ranks[0]["checkpointed"]["parameters"], ranks[0]["plain"]["parameters"])


@needs_shards
def test_sharding_changes_nothing(ranks):
    torch.testing.assert_close(ranks[0]["sharded"]["parameters"], ranks[0]["plain"]["parameters"])


def resume(rank):
    """Train 6; against train 3, let rank 0 save, load on all, train 3."""
    rows = rows_of(rank)
    whole = Run(seed=5).train(rows)
    first = Run(seed=5).train(rows, steps=3)
    first.modulator.update()
    box: list[Any] = [first.modulator.state_dict() if rank == 0 else None]
    dist.broadcast_object_list(box, src=0)
    second = Run(seed=99)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.modulator.load_state_dict(box[0])
    second.train(rows, first=3, steps=3)
    same = all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))
    return same, torch.equal(whole.modulator.q, second.modulator.q)


def test_a_resume_from_one_ranks_state_is_exact_after_update(tmp_path):
    assert on_ranks(resume, tmp_path) == [(True, True), (True, True)]
