"""What the monitor's tests share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import balanceopt as bo
from balanceopt.monitor import Scores
from balanceopt.monitor._forward import Pass
from tests.models import Multimodal, train_step, watch


class Spy:
    """Sees every pass while its uni-modal logits are still there."""

    def __init__(self, monitor: bo.ModalityMonitor) -> None:
        self.passes: list[Pass] = []
        self.unimodal: list[dict[str, Tensor]] = []
        self.gradients: list[Tensor] = []
        self.scores = monitor.scores()  # a pass has uni-modal logits where somebody collects scores
        monitor.hooks.gradients.add(self._on_gradient)

    def _on_gradient(self, current: Pass, gradient: Tensor) -> None:
        self.passes.append(current)
        self.unimodal.append(dict(current.unimodal or {}))
        self.gradients.append(gradient)


def flat(scores: Scores) -> Tensor:
    """All sums in one tensor."""
    return torch.cat(
        [scores.score, scores.count, scores.cross_entropy, scores.feature_entropy, scores.label_counts]
    )


def added(a: Scores, b: Scores) -> Scores:
    """The scores of two passes together."""
    return Scores(
        a.score + b.score,
        a.count + b.count,
        a.cross_entropy + b.cross_entropy,
        a.feature_entropy + b.feature_entropy,
        a.parts + b.parts,
        a.loss,
    )


def step(monitor: bo.ModalityMonitor, model: Any, inputs: Sequence[Tensor], labels: Tensor) -> Scores | None:
    """One training pass; what a fresh consumer takes from it."""
    accumulator = monitor.scores()
    train_step(model, inputs, labels)
    taken = accumulator.take()
    accumulator.remove()
    return taken


def sums_of(model: Multimodal, inputs: Sequence[Tensor], labels: Tensor, **options: Any) -> Scores | None:
    """One training pass under a monitor of its own."""
    with watch(model, **options) as monitor:
        return step(monitor, model, inputs, labels)


def unimodal_of(
    model: Multimodal, inputs: Sequence[Tensor], labels: Tensor, **options: Any
) -> dict[str, Tensor]:
    """The uni-modal logits of one training pass."""
    with watch(model, **options) as monitor:
        spy = Spy(monitor)
        train_step(model, inputs, labels)
        (unimodal,) = spy.unimodal
        return unimodal


def score(logits: Tensor, labels: Tensor) -> float:
    """Naive: the summed probability of the labels."""
    return sum(
        float(row.softmax(0)[y]) for row, y in zip(logits.detach(), labels.tolist(), strict=True) if y >= 0
    )


def columns_by_hand(model: Any) -> dict[str, slice]:
    """Where a `Concat` puts each modality."""
    found, start = {}, 0
    for i in model.order:
        found[model.names[i]] = slice(start, start + model.widths[i])
        start += model.widths[i]
    return found


def eq8(model: Any, name: str, features: Tensor, columns: slice) -> Tensor:
    """`W^m z^m + b / M`."""
    bias = None if model.head.bias is None else model.head.bias / len(model.names)
    return F.linear(features, model.head.weight[:, columns], bias).detach()


def no_hooks(model: torch.nn.Module) -> bool:
    return not any(
        hooks for module in model.modules() for name, hooks in vars(module).items() if name.endswith("_hooks")
    )
