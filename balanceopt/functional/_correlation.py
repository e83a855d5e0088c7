"""TCMax's loss: a bound on the total correlation of all modalities' features and the label, in a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from balanceopt._options import check_kind, check_tensor, shown
from balanceopt.functional._dtypes import wide
from balanceopt.functional._targets import as_targets

# Log-sum of no row: exp() of it is 0, and sums of it over modalities stay finite, as infinity's gradient would not.
_NO_ROW = -1e30


class CorrelationSums(NamedTuple):
    """What the rows of a batch add to the total correlation loss.

    Attributes:
        log_sums: `(M, C)` logarithms of each modality's sums over rows of exp(logits).
        label_sum: 0-d, sum over rows of the joint logit at the label.
        samples: 0-d, number of rows with a valid label.
    """

    log_sums: Tensor
    label_sum: Tensor
    samples: Tensor


def total_correlation_loss(logits: Sequence[Tensor], labels: Tensor, ignore_index: int = -100) -> Tensor:
    r"""Compute TCMax's loss of additive logits: joint samples against all combinations of the batch's features.

    $$L = \log \sum_{i_1, \dots, i_M} \sum_y \exp \sum_m s^m_{i_m, y} - \frac{1}{B} \sum_i \sum_m s^m_{i, y_i} - \log B
    = \log \sum_y \prod_m \sum_j \exp s^m_{j, y} - \frac{1}{B} \sum_i \sum_m s^m_{i, y_i} - \log B$$

    The second form, in O(M B C), is exact for any number M of modalities. L >= 0; for a batch of one sample it is the
    cross-entropy of the sum of the logits.

    Args:
        logits: uni-modal logits, M tensors `(B, C)` whose sum is the joint logits; 0 in rows of samples that lack a
            modality.
        labels: class indices `(B,)`.
        ignore_index: label of rows that are left out of both terms.

    Returns:
        0-d, float32 or wider, with a gradient to all logits; 0 without any valid label.

    Raises:
        ValueError: if `logits` are not of one shape `(B, C)` with C >= 2, or `labels` are not class indices `(B,)`.
        TypeError: if `logits` is no sequence of tensors, or `labels` is not a tensor.

    Example:
        >>> audio, visual = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 2)
        >>> total_correlation_loss([audio, visual], torch.tensor([0, 1]))
        tensor(0.9938)

    Reference:
        Yu et al., Multimodal Classification via Total Correlation Maximization, ICLR 2026.
    """
    return total_correlation(correlation_sums(logits, labels, ignore_index))


def correlation_sums(logits: Sequence[Tensor], labels: Tensor, ignore_index: int = -100) -> CorrelationSums:
    """Compute what rows add to `total_correlation_loss`, in float32 or wider, with a gradient to the logits."""
    check_kind("`logits`", logits, (list, tuple), "a list of tensors (B, C), one for each modality")
    if not logits:
        raise ValueError("`logits` should be a tensor (B, C) for each modality. Found none.")
    for x in logits:
        check_tensor("logits", x, "(B, C) for each modality", dims=(2,))
        if x.shape != logits[0].shape or x.shape[1] < 2:
            raise ValueError(
                "`logits` should have one shape (B, C), C >= 2, for all modalities. "
                f"Found {[tuple(x.shape) for x in logits]}."
            )
    check_class_indices(labels)
    if len(labels) != len(logits[0]):
        raise ValueError(
            f"`labels` should have one entry for each of {len(logits[0])} rows. Found {len(labels)}."
        )
    values = wide(torch.stack(list(logits)))
    targets = as_targets(labels.to(values.device), values.shape[2], ignore_index)
    rows = torch.where(targets.valid.unsqueeze(1), values, _NO_ROW).clamp(min=_NO_ROW)
    return CorrelationSums(
        rows.logsumexp(1).clamp(min=_NO_ROW), targets.pick(values).sum(), targets.valid.sum().to(values.dtype)
    )


def total_correlation(sums: CorrelationSums) -> Tensor:
    """Compute `total_correlation_loss` from the sums over a batch's rows; 0 without any."""
    count = sums.samples.clamp(min=1)
    loss = sums.log_sums.sum(0).logsumexp(0) - sums.label_sum / count - count.log()
    return torch.where(sums.samples > 0, loss, 0)


def check_class_indices(labels: object) -> None:
    """Check that labels are one class index for each sample.

    Raises:
        TypeError: if `labels` is not a tensor.
        ValueError: for another shape or dtype.
    """
    if isinstance(labels, Tensor) and (labels.is_floating_point() or labels.dim() != 1):
        raise ValueError(
            "`labels` should be class indices (B,), one for each sample: the loss is over combinations of features "
            "with one class. Soft labels, several labels, positions and regression have UnimodalObjective. "
            f"Found {shown(labels)}."
        )
    check_tensor("labels", labels, "(B,)", kind="integer")
