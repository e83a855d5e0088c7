"""Labels of a pass read from gradients: how many rows told theirs, and what to say where too few did."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from balanceopt._deferred import DeferredCounts
from balanceopt._warnings import warn_user
from balanceopt.functional import recover_labels
from balanceopt.functional._labels import INVALID

# Under plain cross-entropy no row has two negative gradients; this many may come from rounding.
_AMBIGUOUS_PART = 0.01
# Under plain cross-entropy every row with a gradient tells its label.
_TOLD_PART = 0.5
_FEWEST_CLASSES_FOR_LINE = 4

_CURE = "Pass labels via monitor.observe(labels) or monitor.watch_loss(loss)."


class Recovery:
    """Reads labels, and counts without waiting for a device."""

    def __init__(self, *, strict: bool) -> None:
        """Count rows; `strict` raises where labels are doubtful."""
        self.strict = strict
        self._counts = DeferredCounts(("rows", "ambiguous", "told"), self._judge)
        self._classes = 2
        self._warned: set[str] = set()

    def labels(self, gradients: Sequence[Tensor], logits: Tensor) -> Tensor:
        """`(N,)` labels from the first backward that shows them, row by row; -100 where none does.

        Raises:
            RuntimeError: if too many rows are doubtful, and `strict` or few classes leave no better guess.
        """
        labels = torch.full(logits.shape[:1], INVALID, device=logits.device)
        ambiguous, graded = (
            torch.zeros_like(labels, dtype=torch.bool),
            torch.zeros_like(labels, dtype=torch.bool),
        )
        pairs = two_classes(logits)
        for gradient in gradients:
            g = torch.cat([-gradient, gradient], -1) if logits.shape[-1] == 1 else gradient
            read = recover_labels(g, pairs)
            unknown = labels == INVALID
            labels = torch.where(unknown, read.labels, labels)
            ambiguous |= unknown & read.ambiguous
            largest = g.abs().amax(1)
            graded |= torch.isfinite(largest) & (largest > 0)
        self._classes = pairs.shape[-1]
        self._counts.add(graded.sum(), ambiguous.sum(), (labels != INVALID).sum())
        return labels

    def counts(self) -> dict[str, int]:
        """Rows with a gradient, and how many of them looked unlike hard-label cross-entropy."""
        found = self._counts.read()
        return {"rows": found["rows"], "ambiguous": found["ambiguous"]}

    def _judge(self, counts: dict[str, int]) -> None:
        if counts["ambiguous"] > _AMBIGUOUS_PART * counts["rows"]:
            message = (
                f"{counts['ambiguous']} of {counts['rows']} rows have several negative gradients at the logits: soft "
                "targets, label smoothing or an auxiliary loss on the logits. Labels recovered from them may be wrong. "
                + _CURE
            )
            if self.strict or self._classes < _FEWEST_CLASSES_FOR_LINE:
                raise RuntimeError(message)
            self._warn("ambiguous", message)
        elif counts["told"] < _TOLD_PART * counts["rows"]:
            message = (
                f"the gradients of only {counts['told']} of {counts['rows']} rows at the logits tell a label: the loss "
                "is not cross-entropy. " + _CURE
            )
            if self.strict:
                raise RuntimeError(message)
            self._warn("told", message)

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warn_user(message)


def two_classes(logits: Tensor) -> Tensor:
    """A single logit z is the pair (0, z): softmax of it is the sigmoid."""
    return torch.cat([torch.zeros_like(logits), logits], -1) if logits.shape[-1] == 1 else logits
