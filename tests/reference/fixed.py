"""Constant coefficients, written naively: PDMP's rule, and SGD with a learning rate of its own for each encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tests.models import Multimodal


def priority(accuracy: Sequence[float], boost: float, damp: float) -> list[float]:
    best = list(accuracy).index(max(accuracy))
    return [boost if index == best else damp for index in range(len(accuracy))]


def sgd_by_modality(model: Multimodal, factors: Mapping[str, float], lr: float) -> torch.optim.SGD:
    groups: list[dict[str, Any]] = [
        {"params": list(encoder.parameters()), "lr": lr * factors.get(name, 1)}
        for name, encoder in model.modalities.items()
    ]
    return torch.optim.SGD([*groups, {"params": list(model.get_submodule("head").parameters())}], lr=lr)
