"""What the tests of OPM share: models whose drop probabilities are known, and a look at what the fusion got."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import balanceopt as bo
from tests.models import NAMES, Multimodal, watch
from tests.training import class_zero, small_model

# The first modality is four times as certain: q of the first is near 0.5 * 1.5, of the others 0.
CERTAIN = (0.8, 0.2)


def certain(certainty: Sequence[float]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """For `scores=`: each modality gives class 0 its own probability, whatever the features and their rows."""

    def logits(features: dict[str, Tensor]) -> dict[str, Tensor]:
        samples = min(len(z) for z in features.values())
        rows = [torch.tensor([p, 1 - p, 0.0, 0.0, 0.0]).log() for p in certainty]
        return {name: rows[NAMES.index(name)].expand(samples, -1) for name in features}

    return logits


def dropping(
    certainty: Sequence[float] = CERTAIN,
    *,
    model: Multimodal | None = None,
    monitor: Any = None,
    **options: Any,
) -> tuple[Any, bo.OPM]:
    """A small model and a modulator whose q is known once a batch of `class_zero` was trained on."""
    model = small_model(len(certainty)) if model is None else model
    watched = watch(model, **{"scores": certain(certainty), **(monitor or {})})
    return model, bo.OPM(watched, **{"seed": 3, **options})


def warm(
    certainty: Sequence[float] = CERTAIN,
    *,
    model: Multimodal | None = None,
    monitor: Any = None,
    **options: Any,
) -> tuple[Any, bo.OPM]:
    """The same after one batch: the next forward drops."""
    model, modulator = dropping(certainty, model=model, monitor=monitor, **options)
    step(model)
    return model, modulator


def step(model: Any, number: int = 0, size: int = 8) -> None:
    inputs, labels = class_zero(model, number)
    F.cross_entropy(model(*[x[:size] for x in inputs]), labels[:size]).backward()
    model.zero_grad()


@contextmanager
def inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """The first argument of each call of the module, detached, in order."""
    seen: list[Tensor] = []
    with_input = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    try:
        yield seen
    finally:
        with_input.remove()


def fused(model: Any, number: int = 1, inputs: Sequence[Tensor] | None = None) -> Tensor:
    """What the head gets in one training forward, `(B, D)`."""
    head = model.get_submodule("head")
    with inputs_of(head) as seen:
        model(*(class_zero(model, number)[0] if inputs is None else inputs))
    return seen[0]


def kept(x: Tensor, width: int = 4) -> Tensor:
    """bool `(M, B)` of a head's input: which samples still have which modality's columns."""
    return torch.stack([(part != 0).any(1) for part in x.split(width, 1)])


def drop_of(modulator: bo.OPM) -> Any:
    """What was done in the latest forward."""
    return modulator._latest
