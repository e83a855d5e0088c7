"""Draw a mask for the units of each tensor, many tensors at a time, and multiply gradients by the masks."""

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

# Mixed into the seed, so that masks have nothing to do with other numbers of the same seed, step and parameter.
_SALT = 0x5851F42D4C957F2D
# A budget of no unit at all has no unbiased estimate.
_SMALLEST_BUDGET = 1e-6
# Tensors of up to so many elements have their importance taken together, in groups of up to so many: for each alone,
# calls cost more than their arithmetic; a group stays in cache.
_SMALL, _GROUP = 2**14, 2**17
# From so many elements on, finding the masked units costs less than multiplying all of them. Only on the CPU: reading
# their indices would synchronise an accelerator.
_LARGE = 2**15


@dataclass(frozen=True)
class Part:
    """A parameter whose gradient is masked unit by unit.

    Attributes:
        slot: the parameter.
        modality: index of the modality.
        units: the units of the whole parameter.
        numbers: for a DTensor, the unit of each element of this rank's shard, in a shape that broadcasts with the
            shard; None for a whole tensor.
    """

    slot: Slot
    modality: int
    units: UnitView
    numbers: Tensor | None = None

    @property
    def grad(self) -> Tensor:
        """The gradient, or this rank's shard of it, as a view that `spread` broadcasts with."""
        return self.units.view(self.slot.grad) if self.numbers is None else local_part(self.slot.grad)

    @property
    def unit_dim(self) -> int | None:
        """The dimension of `grad` whose indices are the units; None where there is none, as in shards."""
        return self.units.only_dim if self.numbers is None else None

    def importance(self) -> Tensor:
        """`(n,)` importance of each unit; of a shard, what this rank's elements add to it."""
        if self.numbers is None:
            return unit_importance(self.grad, self.units.unit_dims)
        shard = self.grad
        dims = [dim for dim, size in enumerate(self.numbers.shape) if size != 1]
        sums = unit_importance(shard, dims)
        total = sums.new_zeros(self.units.count)
        return total.index_add_(0, self.numbers.flatten(), sums)

    def spread(self, values: Tensor) -> Tensor:
        """`(n,)` values of the units, in a shape that broadcasts with `grad`."""
        return self.units.spread(values) if self.numbers is None else values[self.numbers]


def part_of(slot: Slot, modality: int, units: UnitView) -> Part:
    """The part for a parameter, whole or sharded."""
    if not is_sharded(slot.parameter):
        return Part(slot, modality, units)
    numbers = units.numbers(slot.parameter.device).contiguous()
    # Along a dimension of size 1 the numbers broadcast, however the parameter is cut there.
    return Part(slot, modality, units, local_part(distributed_as(slot.parameter, numbers, broadcast=True)))


class Masks:
    """The masks of some parameters: what does not change from step to step is made once.

    Args:
        parts: what is masked.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = list(parts)
        self._batches = _batches_of(self.parts)
        self._alike = _alike(self.parts)

    def apply_(self, ratio: Tensor, active: Tensor, scale: MaskScale, seed: int, step: int) -> Tensor:
        """Draw the step's masks and multiply the gradients by them.

        Args:
            ratio: `(M,)` keep ratios.
            active: bool `(M,)`, the modalities that are masked at all.
            scale: weights of the kept units, and the sampling that belongs to them.
            seed: of all randomness.
            step: number of the step.

        Returns:
            How many gradients were left alone because they are not finite, 0-d.
        """
        weights, nonfinite = self.draw(self.importances(), ratio, active, scale, seed, step)
        factors: tuple[list[Tensor], list[Tensor]] = ([], [])
        for part, weight in zip(self.parts, weights, strict=True):
            grad, dim = part.grad, part.unit_dim
            if scale == "none" and dim is not None and grad.numel() >= _LARGE and on_host(weight) is not None:
                masked = (weight == 0).nonzero().squeeze(1)
                grad.index_fill_(dim, masked, 0)  # reads nothing, and writes what is masked alone
            else:
                factors[0].append(grad)
                factors[1].append(part.spread(weight))
        if factors[0]:
            foreach_mul_(*factors)
        return nonfinite

    def importances(self) -> list[Tensor]:
        """`(n,)` importances of every part's units; sums over shards take one collective for all parts."""
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
        """`(n,)` weights of every part's units, 0 for masked ones; and how many parts are not finite, 0-d.

        A part whose importances are all zero, or not finite, has weights of 1.
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
    """Draw units by their importances s `(U, n_max)`; returns every unit's weight of the same shape."""
    n = s.shape[1]
    if scale == "unbiased":
        numbers = uniforms(seed ^ _SALT, step, batch.streams, n + 1)
        # Of all importances the norm has the least variance.
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
    """Parts that are drawn together, as rows of one padded matrix: on one device, of similar numbers of units."""

    def __init__(self, parts: Sequence[Part], indices: Sequence[int]) -> None:
        self.indices = list(indices)
        chosen = [parts[index] for index in indices]
        self.device = chosen[0].slot.grad.device
        self.dtype = _weight_dtype(chosen[0])
        self.counts = [part.units.count for part in chosen]
        # Small tensors are made here, once: on an accelerator making one synchronises.
        self.sizes = torch.tensor(self.counts, dtype=torch.int64, device=self.device)
        self.modality = torch.tensor(
            [part.modality for part in chosen], dtype=torch.int64, device=self.device
        )
        self.streams = torch.tensor(
            [part.slot.index for part in chosen], dtype=torch.int64, device=self.device
        )
        columns = torch.arange(max(self.counts), dtype=torch.int64, device=self.device)
        inside = columns < self.sizes[:, None]
        # Index of each padded entry in the vector of all units, of which the last entry is a zero; and the reverse.
        firsts = (self.sizes.cumsum(0) - self.sizes)[:, None]
        self._to_rows = torch.where(inside, firsts + columns, sum(self.counts))
        entries = torch.arange(inside.numel(), dtype=torch.int64, device=self.device).view_as(inside)
        self._from_rows = torch.cat([row[:n] for row, n in zip(entries, self.counts, strict=True)])

    def padded(self, by_part: Sequence[Tensor]) -> Tensor:
        """`(n,)` values of each part as rows of `(U, n_max)`, padded with zeros."""
        return torch.cat([*by_part, by_part[0].new_zeros(1)])[self._to_rows]

    def rows(self, padded: Tensor) -> Sequence[Tensor]:
        """The rows of `(U, n_max)` without their padding."""
        rows: Sequence[Tensor] = padded.view(-1)[self._from_rows].split(self.counts)
        return rows


def _batches_of(parts: Sequence[Part]) -> list[_Batch]:
    """Batches by device, dtype, and number of units to a factor of eight, so that padding stays small."""
    indices: dict[Any, list[int]] = {}
    for index, part in enumerate(parts):
        key = (part.slot.grad.device, _weight_dtype(part), (part.units.count - 1).bit_length() // 3)
        indices.setdefault(key, []).append(index)
    return [_Batch(parts, chosen) for chosen in indices.values()]


def _alike(parts: Sequence[Part]) -> list[list[int]]:
    """Indices of small parts whose units are rows of one shape, in groups whose importances are taken together."""
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
    """The real dtype in which a gradient is multiplied: float32 or wider."""
    return torch.promote_types(part.slot.grad.dtype, torch.float32).to_real()
