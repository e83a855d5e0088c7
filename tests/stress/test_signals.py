"""Real signals, as of Ctrl-C or a notebook's stop button, while a fusion is run once more."""

from __future__ import annotations

import random
import signal
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

import balanceopt as bo
from tests.interrupts import differences, shape_of
from tests.models import Gated, batch, batch_norm

SIGNALS = 2000


def interrupt(number, frame):
    raise KeyboardInterrupt


@pytest.fixture
def alarm():
    before = signal.signal(signal.SIGALRM, interrupt)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_signal_leaves_damage(alarm):
    model = Gated(encoder=batch_norm)
    monitor = bo.ModalityMonitor(model, model.modalities, "head")
    optimizer = bo.ModulatedOptimizer(
        torch.optim.SGD(model.parameters(), lr=1e-3), monitor, bo.OGM(noise=False)
    )
    inputs, labels = batch(8)
    chance = random.Random(5)
    places: Counter[str] = Counter()
    damaged: Counter[str] = Counter()

    def steps():
        while True:
            optimizer.zero_grad()
            F.cross_entropy(model(*inputs), labels).backward()
            optimizer.step()

    for _ in range(SIGNALS):
        before = shape_of(model)
        try:
            signal.setitimer(signal.ITIMER_REAL, chance.uniform(3e-4, 2e-2))
            steps()
        except KeyboardInterrupt as stop:
            trace = stop.__traceback__
            files = []
            while trace is not None:
                files.append(trace.tb_frame.f_code.co_filename.rsplit("/", 1)[-1])
                trace = trace.tb_next
            places[
                "in a replay" if {"_zero_out.py", "_replay.py", "_undo.py"} & set(files) else "elsewhere"
            ] += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        torch.set_grad_enabled(True)  # torch's own no_grad may be interrupted
        damaged.update(differences(before, shape_of(model)))
    assert places["in a replay"] > SIGNALS / 10
    assert not damaged
    stepped = optimizer.stats()["modulated"]
    optimizer.zero_grad()
    F.cross_entropy(model(*inputs), labels).backward()
    optimizer.step()
    assert optimizer.stats()["modulated"] == stepped + 1
