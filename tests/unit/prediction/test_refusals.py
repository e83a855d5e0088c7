"""What OPM refuses, or takes without a false alarm: fusions that can't take zeros, company, broken-off forwards."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import balanceopt as bo
from tests.models import Concat, batch, watch


class Normed(Concat):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def fuse(self, features):
        return super().fuse([self.norm(z) for z in features])


def train(model, optimizer, steps):
    for _ in range(steps):
        inputs, labels = batch(32)
        optimizer.zero_grad()
        F.cross_entropy(model(*inputs), labels).backward()
        optimizer.step()


def always(features):
    """Scores of which the first modality's are the larger ones."""
    sure, unsure = torch.zeros(32, 5), torch.zeros(32, 5)
    sure[:] = 5 * F.one_hot(batch(32)[1], 5)
    return dict(zip(features, (sure, unsure), strict=True))


@pytest.mark.parametrize(
    "norm", [lambda z: z / z.norm(dim=1, keepdim=True), lambda z: z / z.sum(1, keepdim=True)]
)
def test_a_fusion_that_divides_by_a_norm_is_refused_before_any_weight_is_lost(norm):
    model = Normed(norm)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, scores=always) as monitor, bo.OPM(monitor, q_base=0.8, seed=0):
        train(model, optimizer, 1)
        with pytest.raises(RuntimeError, match=r"OPM dropped features.*divides features by their norm"):
            train(model, optimizer, 1)
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_norm_with_an_eps_takes_zeros():
    model = Normed(lambda z: F.normalize(z, dim=1))
    with watch(model, scores=always) as monitor, bo.OPM(monitor, q_base=0.8, seed=0) as modulator:
        train(model, torch.optim.SGD(model.parameters(), 0.1), 4)
        assert modulator.stats()["dropping"] == 3
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_that_comes_in_is_not_laid_at_the_door_of_zeros(value):
    model = Normed(lambda z: F.normalize(z, dim=1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, scores=always) as monitor, bo.OPM(monitor, q_base=0.8, seed=0) as modulator:
        train(model, optimizer, 1)
        inputs, labels = batch(32)
        inputs[0][:5] = value
        F.cross_entropy(model(*inputs), labels).backward()
        optimizer.zero_grad()
        assert modulator.stats()["dropping"] == 1
        model.norm = lambda z: z / z.norm(dim=1, keepdim=True)  # looked at still
        with pytest.raises(RuntimeError, match="OPM dropped features"):
            train(model, optimizer, 1)


def test_weights_that_are_nan_are_not_laid_at_the_door_of_zeros():
    model = Concat()
    with watch(model, scores=always) as monitor, bo.OPM(monitor, q_base=0.8, seed=0) as modulator:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        train(model, optimizer, 1)
        model.head.weight.data.fill_(torch.nan)
        train(model, optimizer, 1)
        assert modulator.stats()["dropping"] == 1


class BreaksOff(nn.Module):
    breaks = False

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        if self.breaks:
            raise KeyError("the loader's fault")
        return self.inner(x)


def test_a_forward_that_broke_off_between_encoders_is_no_missing_modality():
    model = Concat(encoder=lambda inputs, width: BreaksOff(nn.Linear(inputs, width)))
    with watch(model, scores=always) as monitor, bo.OPM(monitor, q_base=0.8, seed=0):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        train(model, optimizer, 2)
        encoder: Any = model.encoders["visual"]
        encoder.breaks = True
        with pytest.raises(KeyError):
            train(model, optimizer, 1)
        encoder.breaks = False
        train(model, optimizer, 2)  # a warning would be an error


def test_two_on_the_same_model_are_refused_while_both_live():
    model = Concat()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    first = bo.OPM(watch(model), seed=0)
    train(model, optimizer, 1)
    second = bo.OPM(watch(model), seed=0)
    with pytest.raises(RuntimeError, match=r"another OPM.*Call remove"):
        train(model, optimizer, 1)
    first.remove()
    train(model, optimizer, 2)
    assert second.stats()["forwards"] == 2


@pytest.mark.parametrize("collects", [True, False])
def test_a_cell_that_is_run_again_has_one_set_of_hooks(collects):
    model = Concat()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    gc.collect()
    gc.enable() if collects else gc.disable()
    try:
        for _ in range(3):
            monitor = watch(model)
            modulator = bo.OPM(monitor, seed=0)
            objective = bo.UnimodalObjective(monitor, 5, heads="shared", inject=True)
            train(model, optimizer, 2)
    finally:
        gc.enable()
    assert modulator.stats()["forwards"] == 2
    assert objective.inject
    assert len(model._forward_hooks) == 1


def test_two_injected_objectives_on_the_same_model_are_refused():
    model = Concat()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    first = bo.UnimodalObjective(watch(model), 5, inject=True)
    second = bo.UnimodalObjective(watch(model), 5, inject=True)
    with pytest.raises(RuntimeError, match=r"another UnimodalObjective.*Call remove"):
        train(model, optimizer, 1)
    first.remove()
    train(model, optimizer, 1)
    second.remove()
