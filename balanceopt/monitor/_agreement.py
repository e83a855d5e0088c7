"""Check of given labels against the gradient at the logits, which refutes labels that the loss did not use."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from balanceopt._deferred import DeferredCounts
from balanceopt._warnings import warn_user
from balanceopt.functional import Targets
from balanceopt.monitor._labels import NO_CLASSES, of_two_classes, two_classes

# Fewer rows may come from one mixed batch (mixup); a loss inside the model mixes no samples.
_FEWEST_ROWS, _FEWEST_ROWS_OF_MODEL = 32, 4
# Under cross-entropy no row contradicts its label, so half of the rows is far above rounding.
_REFUTED_PART = 0.5
# Largest difference by rounding, in bfloat16 too, between labels smoothed by the same amount.
_ALIKE = 0.01


class Agreement:
    """Count by label source the rows whose gradient contradicts their label, without device synchronisation.

    A row is informative if its label is not the most probable class: a classification loss, smoothed or not, then
    raises the label's logit and lowers the logit of the most probable class.

    Attributes:
        refuted: whether the gradient has refuted the `labels=` given to the model.
    """

    def __init__(self, *, recovers: bool) -> None:
        """Accept labels from any source; with `recovers` the gradient may replace the labels given to the model."""
        self.refuted = False
        self._recovers = recovers
        self._counts: dict[str, DeferredCounts] = {}
        self._graded = DeferredCounts(("graded",), _refuse_graded)

    def binary(self, labels: Tensor, ignore_index: int) -> Tensor:
        """Return the labels of a single logit, often floats for BCEWithLogitsLoss, as class indices.

        Raises:
            ValueError: if the labels are neither 0 and 1 nor smoothed by one amount for each class.
        """
        if labels.is_floating_point() and labels.numel():
            valid = labels != ignore_index
            graded = (valid & ~((labels >= 0) & (labels <= 1))).any()
            for side in (valid & (labels > 0.5), valid & (labels <= 0.5)):
                most, least = (torch.where(side, x, -torch.inf).max() for x in (labels, -labels))
                graded |= most + least > _ALIKE
            self._graded.add(graded=graded)
            labels = labels.round()
        return labels.long()

    def compare(
        self, source: str, targets: Targets, gradients: Sequence[Tensor], logits: Tensor, shape: torch.Size
    ) -> None:
        """Count the rows of a pass whose class indices, of this `shape`, contradict the gradients `(N, C)`.

        Raises:
            RuntimeError: if most rows so far contradict their labels, and the gradient may not replace the labels.
        """
        if targets.index is None or not gradients:
            return
        top = two_classes(logits).argmax(1, keepdim=True)
        index = targets.index.unsqueeze(1)
        following = index.roll(-1, 0)
        pulled, shifted, graded = (torch.zeros_like(targets.valid) for _ in range(3))
        for gradient in gradients:
            g = of_two_classes(gradient)
            pulled |= (g.gather(1, index) < 0).squeeze(1)
            shifted |= (g.gather(1, following) < 0).squeeze(1)
            at_top = g.gather(1, top)
            graded |= (torch.isfinite(at_top) & (at_top != 0)).squeeze(1)
        tells = targets.valid & graded & (index != top).squeeze(1)
        refuted = tells & ~pulled
        if len(shape) < 2:
            shifted = torch.zeros_like(shifted)
        if source not in self._counts:
            self._counts[source] = DeferredCounts(
                ("rows", "refuted", "shifted"), partial(self._judge, source)
            )
        self._counts[source].add(rows=tells.sum(), refuted=refuted.sum(), shifted=(refuted & shifted).sum())

    def _judge(self, source: str, counts: dict[str, int]) -> None:
        rows, refuted = counts["rows"], counts["refuted"]
        replaceable = source == "model" and self._recovers
        fewest = _FEWEST_ROWS_OF_MODEL if replaceable else _FEWEST_ROWS
        if self.refuted or rows < fewest or refuted <= _REFUTED_PART * rows:
            return
        shift = counts["shifted"] > _REFUTED_PART * refuted
        found = (
            f"the labels from {_WORDS[source]} are not those of the loss: the gradient at the logits contradicts them "
            f"in {refuted} of {rows} rows"
            + (
                " and fits the next position's label: the model shifts its labels, as causal language models do. "
                if shift
                else " (another task's labels, a second loss, mixed samples). "
            )
        )
        if replaceable:
            self.refuted = True
            warn_user(found + "From now on labels are read from the gradient.")
            return
        raise RuntimeError(
            found
            + "Give the label of each row of the logits by monitor.observe(labels), -100 where none counts"
            + (" (logits[:, t] goes with labels[:, t + 1])" if shift else "")
            + ", or build the monitor with labels='gradient'."
        )


def _refuse_graded(counts: dict[str, int]) -> None:
    if counts["graded"]:
        raise ValueError(
            "labels of a single logit should be 0 or 1, or those of a class all smoothed by one amount. Found others: "
            f"a regression's targets? {NO_CLASSES} Of probabilities of two classes give "
            "monitor.observe(labels.round())."
        )


_WORDS = {
    "observe": "monitor.observe",
    "loss": "the watched loss",
    "model": "the model's own `labels=`",
}
