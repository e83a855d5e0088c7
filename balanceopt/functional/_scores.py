"""From uni-modal logits to scores, ratios of scores, and modal significance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from balanceopt.functional._targets import as_targets

RatioReduction = Literal["mean_of_ratios", "ratio_of_means"]

# A score of 0 would make the other modalities' ratios infinite. Far below 1/C for any C in use.
SMALLEST_SCORE = 1e-8


@torch.no_grad()
def true_class_score(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    r"""Sum over the batch of the probability given to the true class.

    $$S = \sum_{i\ \text{valid}} \text{softmax}(\text{logits}_i)_{y_i}$$

    Args:
        logits: `(..., B, C)`; leading dimensions (modalities) are kept.
        labels: `(B,)` class indices, or `(B, C)` class probabilities \(y\), where row i counts
            \(\sum_c y_{ic}\, \text{softmax}(\text{logits}_i)_c\).
        ignore_index: label of rows that do not count.

    Returns:
        `(...)`, the summed scores, in [0, B].

    Raises:
        ValueError: if `labels` have another shape, another kind, or lie outside [0, C).

    Example:
        >>> true_class_score(torch.zeros(2, 3, 4), torch.tensor([0, 3, -100]))
        tensor([0.5000, 0.5000])

    Reference:
        Peng et al., CVPR 2022, Eq. 8; the sums are those of Eq. 9.
    """
    _expect_rows(logits, labels)
    probabilities = logits.to(_wide(logits)).softmax(-1)
    score = as_targets(labels, logits.shape[-1], ignore_index).pick(probabilities).sum(-1)
    return score.to(logits.dtype)


@torch.no_grad()
def discrepancy_ratio(
    scores: Tensor, reduction: RatioReduction = "mean_of_ratios", present: Tensor | None = None
) -> Tensor:
    r"""How far each modality's score is above the others'.

    $$\rho^m = \frac{1}{M-1} \sum_{j \ne m} \frac{S^m}{S^j}$$

    or, with `reduction="ratio_of_means"`, \(S^m\) over the mean of the others. Scores below 1e-8 are taken as 1e-8. A
    single modality has ratio 1.

    Args:
        scores: `(M,)` non-negative scores (sums or means over the batch).
        reduction: `"mean_of_ratios"` or `"ratio_of_means"`; equal for M = 2.
        present: bool `(M,)`; the others are left out of every mean and have ratio 1. None for all.

    Returns:
        `(M,)`; above 1 means dominant. The weakest modality is never above 1 (up to rounding).

    Raises:
        ValueError: if `scores` is not one-dimensional or `reduction` is unknown.

    Example:
        >>> discrepancy_ratio(torch.tensor([4.0, 2.0]))
        tensor([2.0000, 0.5000])

    Reference:
        CVPR 2022, Eq. 9 (M = 2); Wei et al., TPAMI 2024, Eq. 7 (any M).
    """
    if scores.dim() != 1 or scores.numel() == 0:
        raise ValueError(f"`scores` should have shape (M,), M >= 1. Found {tuple(scores.shape)}.")
    if reduction not in ("mean_of_ratios", "ratio_of_means"):
        raise ValueError(f"`reduction` should be 'mean_of_ratios' or 'ratio_of_means'. Found {reduction!r}.")
    size = scores.shape[0]
    if size == 1:
        return torch.ones_like(scores)
    s = scores.to(_wide(scores)).clamp(min=SMALLEST_SCORE)
    here = torch.ones(size, dtype=torch.bool, device=s.device) if present is None else present
    # Sums over j != m are taken as such: subtracting the m-th term from a total would cancel digits.
    counted = here & ~torch.eye(size, dtype=torch.bool, device=s.device)
    others = counted.sum(1)
    if reduction == "mean_of_ratios":
        ratio = torch.where(counted, s.unsqueeze(1) / s.unsqueeze(0), 0).sum(1) / others
    else:
        ratio = s / (torch.where(counted, s, 0).sum(1) / others)
    return torch.where(here & (others > 0), ratio, 1).to(scores.dtype)


@torch.no_grad()
def modal_significance(
    logits: Tensor,
    features: Sequence[Tensor],
    labels: Tensor,
    offset: float = 0.5,
    ignore_index: int = -100,
) -> Tensor:
    r"""Mutual-information rate between each modality's features and the labels.

    $$u^m = \frac{H(Y) - \text{CE}(\text{logits}^m, y) + c_0}{H(Z^m)}$$

    with true entropies in nats: \(H(Y)\) of the batch's labels, \(H(Z^m)\) the mean entropy of softmax over the
    features of a sample.

    Args:
        logits: `(M, B, C)` uni-modal logits.
        features: M tensors `(B, D_m)`; more dimensions are flattened.
        labels: `(B,)` class indices or `(B, C)` class probabilities.
        offset: \(c_0\), in nats.
        ignore_index: label of rows that do not count.

    Returns:
        `(M,)`. Not finite where the batch has no valid row or a feature has a single dimension.

    Raises:
        ValueError: if shapes disagree or labels lie outside [0, C).

    Example:
        >>> modal_significance(torch.zeros(1, 2, 2), [torch.zeros(2, 2)], torch.tensor([0, 1]))
        tensor([0.7213])

    Reference:
        Yang et al., AMSS (TPAMI 2024), as in the published code, with its entropies mended (docs/methods/amss.md).
    """
    _expect_rows(logits, labels)
    if logits.dim() != 3 or len(features) != logits.shape[0]:
        raise ValueError(
            f"`logits` should have shape (M, B, C) with M = {len(features)} features. Found {tuple(logits.shape)}."
        )
    targets = as_targets(labels, logits.shape[-1], ignore_index)
    entropy = torch.stack([feature_entropy(z) for z in features])
    return significance_from_sums(
        cross_entropy=-targets.pick(logits.to(_wide(logits)).log_softmax(-1)).sum(-1),
        feature_entropy=torch.where(targets.valid, entropy, 0).sum(-1),
        label_counts=targets.class_counts(),
        count=targets.valid.sum().to(entropy.dtype).expand(len(features)),
        offset=offset,
    ).to(logits.dtype)


@torch.no_grad()
def significance_from_sums(
    cross_entropy: Tensor, feature_entropy: Tensor, label_counts: Tensor, count: Tensor, offset: float = 0.5
) -> Tensor:
    r"""`modal_significance` from sums over micro-batches and ranks.

    Args:
        cross_entropy: `(M,)` summed uni-modal cross-entropies, nats.
        feature_entropy: `(M,)` summed entropies of the samples' features, nats.
        label_counts: `(C,)` how often each class occurred.
        count: `(M,)` how many samples each sum holds.
        offset: \(c_0\), in nats.

    Returns:
        `(M,)`, the significance u.

    Example:
        >>> two = torch.tensor([2.0])
        >>> significance_from_sums(2 * two.log(), 2 * two.log(), torch.ones(2), two)
        tensor([0.7213])

    Reference:
        As `modal_significance`.
    """
    frequency = label_counts / label_counts.sum()
    label_entropy: Tensor = torch.special.entr(frequency).sum()
    information = label_entropy - cross_entropy / count + offset
    return information / (feature_entropy / count)


@torch.no_grad()
def feature_entropy(features: Tensor) -> Tensor:
    """Entropy in nats of softmax over each sample's features, `(B, ...)` to `(B,)`."""
    flat = features.flatten(1) if features.dim() > 1 else features.unsqueeze(1)
    entropy: Tensor = torch.special.entr(flat.to(_wide(flat)).softmax(-1)).sum(-1)
    return entropy


def _wide(x: Tensor) -> torch.dtype:
    """The dtype to reduce in: float32, or float64 if the input is."""
    return torch.promote_types(x.dtype, torch.float32)


def _expect_rows(logits: Tensor, labels: Tensor) -> None:
    if logits.dim() < 2 or labels.shape[:1] != logits.shape[-2:-1]:
        raise ValueError(
            "`logits` should have shape (..., B, C) and `labels` (B,). "
            f"Found {tuple(logits.shape)} and {tuple(labels.shape)}."
        )
