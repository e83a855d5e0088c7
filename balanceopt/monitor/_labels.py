"""Labels that pass by: in a model's keywords or batch, or in a loss module's arguments.

They are copied when they come: the loop may reuse its buffers before the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from balanceopt.monitor._outputs import first_tensor
from balanceopt.monitor._pass import Observed, Pass

LabelSource = Literal["auto", "observe", "loss", "model", "gradient"]

_KEYS = ("labels", "label")


class Labels:
    """Gives each pass its labels, from the most trusted of the sources that the user allows."""

    def __init__(self, allowed: LabelSource) -> None:
        """Take them from `allowed` only; `"auto"` is all of them."""
        self.allowed: LabelSource = allowed
        self._next: Observed | None = None

    def allows(self, source: LabelSource) -> bool:
        """Whether labels may come from there."""
        return self.allowed in ("auto", source)

    def observe(self, latest: Pass | None, labels: Tensor, present: dict[str, Tensor]) -> None:
        """Take the user's own: for the latest pass if it has none, else for the next one."""
        if latest is not None and not latest.closed and latest.observed is None:
            self._give(latest, (labels, present))
        else:
            self._next = labels, present

    def begin(self, current: Pass) -> None:
        """Give a new pass what was observed before it."""
        if self._next is not None:
            self._give(current, self._next)
            self._next = None

    def take_back(self, current: Pass) -> None:
        """Keep what was observed before a pass that came to nothing for the next one."""
        if self._next is None:
            self._next = current.observed

    def from_call(self, current: Pass, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take those that the model itself was given."""
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
        """Take those that a loss module was called with on the pass's logits, and its `ignore_index`."""
        if current is None or current.closed or not self.allows("loss"):
            return
        logits = first_tensor((args, kwargs))
        if logits is not None and current.logits is not None and logits.numel() != current.logits.numel():
            return  # an auxiliary head, with labels of its own
        if current.label_source in ("gradient", "model"):
            labels = labels_of_loss(args, kwargs, reduce)
            if labels is not None:
                current.labels, current.label_source = labels, "loss"
            current.ignore_index = getattr(module, "ignore_index", None)

    def forget(self) -> None:
        """Forget those that no pass has got."""
        self._next = None

    def _give(self, current: Pass, observed: Observed) -> None:
        labels, present = current.observed = observed
        current.present.update(present)
        if self.allows("observe"):
            current.labels, current.label_source = labels, "observe"


def labels_of_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Class indices given to the model as `labels=`, or under "labels" in a batch that is a mapping."""
    batches = [kwargs, *(value for value in args[:1] if isinstance(value, Mapping))]
    for batch in batches:
        for key in _KEYS:
            value = batch.get(key)
            if isinstance(value, Tensor) and not value.is_floating_point() and value.dtype != torch.bool:
                return value.detach().clone()
    return None


def labels_of_loss(args: tuple[Any, ...], kwargs: Mapping[str, Any], reduce: str | None) -> Tensor | None:
    """The target of a loss call `(logits, target)`.

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
