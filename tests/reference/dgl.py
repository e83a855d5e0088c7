"""Disentangled gradient learning, written naively: gradients at the features first, then those of the encoders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def mixed(joint: Sequence[float], unimodal: Sequence[float], share: float) -> list[float]:
    return [share * j + u for j, u in zip(joint, unimodal, strict=True)]


def gradients(
    model: Any,
    unimodal_logits: Mapping[str, Callable[[Tensor], Tensor]],
    inputs: Sequence[Tensor],
    labels: Tensor,
    weight: float,
    share: float,
) -> dict[str, Tensor]:
    """By parameter, what encoders and fusion get: the fusion from the joint loss alone, on features without a graph."""
    features = {n: encoder(x) for (n, encoder), x in zip(model.modalities.items(), inputs, strict=True)}
    leaves = {name: z.detach().requires_grad_() for name, z in features.items()}
    F.cross_entropy(model.fuse(list(leaves.values())), labels).backward()
    for name, z in features.items():
        alone = z.detach().requires_grad_()
        loss = weight * F.cross_entropy(unimodal_logits[name](alone), labels)
        (u,) = torch.autograd.grad(loss, alone)
        j = leaves[name].grad
        assert j is not None
        h = mixed(j.flatten().tolist(), u.flatten().tolist(), share)
        z.backward(torch.tensor(h, dtype=z.dtype).view_as(z))
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
