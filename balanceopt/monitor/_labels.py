"""Labels of a pass: observed, from a loss module or the model's arguments, or read from the gradient at the logits.

Labels are copied on arrival, since the loop may reuse its buffers before the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from balanceopt.monitor._forward import Observed, Pass
from balanceopt.monitor._outputs import first_tensor
from balanceopt.monitor._recovery import NO_CLASSES

LabelSource = Literal["auto", "observe", "loss", "model", "gradient"]

_KEYS = ("labels", "label")


class Labels:
    """Assign labels to passes, from the most trusted source that the user allows."""

    def __init__(self, allowed: LabelSource, ignore_index: int) -> None:
        """Allow labels from one source, or all (`"auto"`); `ignore_index` labels samples that do not count."""
        self.allowed: LabelSource = allowed
        self.ignore_index = ignore_index
        self._next: Observed | None = None

    @property
    def recovers(self) -> bool:
        """Whether labels may be read from the gradient at the joint logits."""
        return self.allows("gradient")

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
            labels = labels_of_call(args, kwargs)
            if labels is not None:
                current.labels, current.label_source = labels, "model"

    def from_loss(
        self,
        current: Pass | None,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        reduce: str | None,
    ) -> None:
        """Read labels and `ignore_index` from a loss module's call on the pass's logits."""
        if current is None or current.closed or not self.allows("loss"):
            return
        logits = first_tensor((args, kwargs))
        if logits is not None and current.logits is not None and logits.numel() != current.logits.numel():
            return  # the loss of an auxiliary head, which has other labels
        if current.label_source in ("gradient", "model"):
            labels = labels_of_loss(args, kwargs, reduce)
            if labels is not None:
                current.labels, current.label_source = labels, "loss"
            current.ignore_index = getattr(module, "ignore_index", None)

    def forget(self) -> None:
        """Forget observed labels that no pass has received."""
        self._next = None

    def _give(self, current: Pass, observed: Observed) -> None:
        labels, present = current.observed = observed
        current.present.update(present)
        if self.allows("observe"):
            current.labels, current.label_source = labels, "observe"


# Losses of torch whose targets are no class for each sample.
_OTHER_TARGETS = (
    nn.MSELoss,
    nn.L1Loss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
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


def refuse_loss(module: nn.Module) -> None:
    """Raise for a loss whose targets are known to be no classes.

    Raises:
        ValueError: for such a loss; the message names the alternatives.
    """
    if isinstance(module, _OTHER_TARGETS):
        raise ValueError(
            f"the loss to take labels from should have a class for each sample as its target, as nn.CrossEntropyLoss "
            f"has. Found {type(module).__name__}. {NO_CLASSES}"
        )


def labels_of_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the class indices given to the model as `labels=`, or under "labels" in a batch that is a mapping."""
    batches = [kwargs, *(value for value in args[:1] if isinstance(value, Mapping))]
    for batch in batches:
        for key in _KEYS:
            value = batch.get(key)
            if isinstance(value, Tensor) and not value.is_floating_point() and value.dtype != torch.bool:
                return value.detach().clone()
    return None


def labels_of_loss(args: tuple[Any, ...], kwargs: Mapping[str, Any], reduce: str | None) -> Tensor | None:
    """Return the target of a loss call `(logits, target)`.

    Raises:
        ValueError: for soft targets, unless `reduce` is "argmax".
    """
    target = args[1] if len(args) > 1 else kwargs.get("target", kwargs.get("labels"))
    if not isinstance(target, Tensor):
        return None
    several = target.dim() > 1 and target.shape[-1] > 1 and target.is_floating_point()
    if not several:
        return target.detach().clone()
    if reduce == "argmax":
        return target.detach().argmax(-1)
    raise ValueError(
        "the watched loss needs class indices as its target. Found soft targets of shape "
        f"{tuple(target.shape)}: pass reduce='argmax' to watch_loss, or monitor.observe(labels)."
    )
