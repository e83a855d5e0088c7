"""MCR's competition term, written naively: the fusion runs again with permuted features, once for each term."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

FACTORS = {"greedy": -1, "independent": 0, "collaborative": 1}


def divergence(p: Sequence[float], q: Sequence[float]) -> float:
    """Jensen-Shannon, of probabilities."""
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return sum((a * math.log(a / m) + b * math.log(b / m)) / 2 for a, b, m in zip(p, q, middle, strict=True))


def terms(
    model: Any, features: Mapping[str, Tensor], permutations: Mapping[str, list[Tensor]]
) -> list[Tensor]:
    """Of each modality, with its gradients."""
    p = model.fuse(list(features.values())).softmax(1)
    result = []
    for name, draws in permutations.items():
        values = []
        for index in draws:
            q = model.fuse(list({**features, name: features[name][index]}.values())).softmax(1)
            m = (p + q) / 2
            values.append(((p * (p / m).log() + q * (q / m).log()) / 2).sum(1).mean())
        result.append(-torch.stack(values).mean())
    return result


def gradients(
    model: Any, inputs: Sequence[Tensor], permutations: Mapping[str, list[Tensor]], strategy: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """The term, and by parameter what encoders get of it (their own part and k times the others'), and the head."""
    features = {n: encoder(x) for (n, encoder), x in zip(model.modalities.items(), inputs, strict=True)}
    losses = terms(model, features, permutations)
    result = {}
    for key, parameter in model.named_parameters():
        by_term = [torch.autograd.grad(loss, [parameter], retain_graph=True)[0] for loss in losses]
        factors = [
            FACTORS[strategy] if key.startswith("encoders.") and f".{name}." not in key else 1
            for name in permutations
        ]
        result[key] = torch.stack([k * g for k, g in zip(factors, by_term, strict=True)]).sum(0)
    return torch.stack(losses).sum(), result
