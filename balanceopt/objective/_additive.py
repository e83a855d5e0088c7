"""Each modality's part of joint logits that are a sum over modalities, attached to the graph."""

from __future__ import annotations

import torch
from torch import Tensor

from balanceopt._options import shown
from balanceopt._pooling import samples_in
from balanceopt.monitor import ModalityMonitor, UnimodalLogits, require_scores


def check_classes(monitor: ModalityMonitor, why: str) -> None:
    """Raise if the monitor's loss is no cross-entropy, and say why a term needs one.

    Raises:
        ValueError: for a monitor of another loss.
    """
    if not monitor.labels.loss.has_classes:
        raise ValueError(
            f"`monitor` should be one of cross-entropy, with `loss=None` or nn.CrossEntropyLoss(): {why}. Found "
            f"loss={shown(monitor.loss)}. UnimodalObjective takes any loss."
        )


def additive_logits(monitor: ModalityMonitor, who: str) -> UnimodalLogits:
    """Return the monitor's uni-modal logits, whose sum over modalities is the joint logits.

    Raises:
        ValueError: for a monitor without a head, and any fusion whose logits are no such sum.
    """
    require_scores(monitor, who)
    assert monitor.unimodal is not None
    if not monitor.unimodal.are_parts:
        raise ValueError(
            f"{who} needs joint logits that are a sum over modalities: a linear head on concatenated features "
            f"(scores='split') or a head for each modality ('per-head'). Found {monitor.unimodal.name!r}. For this "
            "fusion use UnimodalObjective, whose separate heads train each encoder."
        )
    return monitor.unimodal


def logits_by_sample(
    monitor: ModalityMonitor,
    unimodal: UnimodalLogits,
    name: str,
    features: Tensor,
    samples: int,
    present: Tensor | None,
) -> Tensor:
    """Return a modality's logits `(B, C)` of clean features, a row for each sample; 0 for those that lack the modality.

    Args:
        monitor: the model's monitor.
        unimodal: result of `additive_logits`.
        name: the modality.
        features: features of all samples, or of those that have the modality.
        samples: number of samples B.
        present: bool `(B,)`, samples that have the modality; None where not given by the user.

    Raises:
        ValueError: for features of another number of samples.
        RuntimeError: if no pass has shown how the features become the head's input.
    """
    frames = monitor.features.projections.get(name) is not None
    rows = unimodal.live(name, features, samples_in(name, features, samples, present, frames=frames))
    if present is None:
        return rows
    present = present.to(rows.device)
    if len(rows) != samples:
        if not len(rows):
            return rows.new_zeros(samples, rows.shape[1])
        rows = rows[(present.cumsum(0) - 1).clamp(min=0)]  # without device synchronisation, unlike a mask
    return torch.where(present.unsqueeze(1), rows, 0)
