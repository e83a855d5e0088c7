"""Draw masks for the units of many tensors at a time, and multiply gradients by the masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from balanceopt._deferred import on_host
from balanceopt._random import uniforms
from balanceopt._sharding import distributed_as, is_sharded, local_part, summed_over_shards
from balanceopt._torch import foreach_mul_
from balanceopt.functional import (
    inclusion_probabilities_padded,
    kept_units,
    sample_units_padded,
    systematic_sample_padded,
    unit_importance,
)
from balanceopt.modulation._base import Slot
from balanceopt.modulation._units import UnitView

MaskScale = Literal["none", "unbiased", "official"]

# Mixed into the seed, so that masks are independent of other numbers of the same seed, step and parameter.
_SALT = 0x5851F42D4C957F2D
# The budget is above 0, because without any unit there is no unbiased estimate.
_SMALLEST_BUDGET = 1e-6
# Importances of tensors up to the first size are computed in groups up to the second size, because calls for single
# small tensors cost more than the arithmetic, and a group fits into the processor's cache.
_SMALL, _GROUP = 2**14, 2**17
# From this number of elements on, writing only masked units is faster than multiplying all units. On the CPU alone,
# because reading the indices of masked units would synchronise an accelerator.
_LARGE = 2**15


@dataclass(frozen=True)
class Part:
    """Parameter whose gradient is masked unit by unit.

    Attributes:
        slot: the parameter with its gradient.
        modality: index of the modality.
        units: units of the whole parameter.
        numbers: for a DTensor, the unit's index of each element of this rank's shard, in a shape that broadcasts with
            the shard; None for a whole tensor.
    """

    slot: Slot
    modality: int
    units: UnitView
    numbers: Tensor | None = None

    @property
    def grad(self) -> Tensor:
        """View of the gradient, or of this rank's shard of the gradient, that broadcasts with `spread`."""
        return self.units.view(self.slot.grad) if self.numbers is None else local_part(self.slot.grad)

    @property
    def unit_dim(self) -> int | None:
        """Dimension of `grad` whose indices are the units; None for shards and for units over several dimensions."""
        return self.units.only_dim if self.numbers is None else None

    def importance(self) -> Tensor:
        """Return the `(n,)` importances of the units; for a shard, the sums over this rank's elements."""
        if self.numbers is None:
            return unit_importance(self.grad, self.units.unit_dims)
        shard = self.grad
        dims = [dim for dim, size in enumerate(self.numbers.shape) if size != 1]
        sums = unit_importance(shard, dims)
        total = sums.new_zeros(self.units.count)
        return total.index_add_(0, self.numbers.flatten(), sums)

    def spread(self, values: Tensor) -> Tensor:
        """Return `(n,)` values of the units in a shape that broadcasts with `grad`."""
        return self.units.spread(values) if self.numbers is None else values[self.numbers]


def part_of(slot: Slot, modality: int, units: UnitView) -> Part:
    """Return the `Part` of a whole or sharded parameter."""
    if not is_sharded(slot.parameter):
        return Part(slot, modality, units)
    numbers = units.numbers(slot.parameter.device).contiguous()
    # Dimensions of size 1 are not sharded, because the numbers broadcast there.
    return Part(slot, modality, units, local_part(distributed_as(slot.parameter, numbers, broadcast=True)))


class Masks:
    """Masks of parameters, with cached quantities that are the same in every step.

    Args:
        parts: the parameters to mask.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = list(parts)
        self._batches = _batches_of(self.parts)
        self._alike = _alike(self.parts)

    def apply_(self, ratio: Tensor, active: Tensor, scale: MaskScale, seed: int, step: int) -> Tensor:
        """Draw the step's masks and multiply the gradients by the masks.

        Args:
            ratio: `(M,)` keep ratios.
            active: bool `(M,)`, modalities to mask.
            scale: weights of kept units, and the sampling of these weights.
            seed: seed of all randomness.
            step: number of the step.

        Returns:
            Number of non-finite gradients, 0-d, which stay unchanged.
        """
        weights, nonfinite = self.draw(self.importances(), ratio, active, scale, seed, step)
        factors: tuple[list[Tensor], list[Tensor]] = ([], [])
        for part, weight in zip(self.parts, weights, strict=True):
            grad, dim = part.grad, part.unit_dim
            if scale == "none" and dim is not None and grad.numel() >= _LARGE and on_host(weight) is not None:
                masked = (weight == 0).nonzero().squeeze(1)
                grad.index_fill_(dim, masked, 0)  # writes only masked units, reads nothing
            else:
                factors[0].append(grad)
                factors[1].append(part.spread(weight))
        if factors[0]:
            foreach_mul_(*factors)
        return nonfinite

    def importances(self) -> list[Tensor]:
        """Return the `(n,)` importances of every part's units, with one collective for the sums over all shards."""
        result: dict[int, Tensor] = {}
        for group in self._alike:
            grads = [self.parts[index].slot.grad for index in group]
            importance = unit_importance(torch.cat(grads))
            result.update(zip(group, importance.split([len(grad) for grad in grads]), strict=True))
        for index, part in enumerate(self.parts):
            if index not in result:
                result[index] = part.importance()
        in_order = [result[index] for index in range(len(self.parts))]
        return summed_over_shards([part.slot.parameter for part in self.parts], in_order)

    @torch.no_grad()
    def draw(
        self,
        importances: Sequence[Tensor],
        ratio: Tensor,
        active: Tensor,
        scale: MaskScale,
        seed: int,
        step: int,
    ) -> tuple[list[Tensor], Tensor]:
        """Return the `(n,)` weights of every part's units, 0 for masked units; and the number of non-finite parts, 0-d.

        A part whose importances are all zero, or non-finite, has weights of 1.
        """
        weights = [ratio] * len(self.parts)
        nonfinite = torch.zeros((), dtype=torch.int64, device=ratio.device)
        for batch in self._batches:
            s = batch.padded([importances[index] for index in batch.indices]).double()
            total = s.sum(1)
            finite = torch.isfinite(total)
            usable = (finite & (total > 0) & active.to(batch.device)[batch.modality])[:, None]
            s = torch.where(usable, s, 0)
            weight = _weights(s, batch, ratio.to(batch.device)[batch.modality], scale, seed, step)
            weight = torch.where(usable, weight, 1).to(batch.dtype)
            nonfinite += (~finite).sum().to(ratio.device)
            for index, row in zip(batch.indices, batch.rows(weight), strict=True):
                weights[index] = row
        return weights, nonfinite


def _weights(s: Tensor, batch: _Batch, ratio: Tensor, scale: MaskScale, seed: int, step: int) -> Tensor:
    """Draw units by importances s `(U, n_max)`; return the weights of all units in the same shape."""
    n = s.shape[1]
    if scale == "unbiased":
        numbers = uniforms(seed ^ _SALT, step, batch.streams, n + 1)
        # Probabilities follow the norm, because that has the least variance.
        budget = (ratio.double() * batch.sizes).clamp(min=_SMALLEST_BUDGET)
        probability = inclusion_probabilities_padded(s.sqrt(), budget)
        kept = systematic_sample_padded(probability, numbers[:, 0], numbers[:, 1:])
        return torch.where(kept, 1 / probability, 0)
    numbers = uniforms(seed ^ _SALT, step, batch.streams, n)
    kept = sample_units_padded(s, batch.sizes, kept_units(batch.sizes, ratio), numbers)
    if scale == "none":
        return kept.double()
    share = s / s.sum(1, keepdim=True)
    return torch.where(kept, 1 / (share + 1 / batch.sizes[:, None].double()), 0)


class _Batch:
    """Parts on one device with similar numbers of units, drawn together as rows of one padded matrix."""

    def __init__(self, parts: Sequence[Part], indices: Sequence[int]) -> None:
        self.indices = list(indices)
        chosen = [parts[index] for index in indices]
        self.device = chosen[0].slot.grad.device
        self.dtype = _weight_dtype(chosen[0])
        self.counts = [part.units.count for part in chosen]
        # Small tensors are created once, because creating a tensor from a list synchronises an accelerator.
        self.sizes = torch.tensor(self.counts, dtype=torch.int64, device=self.device)
        self.modality = torch.tensor(
            [part.modality for part in chosen], dtype=torch.int64, device=self.device
        )
        self.streams = torch.tensor(
            [part.slot.index for part in chosen], dtype=torch.int64, device=self.device
        )
        columns = torch.arange(max(self.counts), dtype=torch.int64, device=self.device)
        inside = columns < self.sizes[:, None]
        # Index of each padded entry in the vector of all units, whose last entry is a zero, and the inverse.
        firsts = (self.sizes.cumsum(0) - self.sizes)[:, None]
        self._to_rows = torch.where(inside, firsts + columns, sum(self.counts))
        entries = torch.arange(inside.numel(), dtype=torch.int64, device=self.device).view_as(inside)
        self._from_rows = torch.cat([row[:n] for row, n in zip(entries, self.counts, strict=True)])

    def padded(self, by_part: Sequence[Tensor]) -> Tensor:
        """Return `(n,)` values of each part as rows of a matrix `(U, n_max)`, padded with zeros."""
        return torch.cat([*by_part, by_part[0].new_zeros(1)])[self._to_rows]

    def rows(self, padded: Tensor) -> Sequence[Tensor]:
        """Return the rows of a matrix `(U, n_max)` without padding."""
        rows: Sequence[Tensor] = padded.view(-1)[self._from_rows].split(self.counts)
        return rows


def _batches_of(parts: Sequence[Part]) -> list[_Batch]:
    """Group parts by device, dtype and number of units within a factor of eight, so that padding stays small."""
    indices: dict[Any, list[int]] = {}
    for index, part in enumerate(parts):
        key = (part.slot.grad.device, _weight_dtype(part), (part.units.count - 1).bit_length() // 3)
        indices.setdefault(key, []).append(index)
    return [_Batch(parts, chosen) for chosen in indices.values()]


def _alike(parts: Sequence[Part]) -> list[list[int]]:
    """Group indices of small parts with rows of one shape, whose importances are computed together."""
    indices: dict[Any, list[int]] = {}
    for index, part in enumerate(parts):
        grad = part.slot.grad
        if part.unit_dim == 0 and grad.numel() <= _SMALL:
            indices.setdefault((grad.device, grad.dtype, grad.shape[1:]), []).append(index)
    groups = []
    for chosen in indices.values():
        at_once = max(2, _GROUP // max(parts[index].slot.grad.numel() for index in chosen))
        groups += [chosen[first : first + at_once] for first in range(0, len(chosen), at_once)]
    return [group for group in groups if len(group) > 1]


def _weight_dtype(part: Part) -> torch.dtype:
    """Return the real dtype of a gradient's weights: float32 or wider."""
    return torch.promote_types(part.slot.grad.dtype, torch.float32).to_real()
