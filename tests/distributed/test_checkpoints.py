"""torch.distributed.checkpoint over ranks: every method goes on bit for bit, in new processes or fewer of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_files
from torch.distributed.checkpoint.state_dict_saver import save as save_files
from torch.nn.parallel import DistributedDataParallel

import balanceopt as bo
from tests.parallel import DROPPING, METHODS, Run, difference, shard
from tests.ranks import SHARDS, on_ranks

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.timeout(240),
    pytest.mark.filterwarnings("ignore:torch.distributed is .*uninitialized"),
]

FIRST, MORE, SEED = 5, 5, 5
WRAPS: dict[str, Any] = {"ddp": DistributedDataParallel, "shard": shard, "alone": lambda model: model}
FORMATS = {
    "sharded": StateDictOptions(),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
    "full": StateDictOptions(full_state_dict=True, cpu_offload=True),
}
# What is saved depends on the method, how it is cut and named on the format: a method of each kind in all of them.
KINDS = ("OGM-GE", "AGM", "InfoReg", "OPM", "all")
CASES = [
    *(("shard", "sharded", method) for method in METHODS),
    *(("shard", how, method) for how in ("flat", "full") for method in KINDS),
    *(("ddp", "sharded", method) for method in KINDS),
]
CASES = [case for case in CASES if SHARDS or case[0] != "shard"]
ACROSS = [case for case in CASES if case[1] != "full"]


def started(wrap: str, method: str, rank: int, ranks: int, seed: int = SEED) -> Run:
    return Run(method, WRAPS[wrap], rank=rank, ranks=ranks, seed=seed)


def state_of(run: Run, how: str) -> dict[str, Any]:
    model, optimizer = get_state_dict(run.model, run.optimizer, options=FORMATS[how])
    state: dict[str, Any] = {"model": model, "optimizer": optimizer}
    if run.modulator is not None:
        state["opm"] = run.modulator.state_dict()
    return state


def save(run: Run, how: str, folder: Path) -> None:
    run.optimizer.zero_grad()
    if isinstance(run.modulator, bo.OPM):
        run.modulator.update()  # the ranks' scores of the last pass become one q
    state = state_of(run, how)
    if how != "full":
        save_files(state, checkpoint_id=folder)
    elif dist.get_rank() == 0:
        torch.save(state, folder)


def load(run: Run, how: str, folder: Path) -> None:
    if how == "full":
        state = torch.load(folder, weights_only=True)
    else:
        state = state_of(run, how)
        load_files(state, checkpoint_id=folder)
    set_state_dict(
        run.model,
        run.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=FORMATS[how],
    )
    if run.modulator is not None:
        run.modulator.load_state_dict(state["opm"])


def name(case: tuple[str, str, str]) -> str:
    return "-".join(case).replace(" ", "_")


def train_and_save(rank: int, folder: Path, ranks: int) -> dict[Any, Any]:
    told = {}
    for case in CASES:
        wrap, how, method = case
        run = started(wrap, method, rank, ranks).train(FIRST)
        save(run, how, folder / name(case))
        saved = run.told()
        told[case] = saved, run.train(MORE, first=FIRST).told()
    return told


def load_and_train(
    rank: int, folder: Path, ranks: int, cases: list[tuple[str, str, str]], cut: int
) -> dict[Any, Any]:
    told = {}
    for case in cases:
        wrap, how, method = case
        run = started(wrap if ranks > 1 else "alone", method, rank, ranks, seed=99)
        run.alone_for = cut
        load(run, how, folder / name(case))
        assert run.optimizer.param_groups[0].get("balanceopt_step", FIRST) == FIRST
        loaded = run.told()
        told[case] = loaded, run.train(MORE, first=FIRST).told()
    return told


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = Path(tmp_path_factory.mktemp("checkpoints"))
    return folder, on_ranks(train_and_save, folder, folder, 2)


@pytest.fixture(scope="module")
def resumed(saved: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return on_ranks(load_and_train, tmp_path_factory.mktemp("resumed"), saved[0], 2, CASES, 2, fresh=True)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_new_processes_go_on_bit_for_bit(saved: Any, resumed: Any, case: Any):
    for before, after in zip(saved[1], resumed, strict=True):
        assert difference(before[case][0], after[case][0]) == 0
        assert difference(before[case][1], after[case][1]) == 0


def close(case: Any, saved: Any, resumed: Any) -> None:
    """Loaded is exactly what was saved; what follows, sums of the same samples in another order."""
    assert difference(saved[0][case][0], resumed[0][case][0]) == 0
    if case[2] not in DROPPING:  # each rank drops features of its own samples
        assert difference(saved[0][case][1], resumed[0][case][1]) < 2e-6


@pytest.fixture(scope="module")
def on_four(saved: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return on_ranks(load_and_train, tmp_path_factory.mktemp("four"), saved[0], 4, ACROSS, 2, ranks=4)


@pytest.mark.slow
@pytest.mark.timeout(480)
@pytest.mark.parametrize("case", ACROSS, ids=name)
def test_four_processes_go_on_where_two_were(saved: Any, on_four: Any, case: Any):
    close(case, saved[1], on_four)
    for other in on_four[1:]:
        assert difference(on_four[0][case][1], other[case][1]) == 0


def test_one_process_goes_on_where_two_were(saved: Any):
    resumed = [load_and_train(0, saved[0], 1, ACROSS, 2)]
    for case in ACROSS:
        close(case, saved[1], resumed)
