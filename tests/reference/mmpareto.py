"""MMPareto, written naively: the gradients of both losses by autograd, the rule on lists of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Vector = list[float]


def dot(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def weight(j: Vector, u: Vector) -> float:
    """Of the joint gradient, in the shortest vector between both."""
    difference = [x - y for x, y in zip(j, u, strict=True)]
    return min(max((dot(u, u) - dot(j, u)) / dot(difference, difference), 0.0), 1.0)


def combine(j: Vector, u: Vector, gamma: float) -> Vector:
    a = 0.5 if dot(j, u) > 0 else weight(j, u)
    h = [2 * a * x + 2 * (1 - a) * y for x, y in zip(j, u, strict=True)]
    plain = [x + y for x, y in zip(j, u, strict=True)]
    factor = max(1.0, math.sqrt(dot(plain, plain) / dot(h, h)))
    return [gamma * factor * x for x in h]


def flat(tensors: Sequence[Tensor]) -> Vector:
    return [x for tensor in tensors for x in tensor.flatten().tolist()]


def encoder_gradients(
    model: Any, heads: Any, inputs: Sequence[Tensor], labels: Tensor, gamma: float, scope: str
) -> dict[str, Vector]:
    """Of each encoder's parameters, one after the other."""
    features = {n: encoder(x) for (n, encoder), x in zip(model.modalities.items(), inputs, strict=True)}
    joint = F.cross_entropy(model.fuse(list(features.values())), labels)
    result = {}
    for name, z in features.items():
        params = list(model.modalities[name].parameters())
        alone = F.cross_entropy(heads[name](z), labels)
        targets = params if scope == "encoder" else [z]
        j, u = (torch.autograd.grad(loss, targets, retain_graph=True) for loss in (joint, alone))
        h = combine(flat(j), flat(u), gamma)
        if scope == "output":
            at_z = torch.tensor(h, dtype=z.dtype).view_as(z)
            h = flat(torch.autograd.grad(z, params, at_z, retain_graph=True))
        result[name] = h
    return result
