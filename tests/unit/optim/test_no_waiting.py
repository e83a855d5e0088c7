"""A step reads no number back from its device: nothing on its way asks for one (`.item()`, `bool`, `nonzero`)."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import balanceopt as bo
from balanceopt.modulation import _amss, _inforeg, _masks, _noise, _ogm, _scaling
from tests.models import FUSIONS, batch, train_step, watch
from tests.training import sgd

WAITING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.masked_select.default,
}


class NoWaiting(TorchDispatchMode):
    """Raises where an operation would make the host wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indexes = func is torch.ops.aten.index.Tensor
        if func is torch.ops.aten.index_put_.default:
            indexes = args[2].dim() > 0  # a single number is filled in without reading the mask
        by_mask = indexes and any(i is not None and i.dtype == torch.bool for i in args[1])
        if func in WAITING or by_mask:
            raise AssertionError(f"{func} makes the host wait")
        return func(*args, **(kwargs or {}))


def test_the_guard_sees_what_it_should():
    x = torch.ones(2)
    asking = (x.sum().item, x.nonzero, lambda: bool(x[0] > 0), lambda: x[x > 0], lambda: float(x[0]))
    for waiting in (*asking, lambda: x.__setitem__(x > 0, torch.zeros(2))):
        with pytest.raises(AssertionError, match="makes the host wait"), NoWaiting():
            waiting()


MODULATIONS: dict[str, Any] = {
    "OGM": bo.OGM(0.5, noise=False),
    "OGM, update": bo.OGM(0.5, noise=False, apply_to="update"),
    "OGM-GE": bo.OGM(0.5),
    "OGM-GE, update": bo.OGM(0.5, apply_to="update"),
    "tpami": bo.OGM(0.5, form="tpami", ratio="ratio_of_means"),
    "AMSS": bo.AMSS(),
    "AMSS+": bo.AMSS(scale="unbiased"),
    "AMSS+, official": bo.AMSS(scale="official"),
    "MLB": bo.MLB(),
    "InfoReg": bo.InfoReg(),
    "Fixed": bo.FixedModulation({"audio": 0.5}),
    "frozen": bo.FixedModulation({"audio": 0}, frozen=True),
    "both": [bo.OGM(0.5), bo.AMSS(scale="unbiased")],
}
# Who asks whether numbers can be read in place.
ASKING = (_amss, _inforeg, _masks, _noise, _ogm, _scaling)


@pytest.mark.parametrize("name", MODULATIONS)
@pytest.mark.parametrize(
    ("fusion", "modalities", "place"),
    [
        ("concat", 2, "CPU"),
        ("concat", 2, "accelerator"),
        ("concat", 3, "accelerator"),
        ("sum", 2, "accelerator"),
        ("mlp", 2, "accelerator"),
    ],
)
def test_a_step_does_not_wait(name: str, fusion: str, modalities: int, place: str, monkeypatch: Any):
    if place == "accelerator":
        for module in ASKING:
            monkeypatch.setattr(module, "on_host", lambda tensor: None)
    model = FUSIONS[fusion](modalities)
    optimizer = bo.ModulatedOptimizer(sgd(model.parameters()), watch(model), copy.deepcopy(MODULATIONS[name]))
    optimizer.set_epoch(0)
    recorder = bo.Recorder(optimizer)
    for number in range(3):
        optimizer.zero_grad()
        if number == 0:  # the first batch finds the columns by comparing numbers
            train_step(model, *batch(8, modalities))
            optimizer.step()
        else:
            with NoWaiting():
                train_step(model, *batch(8, modalities))
                optimizer.step()
    assert optimizer.stats()["modulated"] == 3
    assert len(recorder.rows()) >= 3 * modalities


def test_large_gradients_are_masked_by_number_on_the_cpu_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_masks, "_LARGE", 0)
    test_a_step_does_not_wait("AMSS", "concat", 2, "accelerator", monkeypatch)
    monkeypatch.undo()
    monkeypatch.setattr(_masks, "_LARGE", 0)
    with pytest.raises(AssertionError, match="makes the host wait"):
        test_a_step_does_not_wait("AMSS", "concat", 2, "CPU", monkeypatch)


def test_attached():
    model = FUSIONS["concat"]()
    base = sgd(model.parameters())
    bo.attach(base, watch(model), bo.OGM(0.5))
    for number in range(2):
        base.zero_grad()
        train_step(model, *batch(8))
        if number == 0:
            base.step()
        else:
            with NoWaiting():
                base.step()


class Some(nn.Module):
    """An encoder that runs on some samples, beside one that runs on all."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(8, 5)

    def forward(self, a: Tensor, b: Tensor, some: Tensor) -> Tensor:
        z = torch.zeros(len(b), 4).index_copy(0, some, self.a(a.index_select(0, some)))
        return self.head(torch.cat([z, self.b(b)], 1))


def test_an_encoder_of_some_samples():
    model = Some()
    monitor = bo.ModalityMonitor(
        model, {"a": "a", "b": "b"}, "head", slices={"a": slice(4), "b": slice(4, 8)}
    )
    optimizer = bo.ModulatedOptimizer(sgd(model.parameters()), monitor, bo.AMSS())
    probes = bo.ProbeMonitor(monitor)
    here, some = torch.tensor([True, False, True, True, False, True]), torch.tensor([0, 2, 3, 5])
    for number in range(4):
        a, b, labels = torch.randn(6, 3), torch.randn(6, 3), torch.randint(5, (6,))
        with NoWaiting() if number else nullcontext():
            optimizer.zero_grad()
            monitor.observe(labels, present={"a": here})
            F.cross_entropy(model(a, b, some), labels).backward()
            optimizer.step()
    assert optimizer.stats()["modulated"] == 4
    assert probes.passes == 3


def test_the_competition_of_modalities():
    model = FUSIONS["concat"]()
    competition = bo.CompetitionObjective(watch(model), samples=2)
    here = {"visual": torch.arange(8) > 2}
    for number in range(2):
        inputs, labels = batch(8)
        with NoWaiting() if number else nullcontext():
            logits = model(*inputs)
            competition.monitor.observe(labels, present=here)
            (F.cross_entropy(logits, labels) + competition()).backward()
    assert competition.calls == 2
