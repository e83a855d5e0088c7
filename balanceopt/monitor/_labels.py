"""Targets of the loss as they come: observed, from a loss module's calls or from the model's arguments.

Labels are copied on arrival, since the loop may reuse its buffers before the step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from balanceopt.functional import Loss, as_loss
from balanceopt.monitor._forward import Observed, Pass
from balanceopt.monitor._outputs import tensors_in

LabelSource = Literal["auto", "observe", "loss", "model", "gradient"]

_KEYS = ("labels", "label")


class Labels:
    """Assign labels to passes, from the most trusted source that the user allows.

    Attributes:
        allowed: the allowed source, or `"auto"` for all.
        loss: the loss whose targets the labels are.
    """

    def __init__(self, allowed: LabelSource, ignore_index: int, loss: Loss) -> None:
        """Allow labels from one source, or all (`"auto"`); `ignore_index` labels samples that do not count.

        Raises:
            ValueError: if the targets of `loss` should come from the gradient, which can't tell them.
        """
        if allowed == "gradient" and not loss.recovers:
            raise ValueError(
                "`labels='gradient'` needs cross-entropy or nn.BCEWithLogitsLoss: the targets of another loss can't be "
                "told from its gradient, whose scale is unknown. Use labels='auto' with the loss module of the loop as "
                "`loss=`, or monitor.observe(targets)."
            )
        self.allowed: LabelSource = allowed
        self._ignore_index = ignore_index
        self.loss = loss
        self._next: Observed | None = None

    @property
    def ignore_index(self) -> int:
        """Label of samples that do not count: the loss's, else the monitor's option."""
        return int(getattr(self.loss, "ignore_index", self._ignore_index))

    @property
    def recovers(self) -> bool:
        """Whether labels may be read from the gradient at the joint logits."""
        return self.allows("gradient") and self.loss.recovers

    def allows(self, source: LabelSource) -> bool:
        """Tell whether labels may come from `source`."""
        return self.allowed in ("auto", source)

    def observe(self, latest: Pass | None, labels: Tensor, present: dict[str, Tensor]) -> None:
        """Record the user's labels for the latest pass without observed labels, else for the next pass."""
        if latest is not None and not latest.closed and latest.observed is None:
            self._give(latest, (labels, present))
        else:
            self._next = labels, present

    def begin(self, current: Pass) -> None:
        """Give a new pass the labels observed before the pass."""
        if self._next is not None:
            self._give(current, self._next)
            self._next = None

    def take_back(self, current: Pass) -> None:
        """Return the labels observed for a dropped pass to the next pass."""
        if self._next is None:
            self._next = current.observed

    def from_call(self, current: Pass, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Read the labels among the model's arguments."""
        if current.labels is None and self.allows("model"):
            labels = labels_of_call(args, kwargs, classes=self.loss.has_classes)
            if labels is not None:
                current.labels, current.label_source = labels, "model"

    def from_loss(
        self,
        pass_of: Callable[[Tensor], Pass | None],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        """Read labels and `ignore_index` from a loss module's call.

        Args:
            pass_of: finds the pass whose logits a prediction is made of.
            module: the loss module.
            args: its arguments.
            kwargs: its keyword arguments.

        Raises:
            ValueError: if a loss of numbers repeats its prediction to compare it with the target.
        """
        prediction, target = call_of_loss(args, kwargs)
        current = None if prediction is None else pass_of(prediction)
        if prediction is None or current is None or current.closed or not self.allows("loss"):
            return
        if current.logits is not None and prediction.numel() != current.logits.numel():
            return  # a loss of some of the logits, or of a head inside the model
        if target is not None and isinstance(module, _OF_ENTRIES):
            _refuse_repeated(prediction, target)
        if current.label_source in ("gradient", "model"):
            if target is not None:
                current.labels, current.label_source = target.detach().clone(), "loss"
            current.ignore_index = getattr(module, "ignore_index", None)

    def forget(self) -> None:
        """Forget observed labels that no pass has received."""
        self._next = None

    def _give(self, current: Pass, observed: Observed) -> None:
        labels, present = current.observed = observed
        current.present.update(present)
        if self.allows("observe"):
            current.labels, current.label_source = labels, "observe"


# Losses of torch that compare entry by entry, and broadcast.
_OF_ENTRIES = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)
# Losses of torch whose targets are no class for each sample.
_OTHER_TARGETS = (
    *_OF_ENTRIES,
    nn.PoissonNLLLoss,
    nn.GaussianNLLLoss,
    nn.KLDivLoss,
    nn.MultiLabelMarginLoss,
    nn.MultiLabelSoftMarginLoss,
    nn.SoftMarginLoss,
    nn.MarginRankingLoss,
    nn.HingeEmbeddingLoss,
    nn.CosineEmbeddingLoss,
    nn.TripletMarginLoss,
    nn.TripletMarginWithDistanceLoss,
    nn.CTCLoss,
)


def refuse_loss(module: nn.Module, loss: Loss) -> None:
    """Raise for a loss module whose targets are known not to be those of `loss`.

    Raises:
        ValueError: for such a module; the message names the remedy.
    """
    of_classes = isinstance(module, (nn.CrossEntropyLoss, nn.NLLLoss))
    of_numbers = isinstance(module, _OTHER_TARGETS)
    if of_numbers:
        as_loss(module)  # raises for a loss that has no score
    if (of_numbers and loss.has_classes) or (of_classes and not loss.has_classes and loss.rowwise):
        raise ValueError(
            f"the loss to watch should have the targets of the loss that scores are made of. Found "
            f"{type(module).__name__}: build the monitor with it as `loss=` (docs/tasks.md)."
        )


def labels_of_call(args: tuple[Any, ...], kwargs: Mapping[str, Any], *, classes: bool) -> Tensor | None:
    """Return the targets given to the model as `labels=`, or under "labels" in a batch that is a mapping.

    Args:
        args: the model's arguments.
        kwargs: the model's keyword arguments.
        classes: whether targets are class indices, which no floats or bools are.
    """
    batches = [kwargs, *(value for value in args[:1] if isinstance(value, Mapping))]
    for batch in batches:
        for key in _KEYS:
            value = batch.get(key)
            if isinstance(value, Tensor) and not (
                classes and (value.is_floating_point() or value.dtype == torch.bool)
            ):
                return value.detach().clone()
    return None


def call_of_loss(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Tensor, Tensor | None] | tuple[None, None]:
    """Return prediction and target of a loss call `(prediction, target)`; None for what is no tensor."""
    target = args[1] if len(args) > 1 else kwargs.get("target", kwargs.get("labels"))
    target = target if isinstance(target, Tensor) else None
    prediction = next((x for x in tensors_in((args, kwargs)) if x is not target), None)
    if prediction is None:
        return None, None
    if target is not None and target.requires_grad and not prediction.requires_grad:
        return target, prediction  # MSE and L1 are called either way round
    return prediction, target


def _refuse_repeated(prediction: Tensor, target: Tensor) -> None:
    """Raise if prediction and target broadcast to more entries than the prediction has."""
    if torch.broadcast_shapes(prediction.shape, target.shape).numel() > prediction.numel():
        raise ValueError(
            "the loss should compare each prediction with its own target. Found a prediction of shape "
            f"{tuple(prediction.shape)} and a target of shape {tuple(target.shape)}, which broadcasting compares each "
            f"with several others. Give both one shape, such as target.view_as(prediction)."
        )
