"""What must hold for each method under losses without classes, on a few bases of different kinds."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import balanceopt as bo
from tests.contract.bases import BASES, Base
from tests.contract.methods import METHODS, Method
from tests.models import INPUTS, Multimodal, watch
from tests.training import distance, groups_of, same_bits, small_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:LBFGS evaluates its closure several times"),
    pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True"),
    pytest.mark.filterwarnings("ignore:loading gave Lookahead param groups of its own"),
]

OUTPUTS = 3
LOSSES: dict[str, nn.Module] = {"mse": nn.MSELoss(), "bce": nn.BCEWithLogitsLoss()}
NAMES = ("momentum", "AdamW foreach", "LBFGS", "torch_optimizer.Adahessian", "torch_optimizer.Lookahead")


def marks_of(loss: str, method: Method, base: Base) -> Any:
    """What is tried always: each method under each loss, and on a second base, and each base under one method."""
    shown = base.name == "momentum" or (loss == "mse" and base.name == "AdamW foreach")
    return () if shown or method.name == "OGM-GE" else pytest.mark.slow


CASES = [
    pytest.param((loss, method, base), id=f"{loss}-{method}-{base}", marks=marks_of(loss, method, base))
    for loss in LOSSES
    for method in METHODS
    for base in BASES
    if base.name in NAMES
]


def batch(number: int, name: str) -> tuple[list[Tensor], Tensor]:
    """The first modality alone tells the target."""
    generator = torch.Generator().manual_seed(number)
    target = torch.randn(8, OUTPUTS, generator=generator)
    inputs = [torch.randn(8, n, generator=generator) for n in INPUTS[:2]]
    inputs[0][:, :OUTPUTS] += 3 * target
    return inputs, (target > 0).float() if name == "bce" else target


class Run:
    """A loop that calls the loss module; methods get their targets from its calls."""

    def __init__(self, name: str, base: Base, modulation: bo.Modulation | None, *, opm: bool = False) -> None:
        self.name, self.base, self.loss = name, base, copy.deepcopy(LOSSES[name])
        self.model: Multimodal = small_model(classes=OUTPUTS)
        self.optimizer: Any = base.make(groups_of(self.model))
        monitor = watch(self.model, loss=self.loss)
        if modulation is not None:
            self.optimizer = bo.ModulatedOptimizer(self.optimizer, monitor, modulation, seed=3)
            self.optimizer.set_epoch(0)
        self.opm = bo.OPM(monitor, q_base=0.5, seed=4) if opm else None

    def train(self, numbers: Iterable[int]) -> Run:
        for number in numbers:
            torch.manual_seed(number)  # for bases that draw from the global stream
            inputs, target = batch(number, self.name)

            def closure(inputs: list[Tensor] = inputs, target: Tensor = target) -> Tensor:
                self.optimizer.zero_grad()
                loss: Tensor = self.loss(self.model(*inputs), target)
                loss.backward(create_graph=self.base.create_graph)
                return loss.detach()

            if self.base.closure:
                self.optimizer.step(closure)
            else:
                closure()
                self.optimizer.step()
        return self

    def save(self) -> io.BytesIO:
        file, parts = io.BytesIO(), [self.model, self.optimizer, *([self.opm] if self.opm else [])]
        torch.save([part.state_dict() for part in parts], file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO) -> Run:
        parts = [self.model, self.optimizer, *([self.opm] if self.opm else [])]
        for part, state in zip(parts, torch.load(file, weights_only=True), strict=True):
            part.load_state_dict(state)
        return self


@cache
def plain(name: str, base: Base) -> Multimodal:
    """A model after four steps of the base alone."""
    return Run(name, base, None).train(range(4)).model


@pytest.mark.parametrize("case", CASES)
def test_acts_resumes_and_at_its_limit_is_the_base_bit_for_bit(case: tuple[str, Method, Base]):
    name, method, base = case
    acting = Run(name, base, method.make()).train(range(2))
    file = acting.save()
    acting.train(range(2, 4))
    assert all(bool(p.isfinite().all()) for p in acting.model.parameters())
    assert acting.optimizer.stats()["modulated"] >= 4
    assert distance(acting.model, plain(name, base)) > 0
    resumed = Run(name, base, method.make()).load(file).train(range(2, 4))
    assert same_bits(acting.model, resumed.model)
    limit = Run(name, base, method.limit()).train(range(4))
    assert same_bits(limit.model, plain(name, base))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("modulation", [None, *METHODS], ids=str)
def test_opm_resumes_with_its_pending_scores(name: str, modulation: Method | None):
    """The scores of the last pass before the checkpoint set q at the first forward after it."""
    base = next(base for base in BASES if base.name == "momentum")

    def run() -> Run:
        return Run(name, base, None if modulation is None else modulation.make(), opm=True)

    whole = run().train(range(3))
    file = whole.save()
    assert whole.opm is not None
    assert whole.opm.state_dict()["pending"] is not None
    resumed = run().load(file).train(range(3, 6))
    assert same_bits(whole.train(range(3, 6)).model, resumed.model)
    assert resumed.opm is not None
    assert torch.equal(whole.opm.q, resumed.opm.q)
    assert whole.opm.q.any()
