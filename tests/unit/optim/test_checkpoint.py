"""torch.distributed.checkpoint on the wrapper and on the hook form, in a single process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

import balanceopt as bo
from tests.models import watch
from tests.training import backward, batch, batches, groups_of, same_bits, sgd, small_model, train

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is .*uninitialized")

BASES = {
    "sgd": sgd,
    "momentum": lambda groups: sgd(groups, momentum=0.9),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01),
}
every_base = pytest.mark.parametrize("make", BASES.values(), ids=BASES)
LAYOUTS = {"nested": StateDictOptions(), "flat": StateDictOptions(flatten_optimizer_state_dict=True)}


def wrapped(make: Any, modulation: bo.OGM | None = None) -> Any:
    model = small_model()
    chosen = bo.OGM(0.5, start=2) if modulation is None else modulation
    return model, bo.ModulatedOptimizer(make(groups_of(model)), watch(model), chosen, seed=1)


def hooked(make: Any) -> Any:
    model = small_model()
    base = make(groups_of(model))
    bo.attach(base, watch(model), bo.OGM(0.5, start=2), seed=1)
    return model, base


@every_base
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", [wrapped, hooked])
def test_resumes_bit_for_bit(make: Any, layout: str, form: Any, tmp_path: Path):
    model, optimizer = form(make)
    train(model, optimizer, batches(model, 3))
    optimizer.zero_grad()
    save({"o": get_optimizer_state_dict(model, optimizer, options=LAYOUTS[layout])}, checkpoint_id=tmp_path)

    twin, other = form(make)
    twin.load_state_dict(model.state_dict())
    state = {"o": get_optimizer_state_dict(twin, other, options=LAYOUTS[layout])}
    assert other.param_groups[0]["balanceopt_step"] == 0  # torch takes a step to make the state
    load(state, checkpoint_id=tmp_path)
    set_optimizer_state_dict(twin, other, state["o"], options=LAYOUTS[layout])
    assert other.param_groups[0]["balanceopt_step"] == 3
    train(model, optimizer, batches(model, 3, first=3))
    train(twin, other, batches(twin, 3, first=3))
    assert same_bits(model, twin)


@every_base
def test_making_the_state_uses_no_scores_and_does_not_count(make: Any):
    model, optimizer = wrapped(make, bo.OGM(0.5))
    get_optimizer_state_dict(model, optimizer)
    assert optimizer.param_groups[0]["balanceopt_step"] == 0
    assert optimizer.stats()["modulated"] == optimizer.stats()["without_scores"] == 0
    backward(model, batch(0, model))
    get_optimizer_state_dict(model, optimizer)
    optimizer.step()
    assert optimizer.stats()["modulated"] == 1


@every_base
def test_making_the_state_leaves_no_noise_in_it(make: Any):
    model, optimizer = wrapped(make)
    state: Any = get_optimizer_state_dict(model, optimizer)
    tensors = [v for own in state["state"].values() for k, v in own.items() if k != "step"]
    assert not any(bool(t.any()) for t in tensors)


@pytest.mark.parametrize(
    "method",
    [
        lambda: bo.OGM(0.5, start=1, unit="epoch"),
        lambda: bo.FixedModulation({"audio": 0.5}, start=1, unit="epoch"),  # needs no scores
    ],
)
def test_the_epoch_comes_along_flattened(tmp_path: Path, method: Any):
    def start() -> Any:
        model = small_model()
        optimizer = bo.ModulatedOptimizer(sgd(groups_of(model)), watch(model), method(), seed=1)
        return model, optimizer

    model, optimizer = start()
    optimizer.set_epoch(2)
    train(model, optimizer, batches(model, 4))
    optimizer.zero_grad()
    state = {"o": get_optimizer_state_dict(model, optimizer, options=LAYOUTS["flat"])}
    save(state, checkpoint_id=tmp_path)
    twin, other = start()
    twin.load_state_dict(model.state_dict())
    state = {"o": get_optimizer_state_dict(twin, other, options=LAYOUTS["flat"])}
    load(state, checkpoint_id=tmp_path)
    set_optimizer_state_dict(twin, other, state["o"], options=LAYOUTS["flat"])
    assert other.param_groups[0]["balanceopt_epoch"] == 2
    train(model, optimizer, batches(model, 4, first=4))
    train(twin, other, batches(twin, 4, first=4))
    assert same_bits(model, twin)
