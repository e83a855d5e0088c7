"""What a step has allocated at its peak, against the model's own tensors: docs/performance.md states it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import balanceopt as bo
from tests.allocations import allocated
from tests.masking import fill_gradients

LARGEST = (1024, 1024)
SHAPES = [LARGEST, *[(512, 600)] * 3, *[(40, 50)] * 30, *[(64,)] * 20]
BYTES = 4 * LARGEST[0] * LARGEST[1]
# Buffers of one chunk, which do not grow with the model: a megabyte, and what is small beside it.
CHUNK = 1.1 * 2**20 / BYTES


class Carrier(nn.Module):
    """An encoder with large parameters, of which the forward uses a small one."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(5, 4)
        self.carried = nn.ParameterList(torch.zeros(shape) for shape in SHAPES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.audio, self.visual = Carrier(), Carrier()
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat([self.audio(x), self.visual(x.flip(0))], 1))


def step(modulation: Any, *, steps: int = 2) -> tuple[float, float]:
    """What the last of some steps had at once, and what the first one has kept: parts of the largest parameter.

    The base is SGD without momentum, which allocates nothing itself.
    """
    torch.manual_seed(0)
    model = Model()
    monitor = bo.ModalityMonitor(model, {"audio": "audio", "visual": "visual"}, head="head")
    base = torch.optim.SGD(bo.modality_groups(model, {"audio": "audio", "visual": "visual"}), lr=0.01)
    optimizer = bo.ModulatedOptimizer(base, monitor, modulation)
    peaks, kept = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(8, 5)), torch.randint(5, (8,))).backward()
        fill_gradients(model.audio.carried), fill_gradients(model.visual.carried)
        peak, left = allocated(optimizer.step)
        peaks.append(peak / BYTES)
        kept.append(left / BYTES)
    return peaks[-1], kept[0]


def test_the_count_sees_what_is_made_and_what_is_kept():
    held = []

    def run() -> None:
        torch.zeros(1000)
        held.append(torch.zeros(500))

    assert allocated(run) == (4000, 2000)


def test_ogm_makes_nothing():
    peak, kept = step(bo.OGM(0.5, noise=False))
    assert peak < 0.01
    assert kept < 0.01


def test_a_scaled_update_takes_a_copy_of_the_slowed_encoder():
    encoder = sum(4 * torch.Size(shape).numel() for shape in SHAPES if len(shape) > 1) / BYTES
    peak, kept = step(bo.OGM(0.5, noise=False, apply_to="update"))
    assert peak < 0.01  # the copy has its place from the first step
    assert kept == pytest.approx(encoder, rel=0.01)


def test_noise_is_made_in_chunks():
    peak, kept = step(bo.OGM(0.5))
    assert peak < CHUNK
    assert kept < 0.01


@pytest.mark.parametrize("scale", ["none", "unbiased", "official"])
def test_amss_makes_numbers_for_units(scale):
    units = 2 * sum(shape[0] for shape in SHAPES if len(shape) > 1)
    peak, kept = step(bo.AMSS(scale=scale))
    assert peak * BYTES < 200 * units  # bytes: some vectors of float64
    assert kept * BYTES < 25 * units  # where each stands when all are drawn together


def test_relearning_keeps_the_initial_weights():
    torch.manual_seed(0)
    model = Model()
    encoders: Any = {"audio": "audio", "visual": "visual"}
    monitor = bo.ModalityMonitor(model, encoders, head="head")
    base = torch.optim.SGD(bo.modality_groups(model, encoders), lr=0.01)
    size = sum(4 * p.numel() for name in encoders for p in model.get_submodule(name).parameters())
    schedulers: list[bo.ReLearnScheduler] = []
    peak, kept = allocated(lambda: schedulers.append(bo.ReLearnScheduler(base, monitor, [], [], epochs=99)))
    assert kept == pytest.approx(size, rel=0.01)
    assert peak < kept + BYTES


def test_initial_weights_that_are_kept_elsewhere_come_one_by_one():
    params = [torch.ones(shape) for shape in SHAPES]
    elsewhere = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]  # for want of another device
    peak, kept = allocated(lambda: bo.functional.soft_reinit_(params, elsewhere, 0.25))
    assert peak == BYTES
    assert kept == 0
    assert all(bool((p == 0.75).all()) for p in params)
