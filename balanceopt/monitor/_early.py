"""Scores of a pass whose labels are known already, once its encoders have run and before its fusion does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from balanceopt.monitor._pass import Pass
from balanceopt.monitor._per_head import PerHead
from balanceopt.monitor._settle import settle
from balanceopt.monitor._split import SplitHead
from balanceopt.monitor._sums import ModalitySums
from balanceopt.monitor._unimodal import UnimodalLogits, UserFunction
from balanceopt.monitor._zero_out import ZeroOut


def can_score_early(scores: UnimodalLogits | None, modalities: Sequence[str]) -> bool:
    """Whether the features alone tell the uni-modal logits: for split and per-head once a pass has shown the way."""
    if isinstance(scores, (SplitHead, PerHead)):
        return scores.projections.keys() >= set(modalities)
    return isinstance(scores, (ZeroOut, UserFunction))


@torch.no_grad()
def early_sums(
    scores: UnimodalLogits | None, current: Pass, modalities: Sequence[str], ignore_index: int
) -> ModalitySums | None:
    """The sums that the pass will contribute, where `can_score_early`; None without labels."""
    logits: dict[str, Tensor] = {}
    if isinstance(scores, (ZeroOut, UserFunction)):
        logits = current.early = scores(current)  # not made a second time at the forward's end
    elif isinstance(scores, (SplitHead, PerHead)):
        logits = {name: scores.clean(name, z) for name, z in current.features.items()}
    if not logits:
        return None
    known = Pass(
        unimodal=logits,
        logits=next(iter(logits.values())),
        labels=current.labels,
        label_source=current.label_source,
        present=current.present,
    )
    return settle(known, modalities, ignore_index)
