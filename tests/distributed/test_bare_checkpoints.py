"""Distributed checkpoints of a bare optimizer into the wrapped one and back: training goes on from them bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_files
from torch.distributed.checkpoint.state_dict_saver import save as save_files

import balanceopt as bo
from tests.parallel import Run, difference, shard
from tests.ranks import needs_shards, on_ranks

pytestmark = [needs_shards, pytest.mark.distributed, pytest.mark.timeout(240)]

FIRST, MORE, SEED = 5, 5, 5
FORMATS = {
    "sharded": StateDictOptions(),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
    "full": StateDictOptions(full_state_dict=True, cpu_offload=True),
}


def started(method: str, rank: int) -> Run:
    return Run(method, shard, rank=rank, ranks=2, seed=SEED)


def wrap(run: Run) -> Run:
    run.optimizer = bo.ModulatedOptimizer(run.optimizer, run.monitor, bo.OGM(0.5), seed=SEED)
    return run


def unwrap(run: Run) -> Run:
    assert isinstance(run.optimizer, bo.ModulatedOptimizer)
    run.optimizer = run.optimizer.optimizer
    return run


def save(run: Run, how: str, file: Path) -> None:
    run.optimizer.zero_grad()
    model, optimizer = get_state_dict(run.model, run.optimizer, options=FORMATS[how])
    state = {"model": model, "optimizer": optimizer}
    if how != "full":
        save_files(state, checkpoint_id=file)
    elif dist.get_rank() == 0:
        torch.save(state, file)
    dist.barrier()


def load(run: Run, how: str, file: Path, *, allow: bool = False, without: str | None = None) -> Run:
    """Load as torch's documentation does.

    Args:
        run: to load into.
        how: the format.
        file: where it was saved.
        allow: keys that files lack stay as they are.
        without: keys of a full state's groups that begin so are left out.
    """
    if how == "full":
        state = torch.load(file, weights_only=True)
    else:
        model, optimizer = get_state_dict(run.model, run.optimizer, options=FORMATS[how])
        state = {"model": model, "optimizer": optimizer}
        load_files(state, checkpoint_id=file, planner=DefaultLoadPlanner(allow_partial_load=allow))
    if how == "full" and without is not None and isinstance(run.optimizer, torch.optim.SGD):
        for group in state["optimizer"]["param_groups"]:
            for key in [key for key in group if key.startswith(without)]:
                del group[key]
    set_state_dict(
        run.model,
        run.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=FORMATS[how],
    )
    return run


def outcome(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What training told and the warnings on the way, or the error that loading ended with."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            told = work()
        except (KeyError, CheckpointException) as error:
            return {"error": str(error)}
    return {**told, "warnings": [str(one.message) for one in caught]}


def go_on(run: Run) -> dict[str, Any]:
    counted = run.optimizer.param_groups[0].get("balanceopt_step")
    return {**run.train(MORE, first=FIRST).told(), "counted": counted}


def both_ways(rank: int, folder: Path) -> dict[Any, Any]:
    told: dict[Any, Any] = {}
    for how in FORMATS:
        bare = started("bare", rank).train(FIRST)
        save(bare, how, folder / f"bare {how}")
        told["never saved", "wrapped", how] = go_on(wrap(bare))
        wrapped = started("OGM-GE", rank).train(FIRST)
        save(wrapped, how, folder / f"wrapped {how}")
        told["never saved", "bare", how] = go_on(unwrap(wrapped))
        for kind, options in {"plain": {}, "helped": {"allow": True, "without": "balanceopt_"}}.items():
            told[kind, "wrapped", how] = outcome(
                partial(resumed, "OGM-GE", rank, how, folder / f"bare {how}", options)
            )
            told[kind, "bare", how] = outcome(
                partial(resumed, "bare", rank, how, folder / f"wrapped {how}", options)
            )
    return told


def resumed(method: str, rank: int, how: str, file: Path, options: dict[str, Any]) -> dict[str, Any]:
    return go_on(load(started(method, rank), how, file, **options))


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each rank told."""
    return on_ranks(both_ways, tmp_path_factory.mktemp("ranks"), Path(tmp_path_factory.mktemp("files")))


@pytest.mark.parametrize("how", FORMATS)
def test_a_bare_checkpoint_trains_on_wrapped_and_says_that_it_counts_anew(told: list[Any], how: str):
    for rank in told:
        loaded = rank["helped", "wrapped", how]
        assert difference(loaded, rank["never saved", "wrapped", how]) == 0
        assert loaded["counted"] == 0
        assert loaded["stats"]["modulated"] == MORE
        assert [one for one in loaded["warnings"] if "taken for a bare optimizer's" in one]


@pytest.mark.parametrize("how", FORMATS)
def test_a_wrapped_checkpoint_trains_on_bare(told: list[Any], how: str):
    for rank in told:
        loaded = rank["helped", "bare", how]
        assert difference(loaded, rank["never saved", "bare", how]) == 0
        assert loaded["counted"] is None


def test_torch_itself_asks_for_every_key_that_the_optimizer_has(told: list[Any]):
    for rank in told:
        for how in ("sharded", "flat"):
            assert "Missing key in checkpoint state_dict" in rank["plain", "wrapped", how]["error"]
            assert "balanceopt_" in rank["plain", "wrapped", how]["error"]
            assert "error" not in rank["plain", "bare", how]
        assert "error" not in rank["plain", "wrapped", "full"]
        assert "balanceopt_step" in rank["plain", "bare", "full"]["error"]
