"""Checkpoints: train 2k steps = train k, save, load in a new process, train k; bit for bit, with noise."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import balanceopt as bo
from tests.models import watch
from tests.training import batch, batches, groups_of, modulated, same_bits, sgd, small_model, train

ROOT = Path(__file__).parents[3]

MAKE = """[
    (bo.OGM(0.5), lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9)),
    (bo.OGM(0.5, apply_to="update", start=2, end=4), lambda groups: torch.optim.AdamW(groups, lr=0.01)),
]"""
RESUME = f"""
import sys, torch, balanceopt as bo
from tests.training import batches, modulated, train
torch.set_num_threads(1)
after = []
for given, saved in zip({MAKE}, torch.load(sys.argv[1], weights_only=True)):
    model, optimizer = modulated(*given, seed=99)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(model, optimizer, batches(model, 3, first=3))
    after.append(model.state_dict())
torch.save(after, sys.argv[2])
"""


def test_in_a_new_process(tmp_path: Path):
    models, saved = [], []
    for given in eval(MAKE, {"torch": torch, "bo": bo}):
        model, optimizer = modulated(*given)
        train(model, optimizer, batches(model, 3))
        saved.append(copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()}))
        train(model, optimizer, batches(model, 3, first=3))
        models.append(model)
    torch.save(saved, tmp_path / "saved.pt")

    command = [sys.executable, "-c", RESUME, str(tmp_path / "saved.pt"), str(tmp_path / "after.pt")]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    for model, after in zip(models, torch.load(tmp_path / "after.pt", weights_only=True), strict=True):
        resumed = small_model()
        resumed.load_state_dict(after)
        assert same_bits(model, resumed)


def reloaded(optimizer: torch.optim.Optimizer, path: Path) -> Any:
    torch.save(optimizer.state_dict(), path)
    return torch.load(path, weights_only=True)


def test_with_hooks(tmp_path: Path):
    model = small_model()
    base = sgd(groups_of(model), momentum=0.9)
    bo.attach(base, watch(model), bo.OGM(0.5), seed=1)
    train(model, base, batches(model, 3))
    twin = small_model()
    twin.load_state_dict(model.state_dict())
    other = sgd(groups_of(twin), momentum=0.9)
    bo.attach(other, watch(twin), bo.OGM(0.5), seed=2)
    other.load_state_dict(reloaded(base, tmp_path / "saved.pt"))
    train(model, base, batches(model, 3, first=3))
    train(twin, other, batches(twin, 3, first=3))
    assert same_bits(model, twin)


def test_between_wrapper_and_hooks(tmp_path: Path):
    model, optimizer = modulated(bo.OGM(0.5))
    train(model, optimizer, batches(model, 3))
    twin = small_model()
    twin.load_state_dict(model.state_dict())
    base = sgd(groups_of(twin))
    bo.attach(base, watch(twin), bo.OGM(0.5))
    base.load_state_dict(reloaded(optimizer, tmp_path / "saved.pt"))
    train(model, optimizer, batches(model, 3, first=3))
    train(twin, base, batches(twin, 3, first=3))
    assert same_bits(model, twin)


def test_a_bare_checkpoint_warns_and_starts_anew():
    model, optimizer = modulated(make=lambda groups: sgd(groups, momentum=0.9))
    bare = sgd(groups_of(model), momentum=0.9)
    train(model, bare, batches(model, 2))
    train(model, optimizer, batches(model, 2))
    with pytest.warns(
        UserWarning, match=r"bare optimizer's state: it is loaded, and .* start anew"
    ) as warned:
        optimizer.load_state_dict(bare.state_dict())
    assert warned[0].filename == __file__
    assert optimizer.param_groups[0]["balanceopt_step"] == 0
    assert optimizer.param_groups[0]["balanceopt_seed"] == 7
    buffers = [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
    assert all(
        torch.equal(b, bare.state[p]["momentum_buffer"])
        for b, p in zip(buffers, model.parameters(), strict=True)
    )
    train(model, optimizer, batches(model, 1))
    assert optimizer.stats()["modulated"] == 3


@pytest.mark.parametrize(("given", "kept"), [(None, 7), (3, 3), (0, 0)])
def test_wrapped_again_it_counts_on_and_a_seed_that_is_given_wins(given: int | None, kept: int):
    model, optimizer = modulated(bo.OGM(0.5))
    train(model, optimizer, batches(model, 2))
    again = bo.ModulatedOptimizer(optimizer.remove(keep_state=True), watch(model), bo.OGM(0.5), seed=given)
    train(model, again, batches(model, 1))
    assert {group["balanceopt_seed"] for group in again.param_groups} == {kept}
    assert {group["balanceopt_step"] for group in again.param_groups} == {3}


def trained_bare(steps: int) -> dict[str, Any]:
    """A bare AdamW's state, in which a loader has filled in the keys that it lacked."""
    model = small_model()
    optimizer = torch.optim.AdamW(groups_of(model), lr=0.01)
    for p in model.parameters():  # as torch.distributed.checkpoint does, so that there is a state
        p.grad = torch.zeros_like(p)
    optimizer.step()
    train(model, optimizer, batches(model, steps))
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group |= {"balanceopt_step": 0, "balanceopt_seed": 7, "balanceopt_epoch": None}
    return state


def test_a_trained_state_that_was_never_counted_is_a_bare_one():
    model, optimizer = modulated(make=lambda groups: torch.optim.AdamW(groups, lr=0.01))
    with pytest.warns(UserWarning, match=r"taken for a bare optimizer's, and steps count from 0"):
        optimizer.load_state_dict(trained_bare(1))
    train(model, optimizer, batches(model, 1))
    assert optimizer.param_groups[0]["balanceopt_step"] == 1


def test_a_checkpoint_from_before_the_first_step_is_none():
    _, optimizer = modulated(make=lambda groups: torch.optim.AdamW(groups, lr=0.01))
    optimizer.load_state_dict(trained_bare(0))


def test_a_bare_optimizer_loads_ours():
    model, optimizer = modulated(make=lambda groups: sgd(groups, momentum=0.9))
    train(model, optimizer, batches(model, 2))
    bare = sgd(groups_of(model), momentum=0.9)
    bare.load_state_dict(optimizer.state_dict())
    train(model, bare, batches(model, 1))


def test_tags_lost_in_a_checkpoint_are_put_back():
    model, optimizer = modulated()
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        del group["modality"]
    optimizer.load_state_dict(state)
    assert [group["modality"] for group in optimizer.param_groups] == ["audio", "visual", None]
    train(model, optimizer, batches(model, 1))
    assert optimizer.stats()["modulated"] == 1


def test_tags_of_another_optimizer_are_not_taken_over():
    model, optimizer = modulated()
    swapped = optimizer.state_dict()
    for group, tag in zip(swapped["param_groups"], ["visual", "audio", "smell"], strict=True):
        group["modality"] = tag
    optimizer.load_state_dict(swapped)
    assert [group["modality"] for group in optimizer.param_groups] == ["audio", "visual", None]
    untagged = bo.ModulatedOptimizer(sgd([{"params": g["params"]} for g in groups_of(model)]), watch(model))
    untagged.load_state_dict(swapped)
    assert all("modality" not in group for group in untagged.param_groups)


def test_loading_on_the_base_keeps_the_wrapper_going():
    model, optimizer = modulated(bo.OGM(0.5))
    train(model, optimizer, batches(model, 2))
    optimizer.optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, batches(model, 2))
    assert optimizer.param_groups[0]["balanceopt_step"] == 4
    assert optimizer.stats()["modulated"] == 4


def test_pending_scores_do_not_survive_a_load():
    model, optimizer = modulated()
    train(model, optimizer, batches(model, 1))
    state = optimizer.state_dict()
    inputs, labels = batch(1, model)
    torch.nn.functional.cross_entropy(model(*inputs), labels).backward()
    optimizer.load_state_dict(state)
    with pytest.warns(UserWarning, match="no scores"):
        optimizer.step()


def test_epochs_are_kept():
    _, optimizer = modulated(bo.OGM(0.5, start=3, unit="epoch"))
    optimizer.set_epoch(3)
    again, other = modulated(bo.OGM(0.5, start=3, unit="epoch"))
    other.load_state_dict(optimizer.state_dict())
    train(again, other, batches(again, 1))
    assert other.stats()["modulated"] == 1


def test_the_state_is_plain_numbers():
    _, optimizer = modulated()
    optimizer.set_epoch(2)
    (group, *_) = optimizer.state_dict()["param_groups"]
    own = {key: value for key, value in group.items() if key.startswith("balanceopt_")}
    assert own == {
        "balanceopt_step": 0,
        "balanceopt_seed": 7,
        "balanceopt_epoch": 2,
        "balanceopt_methods": None,
    }


def test_the_seed_is_read_at_construction():
    torch.manual_seed(123)
    _, optimizer = modulated(seed=None)  # type: ignore[arg-type]
    torch.manual_seed(5)
    assert optimizer.param_groups[0]["balanceopt_seed"] == 123


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, 2**80])
def test_any_integer_is_a_seed(seed: int):
    model, optimizer = modulated(bo.OGM(0.5), seed=seed)
    train(model, optimizer, batches(model, 1))
    optimizer.load_state_dict(optimizer.state_dict())
    assert 0 <= optimizer.param_groups[0]["balanceopt_seed"] < 2**63
