"""All methods at once on one small model: what the tests of long, broken off and hostile training share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import balanceopt as bo
from tests.models import Concat, Multimodal, watch
from tests.relearning import loaders
from tests.training import batch, groups_of

MakeBase = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def momentum(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.02, momentum=0.9)


@dataclass
class Everything:
    """A model, its optimizer (wrapped, or the base with hooks on it), OPM and re-learning, on one monitor.

    Attributes:
        handle: what `attach` returned; None for the wrapper.
    """

    model: Multimodal
    monitor: bo.ModalityMonitor
    optimizer: torch.optim.Optimizer
    modulator: bo.OPM
    scheduler: bo.ReLearnScheduler
    handle: Any = None

    @property
    def balanced(self) -> Any:
        """What has `stats()`, `listeners` and `set_epoch`."""
        return self.optimizer if self.handle is None else self.handle

    def train(self, number: int, size: int = 8) -> None:
        """The user's own loop, once."""
        inputs, labels = batch(number, self.model, size)
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(*inputs), labels).backward()
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        """What a checkpoint should hold."""
        parts = ("model", "optimizer", "modulator", "scheduler")
        return {part: getattr(self, part).state_dict() for part in parts}

    def load(self, state: dict[str, Any]) -> None:
        for part, own in state.items():
            getattr(self, part).load_state_dict(own)

    def remove(self) -> None:
        self.scheduler.remove()
        self.modulator.remove()
        if self.handle is not None:
            self.handle.remove()
        self.monitor.remove()


def everything(
    model: Multimodal | None = None,
    methods: Sequence[bo.Modulation] | None = None,
    *,
    make: MakeBase = momentum,
    groups: list[dict[str, Any]] | None = None,
    attached: bool = False,
    seed: int = 7,
    **relearn: Any,
) -> Everything:
    """OGM-GE and AMSS in one list, OPM and re-learning; the same each time, whatever the global random stream."""
    if model is None:
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            model = Concat()
    methods = [bo.OGM(0.5), bo.AMSS()] if methods is None else list(methods)
    monitor = watch(model)
    modulator = bo.OPM(monitor, seed=seed)
    optimizer = make(groups_of(model) if groups is None else groups)
    handle = None
    if attached:
        handle = bo.attach(optimizer, monitor, methods, seed=seed)
    else:
        optimizer = bo.ModulatedOptimizer(optimizer, monitor, methods, seed=seed)
    own = loaders(len(model.modalities))
    scheduler = bo.ReLearnScheduler(
        optimizer, monitor, *own, **{"every": 2, "lam": 0.5, "epochs": 99, "seed": seed, **relearn}
    )
    return Everything(model, monitor, optimizer, modulator, scheduler, handle)


def hooks_on(model: nn.Module) -> int:
    """How many hooks of any kind there are on its modules and parameters."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    on_modules = sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)
    on_tensors = sum(len(p._backward_hooks or ()) + len(_accumulated(p)) for p in model.parameters())
    return on_modules + on_tensors


def _accumulated(parameter: Tensor) -> Any:
    return getattr(parameter, "_post_accumulate_grad_hooks", None) or ()
