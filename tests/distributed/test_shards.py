"""Every method under fully_shard: what one process makes, whatever the shards; and how much of a parameter is whole."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import Shard
from torch.profiler import ProfilerActivity, profile

import balanceopt as bo
from tests.models import Concat
from tests.parallel import METHODS, Run, alone, difference, gated, shard
from tests.ranks import FOUR, needs_shards, on_ranks
from tests.training import groups_of, sgd

pytestmark = [needs_shards, pytest.mark.distributed, pytest.mark.timeout(240)]

STEPS = 8
WATCHED = {"start": 10**6}
ZERO_OUT = ("OGM-GE", "AMSS", "OPM", "all")


def by_columns(model: nn.Module) -> nn.Module:
    """Where they can be cut evenly, which FSDP asks for."""

    def place(p: Tensor) -> Shard:
        return Shard(1) if p.dim() > 1 and p.shape[1] % dist.get_world_size() == 0 else Shard(0)

    return shard(model, shard_placement_fn=place)


def in_bfloat16(model: nn.Module) -> nn.Module:
    return shard(
        model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    )


def hybrid(model: nn.Module) -> nn.Module:
    return shard(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards")))


WRAPS: dict[str, Any] = {"rows": shard, "columns": by_columns, "bfloat16": in_bfloat16}
IN_BFLOAT16 = ("OGM-GE", "OGM update", "InfoReg", "AMSS", "all")
CASES = [
    (wrap, method) for wrap in WRAPS for method in METHODS if wrap != "bfloat16" or method in IN_BFLOAT16
]
HYBRID = [("hybrid", method) for method in METHODS]


def train_all(rank: int, ranks: int) -> dict[Any, Any]:
    told: dict[Any, Any] = {}
    for case in CASES + (HYBRID if ranks == 4 else []):
        wrap = {**WRAPS, "hybrid": hybrid}[case[0]]
        run = Run(case[1], wrap, rank=rank, ranks=ranks, options=WATCHED)
        told[case] = run.train(STEPS).told()
    for method in ZERO_OUT:
        run = Run(method, shard, rank=rank, ranks=ranks, model=gated(), options=WATCHED).train(STEPS)
        told["zero-out", method] = {**run.told(), "scores": run.monitor.stats()["scores"]}
    told["memory"] = {
        (kind, method): memory(method, WRAPS[kind])
        for kind in ("rows", "columns")
        for method in ("OGM-GE", "AMSS", "AMSS+", "all")
    }
    told["collectives"] = {method: collectives(rank, ranks, method) for method in METHODS}
    told["later"] = sharded_later(rank, ranks)
    return told


@pytest.fixture(scope="module")
def trained(ranks: int, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each rank told."""
    return on_ranks(train_all, tmp_path_factory.mktemp("shards"), ranks, ranks=ranks)


def agree(told: list[Any], case: Any, ranks: int) -> None:
    first, *others = (rank[case] for rank in told)
    assert all(difference(first, other) == 0 for other in others)
    expected = alone(case[1], STEPS, ranks, options=WATCHED)
    assert first["stats"] == expected["stats"]
    # bfloat16 has eight bits: forward and backward run in it, the step does not. A mask may fall otherwise.
    assert difference(first, expected) < (math.inf if case[0] == "bfloat16" else 2e-6)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_shards_make_what_one_process_makes(trained: list[Any], ranks: int, case: Any):
    agree(trained, case, ranks)


@pytest.mark.parametrize("method", ZERO_OUT)
def test_shards_make_what_one_process_makes_of_a_fusion_that_is_run_again(
    trained: list[Any], ranks: int, method: str
):
    first, *others = (rank["zero-out", method] for rank in trained)
    assert first["scores"] == "zero-out"
    assert all(difference(first, other) == 0 for other in others)
    expected = alone(method, STEPS, ranks, model=gated(), options=WATCHED)
    assert difference(first, expected) < 2e-6
    assert first["stats"] == expected["stats"]


@pytest.mark.parametrize("ranks", [FOUR], indirect=True)
@pytest.mark.parametrize("case", HYBRID, ids="-".join)
def test_copies_of_shards_make_what_one_process_makes(trained: list[Any], ranks: int, case: Any):
    agree(trained, case, ranks)


# -- memory and communication -----------------------------------------------------------------------------------------


class Wide(Concat):
    """Two weights of some megabytes beside small ones."""

    def __init__(self) -> None:
        super().__init__(
            encoder=lambda n, d: nn.Sequential(nn.Linear(n, 1200), nn.Linear(1200, d)), width=600
        )


def memory(method: str, wrap: Any) -> float:
    """The most bytes that a step had allocated at once, as a part of the largest parameter's."""
    torch.manual_seed(0)
    model = Wide()
    wrap(model)
    monitor = bo.ModalityMonitor(model, model.modalities, head=model.heads)
    optimizer = bo.ModulatedOptimizer(sgd(groups_of(model)), monitor, METHODS[method](), seed=1)
    inputs = [torch.randn(4, n) for n in (5, 6)]
    torch.nn.functional.cross_entropy(model(*inputs), torch.arange(4)).backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        optimizer.step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(accumulate(changes)) / (4 * max(p.numel() for p in model.parameters()))


def test_less_than_a_parameter_is_made_at_a_time(trained: list[Any], ranks: int):
    for rank in trained:
        for case, part in rank["memory"].items():
            assert 0 < part < 0.8, (case, part)


def collectives(rank: int, ranks: int, method: str) -> int:
    """How many collectives a step takes."""
    from torch.distributed.tensor.debug import CommDebugMode

    run = Run(method, shard, rank=rank, ranks=ranks).train(1)
    counts: list[int] = []
    inner = run.optimizer
    mode = CommDebugMode()

    def before(*_: Any) -> None:
        mode.__enter__()

    def after(*_: Any) -> None:
        mode.__exit__(None, None, None)
        counts.append(mode.get_total_counts())

    inner.register_step_pre_hook(before)
    inner.register_step_post_hook(after)
    run.train(1, first=4)
    return counts[0]


def test_collectives_do_not_grow_with_parameters(trained: list[Any]):
    """The sums of the scores; a modality's moments, all tensors together; the norms of all units together.

    AGM scales both modalities, and the weight and the bias of the head.
    """
    counts = {"OPM": 0, "OGM update": 1, "OGM": 2, "OGM-GE": 3, "AGM": 5}
    counts |= {"MLB": 3, "InfoReg": 2, "Fixed": 2, "Dropout": 0, "AMSS": 2, "AMSS+": 2, "all": 4}
    assert all(rank["collectives"] == counts for rank in trained)


# -- when the model is sharded ----------------------------------------------------------------------------------------


def sharded_later(rank: int, ranks: int) -> dict[str, Any]:
    """The monitor first, then the shards, then the optimizer; and the optimizer first."""
    run = Run("OGM-GE", shard, rank=rank, ranks=ranks)
    early = Concat()
    monitor = bo.ModalityMonitor(early, early.modalities, head=early.heads)
    stale = sgd(groups_of(early))
    wrapped = bo.ModulatedOptimizer(sgd(groups_of(early)), monitor)
    shard(early)
    fresh = bo.ModulatedOptimizer(sgd(groups_of(early)), monitor, bo.OGM(0.5), seed=1)
    with pytest.raises(ValueError, match="none of the monitor's model's parameters") as error:
        bo.ModulatedOptimizer(stale, monitor)
    told: dict[str, Any] = {"stale": str(error.value)}
    run.model, run.caller, run.monitor, run.optimizer = early, early, monitor, fresh
    run.backward(run.part(0, slice(None), None))
    with pytest.warns(UserWarning, match="no parameter of this optimizer has a gradient"):
        wrapped.step()
    fresh.step()
    told["modulated"] = fresh.stats()["modulated"]
    return told


def test_the_order_of_monitor_shards_and_optimizer(trained: list[Any], ranks: int):
    for rank in trained:
        assert "after `fully_shard`" in rank["later"]["stale"]
        assert rank["later"]["modulated"] == 1
