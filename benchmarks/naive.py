"""The published loops, written again from the formulas the naive way: what the package is timed against.

Scores by a loop over the batch, a host synchronisation and two temporaries a tensor, one filter at a time: this is how
the papers' scripts do it (docs/methods). No line of theirs is used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.extras import need

Parameters = Mapping[str, Sequence[nn.Parameter]]


def scores(logits: Tensor, labels: Tensor) -> list[float]:
    """Summed true-class probability of each modality's logits `(M, B, C)`, sample by sample."""
    return [float(sum(torch.softmax(own, 1)[i][labels[i]] for i in range(labels.shape[0]))) for own in logits]


def ogm(parameters: Parameters, logits: Tensor, labels: Tensor, alpha: float, noise: bool) -> None:
    """Eq. 9, 10, 16 for two modalities."""
    s = scores(logits, labels)
    for own, other, params in zip(s, s[::-1], parameters.values(), strict=True):
        ratio = own / other
        k = 1 - math.tanh(alpha * ratio) if ratio > 1 else 1.0
        for p in params:
            if p.grad is None or p.grad.dim() < 2:
                continue
            if noise:
                std = p.grad.std().item() + 1e-8
                p.grad = p.grad * k + torch.zeros_like(p.grad).normal_(0, std)
            else:
                p.grad *= k


def amss(parameters: Parameters, ratios: Sequence[float], unbiased: bool) -> None:
    """Mask units of each tensor, drawn without replacement in proportion to their squared gradient."""
    for ratio, params in zip(ratios, parameters.values(), strict=True):
        for p in params:
            if p.grad is None or p.grad.dim() < 2:
                continue
            energy = torch.zeros(p.shape[0])
            for unit in range(p.shape[0]):
                energy[unit] = (p.grad[unit] ** 2).sum()
            share = energy / energy.sum()
            drawn = torch.multinomial(share, math.ceil(p.shape[0] * ratio), replacement=False)
            mask = torch.zeros_like(share)
            mask[drawn] = 1 / (share[drawn] + 1 / p.shape[0]) if unbiased else 1.0
            p.grad *= mask.view(-1, *[1] * (p.grad.dim() - 1))


def diagnosis(features: np.ndarray, labels: np.ndarray, classes: int, seed: int) -> float:
    """Eq. 3: scale, cluster by scikit-learn, count the most frequent class of each cluster one by one."""
    scaled = need("sklearn.preprocessing").MinMaxScaler().fit_transform(features)
    found = (
        need("sklearn.cluster")
        .KMeans(n_clusters=classes, n_init="auto", random_state=seed)
        .fit(scaled)
        .labels_
    )
    right = 0
    for cluster in range(classes):
        own = labels[found == cluster]
        right += max((int((own == c).sum()) for c in range(classes)), default=0)
    return right / len(labels)


def soft_reinit(parameters: Parameters, initial: Mapping[str, Sequence[Tensor]], strength: float) -> None:
    """Eq. 6, one new tensor for each parameter."""
    for name, params in parameters.items():
        for p, first in zip(params, initial[name], strict=True):
            p.data = (1 - strength) * p.data + strength * first
