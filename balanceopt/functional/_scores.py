"""Uni-modal logits of a linear head, and the scores, discrepancy ratios and modal significance of uni-modal logits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Literal, get_args

import torch
from torch import Tensor

from balanceopt._options import check_choice, check_kind, check_number, check_tensor
from balanceopt.functional._dtypes import narrowed, wide
from balanceopt.functional._targets import Targets, as_targets

RatioReduction = Literal["mean_of_ratios", "ratio_of_means"]

# A score of 0 would make the other modalities' ratios infinite; the limit is far below 1/C for any C in use.
SMALLEST_SCORE = 1e-8


@torch.no_grad()
def linear_logits(features: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""Split the logits of a linear head over concatenated features by modality.

    $$\text{logits}^m = z^m {W^m}^\top + b / M$$

    so that the uni-modal logits add up to the joint logits.

    Args:
        features: M tensors `(B, D_m)`, in the order of concatenation; dimensions between the two stay.
        weight: `(C, D_1 + ... + D_M)`, the head's weight.
        bias: `(C,)`, the head's bias; None for no bias.

    Returns:
        Uni-modal logits `(M, B, C)`, in the widest dtype of the features.

    Raises:
        ValueError: if the features have other shapes, or their widths do not add up to the width of `weight`.
        TypeError: if `features` is not a sequence of tensors, or `weight` or `bias` not a tensor.

    Example:
        >>> z = [torch.ones(1, 2), torch.ones(1, 1)]
        >>> linear_logits(z, torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([2.0]))
        tensor([[[4.]],
        <BLANKLINE>
                [[5.]]])

    Reference:
        Peng et al., Balanced Multimodal Learning via On-the-fly Gradient Modulation, CVPR 2022, Eq. 8.
    """
    check_kind("`features`", features, (list, tuple), "a list of tensors (B, D_m), one for each modality")
    if len(features) == 0:
        raise ValueError("`features` should hold one tensor per modality. Found none.")
    for index, z in enumerate(features):
        check_tensor(f"features[{index}]", z, "(B, D_m)")
    check_tensor("weight", weight, "(C, D_1 + ... + D_M)", dims=(2,))
    if bias is not None:
        check_tensor("bias", bias, f"({len(weight)},)")
    shapes = {tuple(z.shape[:-1]) for z in features}
    if len(shapes) > 1 or () in shapes or not (bias is None or bias.shape == weight.shape[:1]):
        raise ValueError(
            "`features` should have shapes (B, D_m) and `bias` one entry for each row of `weight`. Found features of "
            f"shapes {[tuple(z.shape) for z in features]}, weight {tuple(weight.shape)}"
            f"{'' if bias is None else f', bias {tuple(bias.shape)}'}."
        )
    widths = [z.shape[-1] for z in features]
    if sum(widths) != weight.shape[1]:
        raise ValueError(
            f"`features` should have widths that add up to the {weight.shape[1]} columns of `weight`. "
            f"Found widths {widths}."
        )
    dtype = reduce(torch.promote_types, ((z if z.is_floating_point() else wide(z)).dtype for z in features))
    share = None if bias is None else (bias / len(features)).to(dtype)
    blocks = weight.to(dtype).split(widths, dim=1)
    return torch.stack(
        [torch.nn.functional.linear(z.to(dtype), w, share) for z, w in zip(features, blocks, strict=True)]
    )


@torch.no_grad()
def true_class_score(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    r"""Sum the true class's probability over the batch.

    $$S = \sum_{i\ \text{valid}} \text{softmax}(\text{logits}_i)_{y_i}$$

    Args:
        logits: `(..., B, C)`, with any leading dimensions, such as modalities.
        labels: `(B,)` class indices, or `(B, C)` class probabilities \(y\), where row i counts
            \(\sum_c y_{ic}\, \text{softmax}(\text{logits}_i)_c\).
        ignore_index: label of rows to ignore.

    Returns:
        Summed scores `(...)`, in [0, B].

    Raises:
        ValueError: if `logits` or `labels` have another shape or dtype, class indices lie outside [0, C), or soft
            labels are not probabilities.
        TypeError: if `logits` or `labels` is not a tensor.

    Example:
        >>> true_class_score(torch.zeros(2, 3, 4), torch.tensor([0, 3, -100]))
        tensor([0.5000, 0.5000])

    Reference:
        Peng et al., CVPR 2022, Eq. 8; the sums are those of Eq. 9.
    """
    _expect_rows(logits, labels)
    score, _ = row_scores(logits, as_targets(labels, logits.shape[-1], ignore_index))
    return narrowed(score.sum(-1), logits)


@torch.no_grad()
def row_scores(logits: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """Compute the score and log-likelihood (nats) of each row's label, `(..., B)` each; 0 where not valid.

    Soft labels give means over the classes, weighted by probability. Results are in float32 or wider.
    """
    log_p = wide(logits).log_softmax(-1)
    log_likelihood = targets.pick(log_p)
    score = log_likelihood.exp() if targets.index is not None else targets.pick(log_p.exp())
    return torch.where(targets.valid, score, 0), log_likelihood


@torch.no_grad()
def discrepancy_ratio(
    scores: Tensor, reduction: RatioReduction = "mean_of_ratios", present: Tensor | None = None
) -> Tensor:
    r"""Compute the discrepancy ratio of each modality's score to the other modalities' scores.

    $$\rho^m = \frac{1}{M-1} \sum_{j \ne m} \frac{S^m}{S^j}$$

    or, with `reduction="ratio_of_means"`, \(S^m\) over the mean of the other scores. Scores are clamped to at least
    1e-8. A single modality has ratio 1.

    Args:
        scores: `(M,)` non-negative scores (sums or means over the batch).
        reduction: `"mean_of_ratios"` or `"ratio_of_means"`; equal for M = 2.
        present: bool `(M,)`; False leaves a modality out of every mean, with ratio 1. None for all True.

    Returns:
        Discrepancy ratios `(M,)`; above 1 means dominant. The weakest modality's is at most 1 (up to rounding).

    Raises:
        ValueError: if `scores` or `present` has another shape or dtype, or `reduction` is unknown.
        TypeError: if `scores` or `present` is not a tensor.

    Example:
        >>> discrepancy_ratio(torch.tensor([4.0, 2.0]))
        tensor([2.0000, 0.5000])

    Reference:
        CVPR 2022, Eq. 9 (M = 2); Wei et al., TPAMI 2024, Eq. 7 (any M).
    """
    check_tensor("scores", scores, "(M,)", dims=(1,), empty=False)
    check_choice("reduction", reduction, get_args(RatioReduction))
    size = scores.shape[0]
    s = wide(scores).clamp(min=SMALLEST_SCORE)
    here = present_or_all(present, s)
    if size == 1:
        return narrowed(torch.ones_like(s), scores)
    # Sums over j != m are computed directly, because subtracting the m-th term from a total would cancel digits.
    counted = here & ~torch.eye(size, dtype=torch.bool, device=s.device)
    others = counted.sum(1)
    if reduction == "mean_of_ratios":
        ratio = torch.where(counted, s.unsqueeze(1) / s.unsqueeze(0), 0).sum(1) / others
    else:
        ratio = s / (torch.where(counted, s, 0).sum(1) / others)
    return narrowed(torch.where(here & (others > 0), ratio, 1), scores)


@torch.no_grad()
def modal_significance(
    logits: Tensor,
    features: Sequence[Tensor],
    labels: Tensor,
    offset: float = 0.5,
    ignore_index: int = -100,
) -> Tensor:
    r"""Compute the mutual-information rate between each modality's features and the labels.

    $$u^m = \frac{H(Y) - \text{CE}(\text{logits}^m, y) + c_0}{H(Z^m)}$$

    with true entropies in nats: \(H(Y)\) of the batch's labels, \(H(Z^m)\) the mean entropy of softmax over the
    features of a sample.

    Args:
        logits: `(M, B, C)` uni-modal logits.
        features: M tensors `(B, D_m)`; further dimensions are flattened.
        labels: `(B,)` class indices or `(B, C)` class probabilities.
        offset: constant \(c_0\), in nats.
        ignore_index: label of rows to ignore.

    Returns:
        Modal significance `(M,)`, not finite where the batch has no valid row or D_m is 1.

    Raises:
        ValueError: if shapes disagree, labels lie outside [0, C), or `offset` is not finite.
        TypeError: if `logits` or `labels` is not a tensor, or `features` not a sequence of tensors.

    Example:
        >>> modal_significance(torch.zeros(1, 2, 2), [torch.zeros(2, 2)], torch.tensor([0, 1]))
        tensor([0.7213])

    Reference:
        Yang et al., AMSS (TPAMI 2024), as in the published code, with corrected entropies (docs/methods/amss.md).
    """
    _expect_rows(logits, labels)
    check_number("offset", offset)
    check_kind("`features`", features, (list, tuple), "a list of tensors (B, D_m), one for each modality")
    if logits.dim() != 3 or len(features) != logits.shape[0]:
        raise ValueError(
            f"`logits` should have shape (M, B, C) with M = {len(features)} features. Found {tuple(logits.shape)}."
        )
    targets = as_targets(labels, logits.shape[-1], ignore_index)
    for index, z in enumerate(features):
        check_tensor(f"features[{index}]", z, "(B, D_m)")
        if z.shape[:1] != logits.shape[1:2]:
            raise ValueError(
                f"`features[{index}]` should have one row for each of the {logits.shape[1]} samples. "
                f"Found shape {tuple(z.shape)}."
            )
    entropy = torch.stack([feature_entropy(z) for z in features])
    significance = significance_from_baseline(
        losses=-row_scores(logits, targets)[1].sum(-1),
        feature_entropy=torch.where(targets.valid, entropy, 0).sum(-1),
        baseline=label_entropy(targets.class_counts()),
        count=targets.valid.sum().to(entropy.dtype).expand(len(features)),
        offset=offset,
    )
    return narrowed(significance, logits)


@torch.no_grad()
def significance_from_baseline(
    losses: Tensor, feature_entropy: Tensor, baseline: Tensor, count: Tensor, offset: float = 0.5
) -> Tensor:
    r"""Compute the modal significance from sums over micro-batches and ranks, for any loss.

    $$u^m = \frac{(l_0 - \bar l^m) / \tau + c_0}{H(Z^m)}$$

    which is the mutual-information rate for cross-entropy, where \(l_0\) is the entropy of the labels and \(\tau = 1\).

    Args:
        losses: `(M,)` summed uni-modal losses, in units of tau.
        feature_entropy: `(M,)` summed entropies of the samples' features, nats.
        baseline: 0-d, \(l_0 / \tau\).
        count: `(M,)` number of samples in each sum.
        offset: constant \(c_0\).

    Returns:
        Modal significance u `(M,)`, in the dtype of `losses`.

    Raises:
        ValueError: if a sum has another shape or dtype, or `offset` is not finite.
        TypeError: if a sum is not a tensor.

    Example:
        >>> two = torch.tensor([2.0])
        >>> significance_from_baseline(2 * two.log(), 2 * two.log(), two.log()[0], two)
        tensor([0.7213])

    Reference:
        ours; reduces to Yang et al., AMSS (TPAMI 2024), for cross-entropy.
    """
    sums = {"losses": losses, "feature_entropy": feature_entropy, "count": count}
    for name, values in sums.items():
        check_tensor(name, values, "(M,)", dims=(1,))
    if len({values.shape for values in sums.values()}) > 1:
        raise ValueError(
            "`losses`, `feature_entropy` and `count` should have one entry for each modality. Found shapes "
            f"{[tuple(values.shape) for values in sums.values()]}."
        )
    check_tensor("baseline", baseline, "()", dims=(0,))
    check_number("offset", offset)
    information = wide(baseline) - wide(losses) / wide(count) + offset
    return narrowed(information / (wide(feature_entropy) / wide(count)), losses)


def label_entropy(counts: Tensor) -> Tensor:
    """Compute the entropy in nats, 0-d, of the labels of which there are `counts` `(C,)`."""
    entropy: Tensor = torch.special.entr(counts / counts.sum()).sum()
    return entropy


@torch.no_grad()
def feature_entropy(features: Tensor) -> Tensor:
    """Compute the entropy `(B,)` in nats of softmax over each sample's features `(B, ...)`, in float32 or wider.

    Raises:
        ValueError: if `features` is complex or 0-d.
        TypeError: if `features` is not a tensor.
    """
    check_tensor("features", features, "(B, ...)")
    if features.dim() == 0:
        raise ValueError("`features` should have shape (B, ...). Found a single number.")
    flat = features.flatten(1) if features.dim() > 1 else features.unsqueeze(1)
    entropy: Tensor = torch.special.entr(wide(flat).softmax(-1)).sum(-1)
    return entropy


def present_or_all(present: Tensor | None, values: Tensor) -> Tensor:
    """Return `present` as checked flags, bool `(M,)`, all True for None.

    Raises:
        ValueError: if `present` is not one bool for each of the `values`.
        TypeError: if `present` is not a tensor.
    """
    if present is None:
        return torch.ones(values.shape, dtype=torch.bool, device=values.device)
    check_tensor("present", present, f"({len(values)},)", dims=(1,), kind="bool")
    if len(present) != len(values):
        raise ValueError(
            f"`present` should have one flag for each of the {len(values)} modalities. Found {len(present)}."
        )
    return present


def _expect_rows(logits: Tensor, labels: Tensor) -> None:
    check_tensor("logits", logits, "(..., B, C)")
    check_tensor("labels", labels, "(B,) or (B, C)")
    if logits.dim() < 2 or labels.shape[:1] != logits.shape[-2:-1]:
        raise ValueError(
            "`logits` should have shape (..., B, C) and `labels` (B,). "
            f"Found {tuple(logits.shape)} and {tuple(labels.shape)}."
        )
