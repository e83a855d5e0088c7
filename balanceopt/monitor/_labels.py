"""Labels that pass by: in a model's keywords or batch, or in a loss module's arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_KEYS = ("labels", "label")


def labels_of_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Class indices given to the model as `labels=`, or under "labels" in a batch that is a mapping."""
    batches = [kwargs, *(value for value in args[:1] if isinstance(value, Mapping))]
    for batch in batches:
        for key in _KEYS:
            value = batch.get(key)
            if isinstance(value, Tensor) and not value.is_floating_point() and value.dtype != torch.bool:
                return value.detach()
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
        return target.detach()
    if reduce == "argmax":
        return target.detach().argmax(-1)
    raise ValueError(
        "the watched loss needs class indices as its target. Found soft targets of shape "
        f"{tuple(target.shape)}: pass reduce='argmax' to watch_loss, or monitor.observe(labels)."
    )
