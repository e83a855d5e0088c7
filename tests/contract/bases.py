"""Base optimizers that every method is tried on: all of torch.optim and of torch-optimizer that step on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import torch_optimizer

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class Base:
    """One base optimizer.

    Attributes:
        name: what a test is called.
        make: from param groups to the optimizer.
        closure: its step needs one.
        create_graph: its step differentiates the gradients.
        keeps_copy: keeps a second copy of its parameters, which it pulls them to.
    """

    name: str
    make: Callable[[Groups], torch.optim.Optimizer]
    closure: bool = False
    create_graph: bool = False
    keeps_copy: bool = False

    def __str__(self) -> str:
        return self.name


def classes_of(module: object) -> set[str]:
    """Names of the optimizers in a package."""
    found = {name for name, value in vars(module).items() if isinstance(value, type)}
    return {n for n in found if issubclass(getattr(module, n), torch.optim.Optimizer)} - {"Optimizer"}


def _matrices(groups: Groups) -> Groups:
    return [{**group, "params": [p for p in group["params"] if p.dim() == 2]} for group in groups]


def _one_group(groups: Groups) -> list[torch.nn.Parameter]:
    return [p for group in groups for p in group["params"]]


def _lookahead(groups: Groups) -> torch.optim.Optimizer:
    optimizer = torch_optimizer.Lookahead(torch_optimizer.Yogi(groups, lr=0.01))
    # It never makes these. Torch asks for them on all instances of a class once one of them was loaded.
    for kind in ("pre", "post"):
        vars(optimizer)[f"_optimizer_step_{kind}_hooks"] = {}
    return optimizer


def _torch(name: str, lr: float, *, shown: str = "", **options: Any) -> Base:
    return Base(shown or name, partial(getattr(torch.optim, name), lr=lr, **options))


def _third(name: str, *, options: Mapping[str, Any] = MappingProxyType({}), **facts: Any) -> Base:
    make = partial(getattr(torch_optimizer, name), lr=0.01, **options)
    return Base(f"torch_optimizer.{name}", make, **facts)


_OWN = [
    _torch("SGD", 0.1),
    _torch("SGD", 0.1, momentum=0.9, shown="momentum"),
    _torch("SGD", 0.1, momentum=0.9, nesterov=True, shown="nesterov"),
    _torch("SGD", 0.1, momentum=0.9, foreach=True, shown="SGD foreach"),
    _torch("SGD", 0.1, momentum=0.9, fused=True, shown="SGD fused"),
    _torch("SGD", 0.1, momentum=0.9, weight_decay=0.01, maximize=True, shown="SGD maximize"),
    _torch("Adam", 0.01),
    _torch("Adam", 0.01, amsgrad=True, shown="AMSGrad"),
    _torch("AdamW", 0.01, foreach=False, shown="AdamW"),
    _torch("AdamW", 0.01, foreach=True, shown="AdamW foreach"),
    _torch("AdamW", 0.01, fused=True, shown="AdamW fused"),
    _torch("Adamax", 0.01),
    _torch("NAdam", 0.01),
    _torch("RAdam", 0.01),
    _torch("RMSprop", 0.01),
    _torch("Adagrad", 0.01),
    _torch("Adagrad", 0.01, fused=True, shown="Adagrad fused"),
    _torch("Adadelta", 1.0),
    _torch("Rprop", 0.01),
    _torch("ASGD", 0.1),
    _torch("Adafactor", 0.01),
    Base("LBFGS", lambda groups: torch.optim.LBFGS(_one_group(groups), lr=0.01, max_iter=3), closure=True),
]

if hasattr(torch.optim, "Muon"):  # since torch 2.9
    _OWN.append(Base("Muon", lambda groups: torch.optim.Muon(_matrices(groups), lr=0.01)))

_THIRD_PARTY = [
    _third("A2GradExp", keeps_copy=True),
    _third("A2GradInc", keeps_copy=True),
    _third("A2GradUni", keeps_copy=True),
    _third("AccSGD"),
    _third("AdaBelief"),
    _third("AdaBound"),
    _third("AdaMod"),
    _third("Adafactor"),
    _third("Adahessian", create_graph=True),
    _third("AdamP"),
    _third("AggMo"),
    _third("Apollo"),
    _third("DiffGrad"),
    _third("LARS", options={"weight_decay": 1e-4}),  # plain SGD without it
    _third("Lamb"),
    # Never calls Optimizer.__init__: without the wrapper it has neither hooks nor state_dict. Loading parts
    # its groups from those of the optimizer inside it.
    Base("torch_optimizer.Lookahead", _lookahead, keeps_copy=True),
    _third("MADGRAD", keeps_copy=True),
    _third("NovoGrad"),
    _third("PID"),
    _third("QHAdam"),
    _third("QHM"),
    _third("RAdam"),
    _third("Ranger", keeps_copy=True),
    _third("RangerQH", keeps_copy=True),
    _third("RangerVA", keeps_copy=True),
    _third("SGDP"),
    _third("SGDW"),
    _third("SWATS"),
    _third("Shampoo"),
    _third("Yogi"),
]

BASES = _OWN + _THIRD_PARTY
