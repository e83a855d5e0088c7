"""Targets of a pass, one for each row of the logits: given ones, checked against the gradient, or recovered from it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial

import torch
from torch import Tensor

from balanceopt._deferred import DeferredCounts
from balanceopt.functional import INVALID
from balanceopt.monitor._answers import as_target_rows
from balanceopt.monitor._forward import Pass
from balanceopt.monitor._labels import Labels
from balanceopt.monitor._recovery import (
    CHANGED_AFTER,
    Agreement,
    Recovery,
    off_residual,
    refuse_contradicted,
    refuse_foreign,
)

# Part of the largest residual below which rounding may turn the residual's sign.
_CLEAR_RESIDUAL = 0.05


class PassTargets(ABC):
    """Base of the targets of one kind of loss."""

    def __init__(self, labels: Labels) -> None:
        """Prepare to take the targets of the loss from where `labels` found them."""
        self.labels, self.loss = labels, labels.loss

    @abstractmethod
    def of(self, done: Pass) -> Tensor | None:
        """Return the target of each row of the logits, `(N,)` class indices or `(N, C)` numbers; None for none.

        Raises:
            ValueError: if given targets do not fit the logits.
            RuntimeError: if the gradients contradict given targets, or the gradients tell none.
        """

    def recovered(self) -> dict[str, int]:
        """Return the number of rows whose labels were recovered from gradients, and of doubtful rows."""
        return {"rows": 0, "ambiguous": 0}


class ClassTargets(PassTargets):
    """Class indices or class probabilities, for cross-entropy."""

    def __init__(self, labels: Labels, *, strict: bool) -> None:
        """Prepare as `PassTargets`; `strict` raises where recovered labels are doubtful."""
        super().__init__(labels)
        self._recovery = Recovery(strict=strict) if labels.recovers else None
        self._agreement = Agreement(recovers=labels.recovers)

    def of(self, done: Pass) -> Tensor | None:
        target = self._given(done)
        if target is None and done.gradients and self._recovery is not None:
            assert done.logits is not None
            done.label_source = "gradient"
            target = self._recovery.labels(done.gradients, done.logits, self.loss.label_smoothing)
            target = torch.where(target == INVALID, self.labels.ignore_index, target)
        return target

    def recovered(self) -> dict[str, int]:
        return super().recovered() if self._recovery is None else self._recovery.counts()

    def _given(self, done: Pass) -> Tensor | None:
        """Return the given labels in the order of the logits' rows; None where the gradient replaces them."""
        if done.labels is None:
            return None
        of_model = done.label_source == "model"
        labels, positions = self._rows(done)
        if len(labels) != len(done.logits) and of_model and self._recovery is not None:  # type: ignore[arg-type]
            return None
        _refuse_misfit(done, labels)
        if labels.is_floating_point():
            return labels
        labels = labels.long()  # before comparisons, in which -100 would be 156 among 8-bit labels
        valid = labels != self._ignored_in(done)
        shift = self._agreement.shift
        if done.gradients:
            assert done.logits is not None
            self._agreement.compare(
                done.label_source, labels, valid, done.gradients, done.logits, positions=positions
            )
        if of_model and self._agreement.refuted:
            return None
        if of_model and self._agreement.shift != shift:  # found in this pass
            return self._given(done)
        return torch.where(valid, labels, self.labels.ignore_index)

    def _ignored_in(self, done: Pass) -> int:
        """Return the ignored label of a pass's given labels: that of the watched loss, else the monitor's."""
        return self.labels.ignore_index if done.ignore_index is None else done.ignore_index

    def _rows(self, done: Pass) -> tuple[Tensor, bool]:
        """Return labels `(N,)`, or soft ones `(N, C)`, and whether neighbouring rows are positions of one sample."""
        assert done.labels is not None and done.logits is not None
        ignore = self._ignored_in(done)
        labels, classes = done.labels.to(done.logits.device), done.logits.shape[1]
        if classes == 1:
            labels = self._agreement.binary(labels, ignore)
        if labels.is_floating_point() and labels.dim() > 1:
            return as_target_rows(labels, done), False
        if done.label_source == "model" and self._agreement.shift and labels.dim() > 1:
            labels = torch.cat([labels[..., 1:], torch.full_like(labels[..., :1], ignore)], -1)
        return labels.flatten(), labels.dim() > 1


class NumberTargets(PassTargets):
    """Numbers in the shape of the logits: multi-hot labels, regression targets."""

    def __init__(self, labels: Labels) -> None:
        """Prepare as `PassTargets`."""
        super().__init__(labels)
        self._rows = DeferredCounts(("rows", "foreign"), refuse_foreign)
        self._compared: dict[str, DeferredCounts] = {}

    def of(self, done: Pass) -> Tensor | None:
        assert done.logits is not None
        if done.labels is not None:
            target = done.labels.to(done.logits.device)
            if not self.loss.rowwise:
                return target
            return self._compared_with(done, as_target_rows(target, done))
        if not done.gradients:
            return None
        if not (self.loss.recovers and self.labels.recovers):
            raise RuntimeError(
                "the targets of a pass did not come, and the gradient at the logits can't tell them, as its scale is "
                "unknown. Give as the monitor's `loss=` the very module that the loop calls on the logits, or call "
                "monitor.observe(targets)."
            )
        return self._recovered(done, done.gradients[0], done.logits)

    def recovered(self) -> dict[str, int]:
        counts = self._rows.read()
        return {"rows": counts["rows"], "ambiguous": counts["foreign"]}

    def _recovered(self, done: Pass, gradient: Tensor, logits: Tensor) -> Tensor:
        """Read hard labels from the sign of `s (sigmoid(logit) - label)`; NaN in rows without a gradient."""
        graded = torch.isfinite(gradient) & (gradient != 0)
        # A gradient of 0 in a row with others is the residual of a saturated logit, rounded.
        labels = torch.where(graded, gradient < 0, logits > 0)
        off = off_residual(gradient, logits, torch.where(graded, labels.long(), INVALID)).any(1)
        counts = graded.any(1, keepdim=True)
        self._rows.add(rows=counts.sum(), foreign=off.sum())
        return torch.where(counts, labels.to(torch.float32), torch.nan)

    def _compared_with(self, done: Pass, target: Tensor) -> Tensor:
        """Compare a target with the gradient; return it with NaN for what the loop's loss leaves out.

        Such entries have a gradient of exactly 0 although the prediction is wrong. Entries whose residual has another
        sign than the gradient are counted.
        """
        assert done.logits is not None
        residual = self.loss.residual(done.logits, target)
        if residual is None or not done.gradients:
            return target
        size = residual.abs()
        tells = size > _CLEAR_RESIDUAL * torch.where(torch.isfinite(size), size, 0).amax()
        refuted, graded = torch.zeros_like(tells), torch.zeros_like(tells)
        for gradient in done.gradients:
            refuted |= tells & (gradient * residual < 0)
            graded |= gradient != 0
        if done.label_source not in self._compared:
            self._compared[done.label_source] = DeferredCounts(
                ("above", "above refuted", "below", "below refuted"),
                partial(refuse_contradicted, done.label_source),
            )
        above, below = tells & (residual > 0), tells & (residual < 0)
        self._compared[done.label_source].add(
            **{
                "above": above.sum(),
                "above refuted": (above & refuted).sum(),
                "below": below.sum(),
                "below refuted": (below & refuted).sum(),
            }
        )
        return torch.where(tells & ~graded, torch.nan, target)


def pass_targets(labels: Labels, *, strict: bool) -> PassTargets:
    """Build the targets of the kind of the loss of `labels`."""
    return ClassTargets(labels, strict=strict) if labels.loss.has_classes else NumberTargets(labels)


def _refuse_misfit(done: Pass, rows: Tensor) -> None:
    assert done.logits is not None and done.labels is not None
    if rows.dtype == torch.bool or (rows.is_floating_point() and rows.dim() == 1):
        raise ValueError(
            f"labels from {done.label_source} should be class indices of shape (B,) or class probabilities of shape "
            f"(B, C). Found shape {tuple(done.labels.shape)} and dtype {done.labels.dtype}. For regression and several "
            "labels a sample build the monitor with `loss=`."
        )
    if len(rows) != len(done.logits):
        raise ValueError(
            f"labels from {done.label_source} should have one entry for each of the {len(done.logits)} rows of the "
            f"logits. Found shape {tuple(done.labels.shape)}. Likely causes: labels of another batch, or "
            f"{CHANGED_AFTER}."
        )
