"""Loss of uni-modal predictions: the monitor's loss, or another one, with targets that fit the predictions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from balanceopt._options import check_kind, check_tensor, shown
from balanceopt.functional import LossFunction, VoteKind, as_loss, as_targets, wide
from balanceopt.monitor import ModalityMonitor, two_classes

_OTHER_TARGETS = (
    "For regression or several labels a sample build the monitor with the loop's loss as `loss=`, or give the "
    "objective its `loss=`."
)


class UnimodalLoss:
    """Loss of one modality's predictions, of the kind of the joint loss.

    A module is called as it is, past its hooks, so that its weights and its reduction are those of the joint loss. The
    default is cross-entropy, averaged over the rows with a valid label.

    Attributes:
        criterion: loss module, or function of (predictions, target); None for the default.
        outputs: number of outputs C of a prediction; with the default and C = 1 the output is a logit of two classes.
    """

    def __init__(
        self,
        monitor: ModalityMonitor,
        criterion: nn.Module | LossFunction | None,
        outputs: int,
        *,
        shared: bool,
    ) -> None:
        """Prepare for predictions of heads of their own, or of the `shared` head.

        Raises:
            ValueError: for a loss that compares no prediction with a target, and cross-entropy of a single class.
        """
        self.monitor, self.criterion, self.outputs = monitor, criterion, outputs
        self._form = as_loss(criterion)
        self._shared = shared
        if outputs == 1 and criterion is not None and self._form.has_classes:
            raise ValueError(
                "`out_features` should be at least 2 for nn.CrossEntropyLoss. Found 1: the softmax of a single logit "
                "is 1. For two classes in one logit the loss is nn.BCEWithLogitsLoss()."
            )

    def by_sample(self, target: Tensor, samples: int | None) -> tuple[Tensor, int]:
        """Return the target as `(B, ...)`, and the number of positions (tokens, pixels) of a sample that it is for.

        Args:
            target: target as the criterion takes it, with classes or outputs in the last dimension; positions may be
                flattened into the first.
            samples: number of samples B; None where unknown.

        Raises:
            ValueError: if the target does not fit predictions of C outputs, or is one of parts of a regression.
        """
        if target.dim() == 0:
            raise ValueError("`labels` should have one entry for each sample. Found a single number.")
        unimodal = self.monitor.unimodal
        if self._shared and unimodal is not None and unimodal.are_parts and self._form.centred(target):
            raise ValueError(
                "`heads` should be 'own' in a regression: the shared head's outputs for the modalities add up to the "
                "prediction, so that each can't be the target as well."
            )
        if not self._form.rowwise:
            return target, 1
        if samples and len(target) > samples and len(target) % samples == 0:
            target = target.unflatten(0, (samples, -1))
        positions = target.shape[1:]
        if self.outputs > 1 and self._by_output(target):
            if positions[-1:] != (self.outputs,):
                raise ValueError(
                    f"`labels` with an entry for each of out_features = {self.outputs} outputs should have shape (B, "
                    f"{self.outputs}), or (B, positions, {self.outputs}). Found shape {tuple(target.shape)}."
                    + (f" {_OTHER_TARGETS}" if self.criterion is None else "")
                )
            positions = positions[:-1]
        elif positions[-1:] == (1,):
            positions = positions[:-1]
        return target, positions.numel()

    def values(self, name: str, predictions: Tensor, target: Tensor) -> Tensor:
        """Return what the criterion does: by default a value for each row of the predictions.

        Args:
            name: the modality.
            predictions: `(B, C)`, or `(B, positions, C)`.
            target: target of the same samples, as `by_sample` returns it.

        Raises:
            ValueError: if the target does not fit.
            TypeError: if the criterion returns no tensor.
        """
        if self.criterion is None:
            rows, labels = self._class_rows(name, predictions, target)
            return _cross_entropy(rows, labels, self.monitor.labels.ignore_index)
        if len(predictions) == 0:  # a mean over no sample would be NaN
            return predictions.sum()
        target = target.to(predictions.device)
        if not self._form.rowwise:
            if predictions.shape[1:] == (1,) and target.dim() == 1:  # else they would broadcast to (B, B)
                predictions = predictions.squeeze(1)
        elif self._form.has_classes:
            predictions = predictions.flatten(0, -2)
            target = target.flatten(0, -2) if target.is_floating_point() else target.flatten().long()
        else:  # in the target's shape, to which weights broadcast
            predictions, target = predictions.reshape(target.shape), target.to(predictions.dtype)
        criterion = self.criterion
        # Past __call__, because a module's hooks should see the loop's calls only.
        call = criterion.forward if isinstance(criterion, nn.Module) else criterion
        value = call(predictions, target)
        check_kind("what `loss` returns", value, Tensor, "a tensor, the loss of the predictions")
        return value

    def mean(self, name: str, predictions: Tensor, target: Tensor) -> Tensor:
        """Return the loss as one number: the criterion's own, or the mean of its values."""
        if self.criterion is not None:
            value = self.values(name, predictions, target)
            return value.mean() if value.dim() else value
        rows, labels = self._class_rows(name, predictions, target)
        ignore_index = self.monitor.labels.ignore_index
        total = _cross_entropy(rows, labels, ignore_index).sum()
        count = labels.sum(1) > 0 if labels.is_floating_point() else labels != ignore_index
        return total / count.sum().clamp(min=1)

    def voted(self) -> VoteKind:
        """Return what the heads vote on.

        Raises:
            ValueError: for numbers, and for a function, which does not tell.
        """
        if not self._form.rowwise:
            raise ValueError(
                "a vote needs to know the task, which a loss function of yours does not tell. Build the monitor with a "
                "module of torch.nn as `loss=`: CrossEntropyLoss, BCEWithLogitsLoss."
            )
        if self._form.answers == "numbers":
            raise ValueError(
                "numbers do not vote: what a modality alone expects lies closer to the mean than what all expect "
                "together, so that averaging the heads costs accuracy. Take the model's own output in a regression."
            )
        return "labels" if self.outputs == 1 else self._form.answers

    def as_rows(self, logits: Tensor) -> Tensor:
        """Return joint logits with their C outputs last, `(B, ..., C)`.

        Raises:
            TypeError, ValueError: if they are none.
        """
        check_tensor("logits", logits, f"(B, {self.outputs}), what the model returned")
        rows = logits.unsqueeze(-1) if self.outputs == 1 and logits.dim() == 1 else logits
        if not logits.is_floating_point() or rows.dim() < 2 or rows.shape[-1] != self.outputs:
            raise ValueError(
                f"`logits` should be what the model returned, floating, of shape (B, {self.outputs}) or (B, positions, "
                f"{self.outputs}). Found {shown(logits)}. Where classes come before positions, pass "
                "logits.movedim(1, -1)."
            )
        return rows

    def _by_output(self, target: Tensor) -> bool:
        """Whether a target has an entry for each output, rather than a class index."""
        return target.is_floating_point() or not self._form.has_classes

    def _class_rows(self, name: str, predictions: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits `(N, C)`, and class indices `(N,)` or class probabilities `(N, C)`.

        Raises:
            ValueError: if there is not one label for each row, or (checked without device synchronisation) labels lie
                outside [0, C) or are no probabilities.
        """
        rows, target = predictions.flatten(0, -2), target.to(predictions.device)
        soft = self.outputs > 1 and target.is_floating_point()
        target = target.flatten(0, -2) if soft else target.flatten()
        ignore_index = self.monitor.labels.ignore_index
        if self.outputs == 1:
            if target.is_floating_point():  # targets of BCEWithLogitsLoss, hard or soft
                pairs = torch.stack([1 - target, target], 1)
                target = torch.where(target.unsqueeze(1) == ignore_index, 0, pairs)
            target = target.long() if target.dtype == torch.bool else target
        if len(target) != len(rows):
            raise ValueError(
                f"`labels` should have one entry for each of the {len(rows)} samples of {name!r}. "
                f"Found {len(target)}."
            )
        try:
            as_targets(target, max(self.outputs, 2), ignore_index)
        except ValueError as error:
            raise ValueError(
                f"{error} The objective has heads of out_features = {self.outputs}. {_OTHER_TARGETS}"
            ) from None
        return rows, target if target.is_floating_point() else target.long()


def with_modality(predictions: Tensor, target: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return predictions and target of the samples that have a modality.

    Args:
        predictions: `(B, ...)`, or of these samples only, where the encoder ran on no others.
        target: `(B, ...)`.
        present: bool `(B,)`, samples with the modality; None for all.
    """
    if present is None:
        return predictions, target
    rows = present.to(predictions.device).nonzero()[:, 0]
    chosen = predictions[rows] if len(predictions) == len(target) else predictions
    return chosen, target.to(predictions.device)[rows]


def in_samples(predictions: Tensor, present: Tensor, samples: int) -> Tensor:
    """Return predictions `(B, ...)` of all samples, from all or from those alone that have a modality; 0 for others."""
    if len(predictions) == samples:
        return predictions
    result = predictions.new_zeros(samples, *predictions.shape[1:])
    result[present.to(predictions.device)] = predictions
    return result


def share_of_modality(at_loss: Tensor, present: Tensor | None, samples: int, *, selects: bool) -> Tensor:
    """Return the gradient at a loss's values for the samples with a modality, scaled to the same sum as for all.

    It is 0 for the other samples, or with `selects` without them.
    """
    if present is None or at_loss.dim() == 0:
        return at_loss
    by_sample, present = at_loss.reshape(samples, -1), present.to(at_loss.device)
    part = torch.where(present.unsqueeze(1), by_sample, 0)
    total = part.sum()
    part = part * torch.where(total == 0, 0, by_sample.sum() / total)
    return part[present] if selects else part


def _cross_entropy(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Return the `(N,)` cross-entropies of rows, in float32 or wider; 0 for rows without a valid label."""
    logits = wide(two_classes(logits))
    if target.is_floating_point():
        return F.cross_entropy(logits, target.to(logits.dtype), reduction="none")
    return F.cross_entropy(logits, target, reduction="none", ignore_index=ignore_index)
