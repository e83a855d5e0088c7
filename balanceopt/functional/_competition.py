"""Competition of modalities for the joint prediction: how far it moves when one modality's features are permuted."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from balanceopt._options import check_tensor
from balanceopt.functional._dtypes import narrowed, wide


def permutation_divergence(logits: Tensor, permuted: Tensor) -> Tensor:
    r"""Compute the Jensen-Shannon divergence of each sample's two predictions, differentiable in both.

    $$JS(p, q) = \tfrac12 KL\left(p \,\middle\|\, \tfrac{p + q}2\right) + \tfrac12 KL\left(q \,\middle\|\, \tfrac{p +
    q}2\right)$$

    with p and q the softmax of the logits; the second ones are those with a modality's features permuted over the
    batch. It is 0 where a modality says nothing to the joint prediction.

    Args:
        logits: `(B, C)` joint logits.
        permuted: `(B, C)` joint logits with one modality's features of other samples.

    Returns:
        `(B,)` in [0, log 2], in nats.

    Raises:
        ValueError: if the shapes differ, there is no class, or a tensor is complex or not dense.
        TypeError: if an argument is not a tensor.

    Example:
        >>> logits = torch.tensor([[3.0, 0.0], [0.0, 3.0]])
        >>> permutation_divergence(logits, logits.flip(0))
        tensor([0.5023, 0.5023])

    Reference:
        Kontras et al., Balancing Multimodal Training Through Game-Theoretic Regularization, NeurIPS 2025.
    """
    check_tensor("logits", logits, "(B, C)", dims=(2,))
    check_tensor("permuted", permuted, "(B, C)", dims=(2,))
    if permuted.shape != logits.shape or not logits.shape[1]:
        raise ValueError(
            f"`permuted` should have the shape (B, C) of `logits`, with at least one class. Found "
            f"{tuple(permuted.shape)} and {tuple(logits.shape)}."
        )
    p, q = _log_softmax(logits), _log_softmax(permuted)
    # Of the difference of both, so that equal predictions have exactly 0, and exactly no gradient.
    terms = p.exp() * (math.log(2) - F.softplus(q - p)) + q.exp() * (math.log(2) - F.softplus(p - q))
    return narrowed((terms.sum(1) / 2).clamp(0, math.log(2)), logits)


@torch.no_grad()
def derangement(samples: int, generator: torch.Generator, present: Tensor | None = None) -> Tensor:
    """Draw a permutation of the samples that leaves none in its place: a random cycle through all of them.

    Args:
        samples: number of samples B; a single sample stays.
        generator: generator, whose device is that of the result.
        present: bool `(B,)`, samples that take part; the others stay. None for all.

    Returns:
        int64 `(B,)`, for each sample the index of the one that stands in for it.
    """
    device = generator.device
    keys = torch.rand(samples, generator=generator, dtype=torch.float64, device=device)
    here = torch.ones_like(keys, dtype=torch.bool) if present is None else present.to(device)
    order = torch.where(here, keys, 2).argsort()  # those that take part first
    rank = torch.arange(samples, dtype=torch.int64, device=device)
    count = here.sum()
    following = torch.where(rank < count, torch.where(rank + 1 < count, rank + 1, 0), rank)
    return torch.empty_like(order).scatter_(0, order, order[following])


def _log_softmax(logits: Tensor) -> Tensor:
    """Compute log-probabilities, finite for impossible classes too, whose differences would be NaN."""
    x = F.log_softmax(wide(logits), 1)
    return x.clamp(min=torch.finfo(x.dtype).min)
