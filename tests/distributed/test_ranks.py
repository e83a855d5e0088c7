"""Every method under DistributedDataParallel: ranks stay the same, and make what one process makes of their batches."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import balanceopt as bo
from tests.parallel import (
    DROPPING,
    METHODS,
    MayLack,
    Part,
    Run,
    alone,
    counting_collectives,
    difference,
    gated,
)
from tests.ranks import on_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]

LONG, SHORT = 60, 12
WATCHED = {"start": 10**6}  # q follows the scores, and nothing is dropped
ZERO_OUT = ("OGM-GE", "AMSS", "OPM", "all")


def ddp(model: torch.nn.Module) -> DistributedDataParallel:
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def run(rank: int, ranks: int, method: str, **options: Any) -> Run:
    return Run(method, ddp, rank=rank, ranks=ranks, **options)


def train_all(rank: int, ranks: int) -> dict[str, Any]:
    told: dict[Any, Any] = {}
    for method in METHODS:
        told["long", method] = run(rank, ranks, method, seed=None).train(LONG).told()
        told["short", method] = run(rank, ranks, method, options=WATCHED).train(SHORT).told()
    for method in ZERO_OUT:
        training = run(rank, ranks, method, model=gated(), options=WATCHED).train(SHORT)
        told["zero-out", method] = {**training.told(), "scores": training.monitor.stats()["scores"]}
    told["collectives"] = {method: collectives(run(rank, ranks, method)) for method in METHODS}
    told["group"] = in_pairs(rank, ranks)
    for method in ("OGM", "OPM"):
        told["no group", method] = run(rank, ranks, method, monitor={"group": False}).train(SHORT).told()
    told["joined"] = joined(rank, ranks)
    told["one more"] = one_more(rank, ranks)
    told["lacking"] = {method: lacking(rank, ranks, method).told() for method in ("OGM-GE", "AMSS", "all")}
    return told


@pytest.fixture(scope="module")
def trained(ranks: int, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each rank told."""
    return on_ranks(train_all, tmp_path_factory.mktemp("ranks"), ranks, ranks=ranks)


@pytest.mark.parametrize("method", METHODS)
def test_ranks_are_the_same_bit_for_bit_after_many_steps(trained: list[Any], ranks: int, method: str):
    first, *others = (rank["long", method] for rank in trained)
    assert first["stats"].get("modulated", LONG) == LONG
    for other in others:
        assert difference(first, other) == 0
        assert torch.equal(first["q"], other["q"])


@pytest.mark.parametrize("method", METHODS)
def test_ranks_make_what_one_process_makes(trained: list[Any], ranks: int, method: str):
    expected = alone(method, SHORT, ranks, options=WATCHED)
    found = trained[0]["short", method]
    assert difference(found, expected) < 2e-6
    assert found["stats"] == expected["stats"]
    torch.testing.assert_close(found["q"], expected["q"])


@pytest.mark.parametrize("method", ZERO_OUT)
def test_ranks_make_what_one_process_makes_of_a_fusion_that_is_run_again(
    trained: list[Any], ranks: int, method: str
):
    first, *others = (rank["zero-out", method] for rank in trained)
    assert first["scores"] == "zero-out"
    assert all(difference(first, other) == 0 for other in others)
    expected = alone(method, SHORT, ranks, model=gated(), options=WATCHED)
    assert difference(first, expected) < 2e-6
    assert first["stats"] == expected["stats"]
    torch.testing.assert_close(first["q"], expected["q"])


# -- collectives -------------------------------------------------------------------------------------------------


def collectives(training: Run) -> dict[str, Any]:
    """What balanceopt sends in a step that accumulates two micro-batches, and outside of the step."""
    training.train(3)
    sent: dict[str, Any] = {}
    with counting_collectives() as calls:

        def before(*_: Any) -> None:
            sent["forward and backward"] = list(calls)
            calls.clear()

        training.optimizer.register_step_pre_hook(before)
        training.train(1, first=3)
    return {**sent, "step": list(calls)}


@pytest.mark.parametrize("method", METHODS)
def test_one_small_collective_a_step(trained: list[Any], ranks: int, method: str):
    sums = ("all_reduce", 4 * 2 + 5)  # four sums for each of two modalities, counts of five classes
    for rank in trained:
        sent = rank["collectives"][method]
        assert sent["step"] == ([] if method in ("OPM", "Dropout", "Fixed") else [sums])
        twice = DROPPING.get(method) is bo.OPM  # in two forwards
        assert sent["forward and backward"] == ([sums] * 2 if twice else [])


# -- groups ------------------------------------------------------------------------------------------------------


def in_pairs(rank: int, ranks: int) -> dict[str, Any]:
    """Each pair of ranks trains a model of its own, from a seed of its own."""
    pairs = [dist.new_group([first, first + 1]) for first in range(0, ranks, 2)]
    own = pairs[rank // 2]
    training = Run(
        "OGM-GE",
        lambda model: DistributedDataParallel(model, process_group=own),
        rank=rank % 2,
        ranks=2,
        monitor={"group": own},
        seed=rank,
    )
    return training.train(SHORT).told()


def test_a_process_group_of_some_ranks(trained: list[Any], ranks: int):
    told = [rank["group"] for rank in trained]
    for first in range(0, ranks, 2):
        assert difference(told[first], told[first + 1]) == 0
        assert difference(told[first], alone("OGM-GE", SHORT, 2, seed=first)) < 2e-6


def test_without_a_group_each_rank_scores_alone_and_only_opm_keeps_them_the_same(trained: list[Any]):
    ogm, opm = ([rank["no group", method] for rank in trained] for method in ("OGM", "OPM"))
    assert difference(ogm[0], ogm[-1]) > 0
    assert difference(opm[0], opm[-1]) == 0
    assert not torch.equal(opm[0]["q"], opm[-1]["q"])


# -- a modality that a rank does not run --------------------------------------------------------------------------


def without_visual(number: int, given: Part) -> Part:
    inputs, labels, _ = given
    return [inputs[0], torch.zeros(len(labels), 0)], labels, {}


def lacking(rank: int, ranks: int, method: str) -> Run:
    """The last rank never runs an encoder."""
    torch.manual_seed(1)
    training = Run(
        method,
        lambda model: DistributedDataParallel(model, find_unused_parameters=True),
        rank=rank,
        ranks=ranks,
        model=MayLack(),
    )
    is_last = rank == ranks - 1
    part = training.part

    def own_part(number: int, rows: slice, fate: Any) -> Part:
        given = part(number, rows, None)
        return without_visual(number, given) if is_last else (*given[:2], {})

    training.part = own_part  # type: ignore[method-assign]
    return training.train(SHORT)


@pytest.mark.parametrize("method", ["OGM-GE", "AMSS", "all"])
def test_a_rank_that_never_runs_an_encoder(trained: list[Any], ranks: int, method: str):
    first, *others = (rank["lacking"][method] for rank in trained)
    assert first["stats"]["modulated"] == SHORT
    assert all(difference(first, other) == 0 for other in others)


# -- ranks that step a different number of times ---------------------------------------------------------------------


def joined(rank: int, ranks: int) -> str:
    """What a step under `DistributedDataParallel.join()` says, where the last rank has a batch less."""
    training = run(rank, ranks, "OGM-GE")
    with training.caller.join(), pytest.raises(NotImplementedError) as error:
        training.train(2 + (rank < ranks - 1), fate=None)
    return str(error.value)


def one_more(rank: int, ranks: int) -> str:
    """How a step that the last rank does not take ends."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=3))
    training = Run("OGM-GE", rank=rank, ranks=ranks, monitor={"group": group}).train(1)
    message = ""
    if rank < ranks - 1:
        with pytest.raises(RuntimeError) as error:
            training.train(1, first=4)
        message = str(error.value)
    dist.barrier()
    return message


def test_join_is_refused_on_every_rank(trained: list[Any], ranks: int):
    for rank in trained:
        assert "join() is not supported" in rank["joined"]
        assert "the same number of batches" in rank["joined"]


def test_a_step_that_a_rank_does_not_take_ends_with_an_error(trained: list[Any], ranks: int):
    *others, last = (rank["one more"] for rank in trained)
    assert all("Timed out" in message or "timeout" in message.lower() for message in others)
    assert not last
