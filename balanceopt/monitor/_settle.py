"""From a finished pass to the sums it contributes: find its labels, score its uni-modal logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from balanceopt.functional._labels import INVALID
from balanceopt.functional._targets import Targets, as_targets
from balanceopt.monitor._pass import Pass
from balanceopt.monitor._recovery import Recovery
from balanceopt.monitor._recovery import two_classes as two_classes
from balanceopt.monitor._sums import ModalitySums


@torch.no_grad()
def settle(
    done: Pass, modalities: Sequence[str], ignore_index: int, recovery: Recovery | None = None
) -> ModalitySums | None:
    """The sums of a pass that backward has reached; None where it has no uni-modal logits or no labels.

    Raises:
        ValueError: if the labels given don't fit the logits.
        RuntimeError: if those read from gradients are too doubtful.
    """
    if not done.unimodal or done.logits is None:
        return None
    if done.labels is not None:
        targets = _given(done, ignore_index)
    elif done.gradients and recovery is not None:
        labels = recovery.labels(done.gradients, done.logits)
        targets = as_targets(labels, max(done.logits.shape[-1], 2), INVALID)
    else:
        return None
    return _sums(done, targets, modalities)


def _given(done: Pass, ignore_index: int) -> Targets:
    assert done.labels is not None and done.logits is not None
    rows, classes = done.logits.shape
    labels = done.labels.to(done.logits.device)
    if classes == 1:
        labels, classes = _binary(labels), 2
    soft = labels.is_floating_point() and labels.dim() > 1
    per_row = labels.flatten(0, -2) if soft else labels.flatten()
    if per_row.shape[0] != rows:
        raise ValueError(
            f"labels from {done.label_source} should have one entry for each of the {rows} rows of the logits. "
            f"Found shape {tuple(labels.shape)}."
        )
    return as_targets(per_row, classes, ignore_index)


def _binary(labels: Tensor) -> Tensor:
    """Binary labels, often kept as floats for BCEWithLogitsLoss (and then perhaps smoothed), as class indices."""
    if not labels.is_floating_point():
        return labels.long()
    inside = (labels > 0) & (labels < 1)
    return torch.where(inside, labels.round(), labels).long()


def _sums(done: Pass, targets: Targets, modalities: Sequence[str]) -> ModalitySums:
    """Scores, cross-entropies, entropies and counts of every modality, in batched operations."""
    assert done.unimodal is not None
    absent = torch.zeros_like(next(iter(done.unimodal.values())))
    logits = two_classes(torch.stack([done.unimodal.get(name, absent) for name in modalities]))
    rows = logits.shape[1]
    everyone, nothing = torch.ones_like(targets.valid), logits.new_zeros(rows)
    present = [
        _by_row(done.present.get(name, everyone), rows, logits) if name in done.unimodal else ~everyone
        for name in modalities
    ]
    valid = targets.valid & torch.stack(present)
    entropy = torch.stack([_by_row(done.entropies.get(name, nothing), rows, logits) for name in modalities])
    log_p = logits.log_softmax(-1)
    log_score = targets.pick(log_p)
    score = targets.pick(log_p.exp()) if targets.index is None else log_score.exp()
    parts = torch.stack([score, torch.ones_like(score), -log_score, entropy])
    sums = torch.where(valid, parts, 0).sum(-1)
    return ModalitySums(sums[0], sums[1], sums[2], sums[3], targets.class_counts())


def _by_row(per_sample: Tensor, rows: int, like: Tensor) -> Tensor:
    """A value for each sample spread over that sample's rows (several where logits have positions)."""
    per_sample = per_sample.to(like.device)
    if per_sample.shape[0] == rows:
        return per_sample
    if per_sample.shape[0] == 0 or rows % per_sample.shape[0]:
        raise ValueError(
            f"`present` should have one entry for each sample, a divisor of the {rows} rows. "
            f"Found {per_sample.shape[0]}."
        )
    return per_sample.repeat_interleave(rows // per_sample.shape[0])
