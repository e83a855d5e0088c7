"""An interrupt or an error at any line of a pass, a replay or a diagnosis leaves the model as it was."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import balanceopt as bo
from tests.interrupts import differences, first_and_last, interrupted, lines_of, shape_of
from tests.models import Concat, Gated, Multimodal, SumHeads, batch, batch_norm

# Where something of the user's is changed for a while.
SWAPPING = (
    "_undo.py",
    "_replay.py",
    "_zero_out.py",
    "_per_head.py",
    "_split.py",
    "_features.py",
)
KINDS = pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError])


class Keeping(Gated):
    """A gated fusion that keeps much of its forward, in eval mode too."""

    def __init__(self) -> None:
        super().__init__(encoder=batch_norm)
        self.rows: torch.Tensor
        self.register_buffer("rows", torch.zeros(1))
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.2)
        self.recent = deque([0], maxlen=2)
        self.counts = {"calls": [0]}

    def fuse(self, features):
        self.counts["calls"][0] += 1
        self.rows += 1
        self.recent.append(self.counts["calls"][0])
        self.mean = features[0].mean()
        return super().fuse([self.drop(self.norm(z)) for z in features])


class Case(NamedTuple):
    model: Multimodal
    run: Callable[[], Any]
    keeps: Any


def train(model, monitor, *extra):
    inputs, labels = batch(8)
    scores = monitor.scores()

    def run():
        loss = F.cross_entropy(model(*inputs), labels)
        loss = loss + sum(objective(labels) for objective in extra)
        loss.backward()
        return scores.take()

    return run


def zero_out():
    model = Gated(encoder=batch_norm)
    monitor = bo.ModalityMonitor(model, model.modalities, "head")
    return Case(model, train(model, monitor), monitor)


def drops():
    model = SumHeads()
    monitor = bo.ModalityMonitor(model, model.modalities, model.heads)
    run = train(model, monitor)
    opm = bo.OPM(monitor, q_base=0.9)
    assert run() is not None
    return Case(model, run, opm)


def shared_heads():
    model = SumHeads()
    monitor = bo.ModalityMonitor(model, model.modalities, model.heads)
    train(model, monitor)()
    objective = bo.UnimodalObjective(monitor, 5, heads="shared")
    return Case(model, train(model, monitor, objective), objective)


def parametrized():
    model = Concat()
    spectral_norm(model.head)
    monitor = bo.ModalityMonitor(model, model.modalities, "head")
    return Case(model, train(model, monitor), monitor)


def diagnosis():
    model = Gated(encoder=batch_norm)
    monitor = bo.ModalityMonitor(model, model.modalities, "head")
    inputs, labels = batch(12)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*inputs, labels), 6, shuffle=True, generator=torch.Generator()
    )
    return Case(model, lambda: bo.diagnose(loader, loader, monitor=monitor, seed=0), monitor)


CASES = {f.__name__: f for f in (zero_out, drops, shared_heads, parametrized, diagnosis)}


def damage(case, kind, chosen):
    """What interrupts at the chosen lines have left, by line."""
    assert case.run() is not None
    left = {}
    lines = lines_of(case.run)
    numbers = chosen(lines)
    came = 0
    for number in numbers:
        case.model.zero_grad()
        before = shape_of(case.model)  # a training forward draws nothing here, and changes numbers alone
        came += interrupted(case.run, number, kind)
        changed = differences(before, shape_of(case.model))
        if changed:
            left[lines[number]] = changed
    assert case.run() is not None
    # A run after an interrupted one has some lines fewer; on the way back an error is tried away.
    assert came > (0.95 if kind is KeyboardInterrupt else 0.5) * len(numbers)
    return left


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # OPM tells of forwards that broke off


@pytest.mark.parametrize(
    ("name", "kind"),
    # Of errors, the case with most to take back; all of them at any line below.
    [*((name, KeyboardInterrupt) for name in CASES), ("diagnosis", MemoryError)],
)
def test_nothing_is_left_of_an_interrupt(name, kind):
    left = damage(CASES[name](), kind, partial(first_and_last, files=SWAPPING))
    assert not left


@pytest.mark.slow
@pytest.mark.timeout(3600)
@KINDS
@pytest.mark.parametrize("name", CASES)
def test_nothing_is_left_of_an_interrupt_at_any_line(name, kind):
    left = damage(CASES[name](), kind, lambda lines: range(len(lines)))
    assert not left


@KINDS
def test_what_the_fusion_keeps_is_that_of_its_own_forwards(kind):
    model = Keeping()
    monitor = bo.ModalityMonitor(model, model.modalities, "head")
    run = train(model, monitor)
    assert run() is not None
    lines = lines_of(run)
    before = 2
    for number in first_and_last(lines, SWAPPING):
        interrupted(run, number, kind)
        (calls,) = model.counts["calls"]
        assert calls - before in (0, 1), lines[number]
        assert model.rows.item() == calls
        assert list(model.recent) == [calls - 1, calls]
        assert model.mean.requires_grad
        before = calls
