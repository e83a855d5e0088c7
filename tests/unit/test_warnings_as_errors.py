"""A warning that the user turns into an error ends a constructor: nothing of it is left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_optimizer
from torch import nn

import balanceopt as bo
from tests.models import Concat, watch
from tests.unit.test_bad_inputs import World


class Shared(Concat):
    """Two encoders with a layer in common, of which re-learning warns."""

    def __init__(self) -> None:
        super().__init__(encoder=lambda n, d: nn.Sequential(nn.Linear(n, 6), nn.Tanh(), nn.Linear(6, d)))
        audio, visual = (self.encoders[name] for name in ("audio", "visual"))
        assert isinstance(audio, nn.Sequential)
        assert isinstance(visual, nn.Sequential)
        visual[2] = audio[2]


def world_of(model: Any = None, make: Callable[..., torch.optim.Optimizer] | None = None) -> World:
    world = World()
    if model is not None:
        world.model, world.monitor = model, watch(model)
    world.optimizer = (make or torch.optim.SGD)(world.model.parameters(), lr=0.1)
    return world


def convolutions() -> Concat:
    return Concat(
        encoder=lambda n, d: nn.Sequential(nn.Unflatten(1, (1, n)), nn.Conv1d(1, d, n), nn.Flatten())
    )


CASES: dict[str, tuple[Callable[[], World], Callable[[World], Any]]] = {
    "Adam with OGM": (
        lambda: world_of(make=torch.optim.Adam),
        lambda world: bo.ModulatedOptimizer(world.optimizer, world.monitor, bo.OGM()),
    ),
    "attach to Adam with OGM": (
        lambda: world_of(make=torch.optim.Adam),
        lambda world: bo.attach(world.optimizer, world.monitor, bo.OGM()),
    ),
    "Adam with AMSS official": (
        lambda: world_of(make=torch.optim.Adam),
        lambda world: bo.ModulatedOptimizer(world.optimizer, world.monitor, bo.AMSS(scale="official")),
    ),
    "LBFGS with AMSS": (
        lambda: world_of(make=torch.optim.LBFGS),
        lambda world: bo.attach(world.optimizer, world.monitor, bo.AMSS()),
    ),
    "a single modality": (
        lambda: world_of(Concat(1)),
        lambda world: bo.ModulatedOptimizer(world.optimizer, world.monitor),
    ),
    "attach with a single modality": (
        lambda: world_of(Concat(1)),
        lambda world: bo.attach(world.optimizer, world.monitor),
    ),
    "MaskedSubnetworkSGD with a single modality": (
        lambda: world_of(Concat(1)),
        lambda world: bo.MaskedSubnetworkSGD(world.model.parameters(), world.monitor, lr=0.1),
    ),
    "OPM with a single modality": (lambda: world_of(Concat(1)), lambda world: bo.OPM(world.monitor)),
    "Adafactor of torch_optimizer": (
        lambda: world_of(convolutions(), lambda params, lr: torch_optimizer.Adafactor(params)),
        lambda world: bo.ModulatedOptimizer(
            world.optimizer, world.monitor, bo.OGM(apply_to="update", noise=False)
        ),
    ),
    "re-learning with shared layers": (
        lambda: world_of(Shared()),
        lambda world: bo.ReLearnScheduler(world.optimizer, world.monitor, [], [], epochs=99),
    ),
    "re-learning of no known length": (
        lambda: world_of(Concat(2)),
        lambda world: bo.ReLearnScheduler(world.optimizer, world.monitor, [], []),
    ),
}


@pytest.mark.filterwarnings("error::balanceopt.OptimizerHintWarning")
@pytest.mark.parametrize("name", CASES)
def test_a_warning_that_is_an_error_leaves_nothing_behind(name: str) -> None:
    make, construct = CASES[name]
    world = make()
    before = world.fingerprint()
    with pytest.raises(UserWarning, match=r"\w"):
        construct(world)
    assert world.fingerprint() == before
