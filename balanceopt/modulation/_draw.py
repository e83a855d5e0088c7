"""Draw the masks of many tensors in a few batched operations, and what the units that are kept are multiplied by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from balanceopt._uniform import uniforms
from balanceopt.functional import kept_units
from balanceopt.functional._sampling import (
    inclusion_probabilities_padded,
    sample_units_padded,
    systematic_sample_padded,
)
from balanceopt.modulation._parts import Part

Scale = Literal["none", "unbiased", "official"]

# Of the masks, so that other numbers of the same seed, step and parameter have nothing to do with them.
_SALT = 0x5851F42D4C957F2D
# A budget of no unit at all has no unbiased estimate.
_SMALLEST_BUDGET = 1e-6


@dataclass(frozen=True)
class Masks:
    """What was drawn for the units of each part.

    Attributes:
        weights: `(n,)` by part, what gradients are multiplied by; 0 for masked units, all 1 where nothing is masked.
        kept: bool `(n,)` by part.
        nonfinite: 0-d, how many parts were left alone for importances that are not finite.
    """

    weights: list[Tensor]
    kept: list[Tensor]
    nonfinite: Tensor


class Batch:
    """Parts that are drawn together: on one device, of similar size; what does not change from step to step."""

    def __init__(self, parts: Sequence[Part], places: Sequence[int]) -> None:
        """Take the parts at `places`."""
        self.places = list(places)
        own = [parts[place] for place in places]
        self.device = own[0].slot.grad.device
        self.dtype = _wide(own[0].slot.grad)
        self.counts = [part.units.count for part in own]
        # Small tensors are made here, once: on an accelerator making one waits for it.
        self.sizes = torch.tensor(self.counts, device=self.device)
        self.modality = torch.tensor([part.modality for part in own], device=self.device)
        self.streams = torch.tensor([part.slot.index for part in own], device=self.device)
        width = max(self.counts)
        columns = torch.arange(width, device=self.device)
        self.inside = columns < self.sizes[:, None]
        # Where each unit stands in the vector of all, and all of them in the padded rows.
        firsts = (self.sizes.cumsum(0) - self.sizes)[:, None]
        self._to_rows = torch.where(self.inside, firsts + columns, sum(self.counts))
        rows = torch.arange(len(own), device=self.device)[:, None] * width
        self._from_rows = torch.cat(
            [row[:count] for row, count in zip(rows + columns, self.counts, strict=True)]
        )
        self._nothing = torch.zeros(1, dtype=self.dtype, device=self.device)

    def padded(self, by_part: Sequence[Tensor]) -> Tensor:
        """`(n,)` values of each part as `(U, n_max)`, padded with zeros."""
        return torch.cat([*by_part, self._nothing])[self._to_rows]

    def rows(self, padded: Tensor) -> Sequence[Tensor]:
        """The rows of `(U, n_max)` without their padding."""
        rows: tuple[Tensor, ...] = padded.view(-1)[self._from_rows].split(self.counts)
        return rows


def batches_of(parts: Sequence[Part]) -> list[Batch]:
    """Cut into batches by device, dtype, and size to a factor of eight, so that padding stays small."""
    places: dict[object, list[int]] = {}
    for place, part in enumerate(parts):
        key = (part.slot.grad.device, _wide(part.slot.grad), (part.units.count - 1).bit_length() // 3)
        places.setdefault(key, []).append(place)
    return [Batch(parts, own) for own in places.values()]


@torch.no_grad()
def draw(
    batches: Sequence[Batch],
    norms: Sequence[Tensor],
    ratio: Tensor,
    active: Tensor,
    scale: Scale,
    seed: int,
    step: int,
) -> Masks:
    """Draw every part's mask.

    Args:
        batches: `batches_of` the parts to mask.
        norms: `(n,)` norms of the units' gradients, by part.
        ratio: `(M,)` keep ratios.
        active: bool `(M,)`, modalities that are masked at all.
        scale: which weights, and the sampling that belongs to them.
        seed: of all randomness.
        step: number of the step.
    """
    weights: list[Tensor] = [ratio] * len(norms)
    kept: list[Tensor] = [ratio] * len(norms)
    nonfinite = torch.zeros((), dtype=torch.int64, device=ratio.device)
    for batch in batches:
        s = batch.padded([norms[place] for place in batch.places])
        s = (s if scale == "unbiased" else s.square()).double()
        total = s.sum(1)
        finite = torch.isfinite(total)
        usable = (finite & (total > 0) & active.to(batch.device)[batch.modality])[:, None]
        extra = 1 if scale == "unbiased" else 0
        numbers = uniforms(seed ^ _SALT, step, batch.streams, s.shape[1] + extra)
        row_ratio = ratio.to(batch.device)[batch.modality]
        chosen, weight = _drawn(torch.where(usable, s, 1), batch, row_ratio, numbers, scale)
        chosen = chosen | ~usable
        weight = torch.where(usable, weight, 1).to(batch.dtype)
        nonfinite += (~finite).sum().to(ratio.device)
        for place, own_kept, own_weight in zip(
            batch.places, batch.rows(chosen), batch.rows(weight), strict=True
        ):
            kept[place], weights[place] = own_kept, own_weight
    return Masks(weights, kept, nonfinite)


def _drawn(s: Tensor, batch: Batch, ratio: Tensor, numbers: Tensor, scale: Scale) -> tuple[Tensor, Tensor]:
    """Which units are kept, and every unit's weight, both `(U, n_max)`."""
    s = torch.where(batch.inside, s, 0)
    if scale == "unbiased":
        budget = (ratio.double() * batch.sizes).clamp(min=_SMALLEST_BUDGET)
        probability = inclusion_probabilities_padded(s, budget)
        kept = systematic_sample_padded(probability, numbers[:, 0], numbers[:, 1:])
        return kept, torch.where(kept, 1 / probability, 0)
    k = kept_units(batch.sizes, ratio)
    kept = sample_units_padded(s, batch.sizes, k, numbers)
    if scale == "none":
        return kept, kept.double()
    share = s / s.sum(1, keepdim=True)
    return kept, torch.where(kept, 1 / (share + 1 / batch.sizes[:, None]), 0)


def _wide(gradient: Tensor) -> torch.dtype:
    """What a gradient is multiplied in."""
    return torch.promote_types(gradient.dtype, torch.float32)
