"""InfoReg's rules (Huang et al., CVPR 2025), written naively in Python's floats, and its pull by autograd."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def strength(losses: Sequence[float], beta: float) -> list[float]:
    result = []
    for index, own in enumerate(losses):
        others = [loss for other, loss in enumerate(losses) if other != index]
        lead = sum(others) / len(others) - own
        result.append(math.exp(beta * math.tanh(lead)) if lead > 0 else 0.0)
    return result


def is_open(trace: Sequence[float], threshold: float) -> bool:
    return len(trace) < 2 or (trace[-1] - trace[-2]) / trace[-1] > threshold


def pulls(params: Iterable[Tensor], anchors: Iterable[Tensor], a: float) -> list[Tensor]:
    """The gradient of a/2 |theta - theta_0|^2."""
    leaves = [p.detach().clone().requires_grad_() for p in params]
    pairs = zip(leaves, anchors, strict=True)
    penalty = torch.stack([a / 2 * (p - anchor).square().sum() for p, anchor in pairs]).sum()
    return list(torch.autograd.grad(penalty, leaves))
