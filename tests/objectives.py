"""What the tests of uni-modal objectives share: the loss written out, and a comparison of the two ways to add it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import balanceopt as bo
from balanceopt._random import generator_for, mixed
from balanceopt.functional import derangement
from tests.models import CLASSES, batch, watch

Loop = Callable[[Any, bo.ModalityMonitor, Callable[[Any], Any]], None]


def objective_of(
    model: Any, *, monitor: bo.ModalityMonitor | None = None, **options: Any
) -> bo.UnimodalObjective:
    return bo.UnimodalObjective(watch(model) if monitor is None else monitor, CLASSES, **options)


def own_loss(objective: Any, model: Any, inputs: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Written out."""
    losses = [
        F.cross_entropy(
            objective.head_of(name)(encoder.forward(x)), labels
        )  # no hooks: it may be dropped there
        for (name, encoder), x in zip(model.modalities.items(), inputs, strict=True)
    ]
    return torch.stack(losses).sum()


def gradients(
    make: Callable[[], Any],
    loop: Loop,
    *,
    inject: bool,
    dtype: torch.dtype = torch.float64,
    monitor_options: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Of everything, after a loop that gets `extra(labels)`: what it adds to the loss."""
    torch.manual_seed(0)
    model = make().to(dtype)
    monitor = watch(model, **(monitor_options or {}))
    objective = bo.UnimodalObjective(monitor, CLASSES, inject=inject, seed=0, **options)
    if objective.heads == "own":
        objective.to(dtype)
    loop(model, monitor, (lambda labels: 0.0) if inject else objective)
    found = {}
    for name, p in [*model.named_parameters(), *objective.named_parameters()]:
        assert p.grad is not None, name
        found[name] = p.grad.clone()
    return found


def check(
    make: Callable[[], Any],
    loop: Loop,
    *,
    loss: Any = None,
    own_loss: Any = None,
    rtol: float = 1e-8,
    atol: float = 1e-10,
    **options: Any,
) -> None:
    """Both ways give the same gradients, of encoders and heads."""
    explicit = gradients(make, loop, inject=False, loss=own_loss or loss, **options)
    injected = gradients(make, loop, inject=True, loss=loss, **options)
    assert explicit.keys() == injected.keys()
    for name, value in explicit.items():
        torch.testing.assert_close(injected[name], value, rtol=rtol, atol=atol, msg=name)


def given(
    modalities: int = 2, dtype: torch.dtype = torch.float64, seed: int = 5, size: int = 8
) -> tuple[list[Tensor], Tensor]:
    """A batch that depends on nothing but the seed."""
    torch.manual_seed(seed)
    inputs, labels = batch(size, modalities)
    return [x.to(dtype) for x in inputs], labels


def plain(model: Any, monitor: bo.ModalityMonitor, extra: Callable[[Any], Any]) -> None:
    inputs, labels = given(len(model.names))
    (F.cross_entropy(model(*inputs), labels) + extra(labels)).backward()


def beside_opm(model: Any, monitor: bo.ModalityMonitor, extra: Callable[[Any], Any]) -> None:
    """A loop in which OPM drops features."""
    modulator = bo.OPM(monitor, q_base=1.0, seed=0)
    for seed in range(3):
        inputs, labels = given(seed=seed)
        (F.cross_entropy(model(*inputs), labels) + extra(labels)).backward()
    assert modulator.stats()["dropping"] > 0


def permutation_of(
    modality: int,
    size: int,
    *,
    seed: int = 0,
    call: int = 0,
    number: int = 0,
    present: Tensor | None = None,
) -> Tensor:
    """What `CompetitionObjective` draws for the `number`-th permutation of a modality."""
    generator = generator_for(seed, call, mixed(modality, number), torch.device("cpu"))
    return derangement(size, generator, present)
