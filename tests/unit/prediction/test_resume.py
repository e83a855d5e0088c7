"""A resumed run goes on bit for bit: masks, drop probabilities, scores that no forward has used yet."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

import balanceopt as bo
from tests.models import FUSIONS, Concat, watch
from tests.training import groups_of, same_bits, sgd


def batches(count, first=0):
    found = []
    for number in range(first, first + count):
        generator = torch.Generator().manual_seed(number)
        inputs = [torch.randn(8, n, generator=generator) for n in (5, 6)]
        found.append((inputs, torch.randint(5, (8,), generator=generator)))
    return found


class Run:
    """One training, built anew as a new process would."""

    def __init__(self, fusion="concat", *, wrapped=True, **options):
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            self.model = FUSIONS[fusion]()
        watched = watch(self.model)
        self.modulator = bo.OPM(watched, **{"seed": 4, **options})
        self.optimizer: torch.optim.Optimizer = sgd(groups_of(self.model), momentum=0.9)
        if wrapped:
            self.optimizer = bo.ModulatedOptimizer(self.optimizer, watched, bo.OGM(0.5), seed=4)

    def train(self, given):
        for inputs, labels in given:
            torch.manual_seed(int(labels.sum()))  # of the fusion's own dropout
            self.modulator.monitor.observe(labels)
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(*inputs), labels).backward()
            self.optimizer.step()
        return self

    def save(self):
        parts: dict[str, Any] = {
            "model": self.model,
            "optimizer": self.optimizer,
            "modulator": self.modulator,
        }
        file = io.BytesIO()
        torch.save({name: part.state_dict() for name, part in parts.items()}, file)
        return file.getvalue()

    def load(self, saved):
        state = torch.load(io.BytesIO(saved), weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.modulator.load_state_dict(state["modulator"])
        return self


OPTIONS: dict[str, Any] = {
    "plain": {},
    "official": {"rescale": "official", "p_exe": 0.7},
    "every batch": {"q_base": 1.0, "lam": 0.0},  # all of a batch may be gone when the run goes on
    "window": {"start": 2, "end": 7},
}


@pytest.mark.parametrize("wrapped", [True, False], ids=["with OGM-GE", "alone"])
@pytest.mark.parametrize(
    ("options", "fusion"),
    [
        *((options, fusion) for options in OPTIONS for fusion in ("concat", "gated")),
        *(("plain", fusion) for fusion in ("sum", "mlp")),
    ],
)
def test_train_save_load_train_is_train(options, fusion, wrapped):
    options = OPTIONS[options]
    whole = Run(fusion, wrapped=wrapped, **options).train(batches(9))
    assert whole.modulator.stats()["dropping"] > 0
    for cut in (1, 4):
        first = Run(fusion, wrapped=wrapped, **options).train(batches(cut))
        second = Run(fusion, wrapped=wrapped, **{**options, "seed": 99}).load(first.save())
        second.train(batches(9 - cut, cut))
        assert same_bits(whole.model, second.model)
        assert torch.equal(whole.modulator.q, second.modulator.q)


def test_saving_changes_nothing():
    whole, saved = Run().train(batches(6)), Run()
    for one in batches(6):
        saved.train([one]).save()
    assert same_bits(whole.model, saved.model)


def test_the_epoch_is_kept():
    run = Run(start=3, unit="epoch")
    run.modulator.set_epoch(5)
    resumed = Run(start=3, unit="epoch").load(run.train(batches(2)).save())
    resumed.train(batches(1, 2))
    assert resumed.modulator.stats()["dropping"] == 1


def test_a_state_of_other_modalities_is_refused():
    state = Run().modulator.state_dict()
    other = bo.OPM(watch(Concat(3)))
    with pytest.raises(ValueError, match="the state should be of modalities"):
        other.load_state_dict(state)


@pytest.mark.parametrize("entry", Run().modulator.state_dict())
def test_a_load_that_fails_changes_nothing(entry):
    run = Run().train(batches(2))
    before = repr(run.modulator.state_dict())
    state = Run(seed=7).train(batches(3)).modulator.state_dict()
    del state[entry]
    with pytest.raises(KeyError, match=entry):
        run.modulator.load_state_dict(state)
    assert repr(run.modulator.state_dict()) == before


def test_a_layout_that_can_not_be_read_changes_nothing():
    run = Run("gated").train(batches(2))  # whose monitor has chosen zero-out
    state, fresh = run.modulator.state_dict(), Run("gated")
    before = repr(fresh.modulator.state_dict())
    state["layout"]["columns"] = {"audio": [0, 2, 1, 9]}
    with pytest.raises(ValueError, match=r"columns of 'audio' should be \[start, stop\]"):
        fresh.modulator.load_state_dict(state)
    assert repr(fresh.modulator.state_dict()) == before


def test_update_leaves_nothing_pending():
    run = Run().train(batches(2))
    before = run.modulator.q
    run.modulator.update()
    assert run.modulator.state_dict()["pending"] is None
    assert not torch.equal(run.modulator.q, before)


@pytest.mark.filterwarnings("ignore:torch.distributed is .*uninitialized")
def test_distributed_checkpoint(tmp_path):
    run = Run().train(batches(3))
    save({"modulator": run.modulator.state_dict()}, checkpoint_id=tmp_path)
    fresh = Run(seed=99)
    state = {"modulator": fresh.train(batches(1)).modulator.state_dict()}
    load(state, checkpoint_id=tmp_path)
    fresh.modulator.load_state_dict(state["modulator"])
    assert fresh.modulator.state_dict()["seed"] == 4
    assert torch.equal(fresh.modulator.state_dict()["pending"], run.modulator.state_dict()["pending"])
