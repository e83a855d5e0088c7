"""Rows of a batch: the features, the target and the weight of each sample, as the probes learn from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from balanceopt._deferred import on_host
from balanceopt._warnings import WarnOnce
from balanceopt.functional import AnswerKind, wide
from balanceopt.monitor import ModalityMonitor

# Order of trust in the sources of targets in validation.
_SOURCES = ("observe", "loss", "model")


@dataclass
class Batch:
    """A batch on its way through the model.

    Attributes:
        features: by modality, a function that returns the detached features.
        logits: logits `(N, C)` of each modality's head, or under None the joint ones.
        targets: targets by source, in eval mode.
        present: bool `(B,)` by modality, samples that have the modality.
    """

    features: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    logits: dict[str | None, Tensor] = field(default_factory=dict)
    targets: dict[str, Tensor] = field(default_factory=dict)
    present: dict[str, Tensor] = field(default_factory=dict)

    @property
    def target(self) -> Tensor | None:
        """The target of the source that is trusted most; None if no target came."""
        return next((self.targets[source] for source in _SOURCES if source in self.targets), None)


class Rows(NamedTuple):
    """Samples of one modality.

    Attributes:
        z: features `(B, D)`.
        y: class indices `(B,)`, or numbers `(B, O)`, with a valid number in every place.
        weight: `(B,)`, 1 for rows that count, 0 for a target that is ignored, a modality that is missing, and NaN.
    """

    z: Tensor
    y: Tensor
    weight: Tensor


def rows_of(
    batch: Batch, target: Tensor, samples: int | None, monitor: ModalityMonitor, warned: WarnOnce
) -> dict[str, Rows]:
    """Return the rows of each modality whose samples have one target each; warn once of the others."""
    labels = monitor.labels
    by_sample = target_by_sample(target, labels.loss.answers)
    result = {}
    for name, held in batch.features.items():
        z = wide(monitor.features.pooled(name, held(), samples))
        y, present = by_sample.to(z.device), batch.present.get(name)
        if present is not None and len(present) == len(y) != len(z) and _may_number(present, len(z)):
            # The encoder ran on the samples with the modality. Sorted, as a mask as index would be read.
            first = (~present.to(z.device)).to(torch.uint8).argsort(stable=True)[: len(z)]
            y, present = y[first], None
        if len(y) != len(z):
            warned(
                "rows",
                f"probes need one target for each sample: {len(z)} samples of {name!r} have {len(y)} targets "
                "(pixels, tokens). They are not probed.",
            )
            continue
        y, counts = valid_target(y, z.dtype, labels.ignore_index)
        counts = counts & torch.isfinite(z).all(1)
        if present is not None:
            counts = counts & present.to(z.device)
        result[name] = Rows(torch.nan_to_num(z), y, counts.to(z.dtype))
    return result


def target_by_sample(target: Tensor, task: AnswerKind) -> Tensor:
    """Return a target as class indices `(B,)`, or as numbers `(B, O)`."""
    if task == "classes" and target.is_floating_point() and target.numel() == len(target):
        target = target.flatten().round().long()  # of a single logit
    numbers = target.is_floating_point() or task != "classes"
    return target.reshape(len(target), -1) if numbers else target.reshape(-1)


def valid_target(y: Tensor, dtype: torch.dtype, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return targets with a valid number in every place, and bool `(B,)`, the rows whose target is valid."""
    if y.dim() == 2:
        return torch.nan_to_num(y.to(dtype)), torch.isfinite(y).all(1)
    y = y.long()  # before the comparison, in which -100 would be 156 among 8-bit labels
    valid = y != ignore_index
    return torch.where(valid, y, 0), valid


def _may_number(flags: Tensor, count: int) -> bool:
    """Tell whether as many flags are set as `count`, as far as the host can read them."""
    host_value = on_host(flags)
    return host_value is None or int(host_value.sum()) == count
