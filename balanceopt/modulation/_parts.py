"""One modality's units in one parameter, on tensors that are whole or sharded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from balanceopt._deferred import on_host
from balanceopt._random import SMALL, in_groups
from balanceopt.modulation._base import Slot
from balanceopt.modulation._shards import local_part, summed_over_shards
from balanceopt.modulation._units import UnitView


@dataclass(frozen=True)
class Part:
    """A parameter that belongs to a modality and is masked unit by unit.

    Attributes:
        slot: the parameter.
        modality: position of the modality.
        units: those of the parameter.
    """

    slot: Slot
    modality: int
    units: UnitView

    def of(self, tensor: Tensor) -> Tensor:
        """The parameter, or a tensor of its shape, as a view that `spread` broadcasts with."""
        return self.units.view(tensor)

    def spread(self, values: Tensor) -> Tensor:
        """`(n,)` values of the units, to broadcast with `of`."""
        return self.units.spread(values)

    def norms(self) -> Tensor:
        """`(n,)` norms of the units' gradients."""
        return self.units.norms(self.slot.grad)

    @property
    def rows(self) -> int | None:
        """The dimension of `of` whose indices are the units; None where it is not one."""
        return self.units.only_dim

    @property
    def is_rows(self) -> bool:
        """Whether each index of the whole tensor's first dimension is a unit."""
        return self.rows == 0


@dataclass(frozen=True)
class ShardedPart(Part):
    """A part of a DTensor: this rank's shard of it.

    Attributes:
        numbers: the unit that each element of the shard belongs to, in a shape that broadcasts with it.
    """

    numbers: Tensor | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """This rank's shard of the part."""
        return local_part(tensor)

    def spread(self, values: Tensor) -> Tensor:
        """The units' values at the elements of the shard."""
        assert self.numbers is not None
        return values[self.numbers]

    def squares(self) -> Tensor:
        """`(n,)` sums of squares of what this rank holds of each unit."""
        assert self.numbers is not None
        shard = self.of(self.slot.grad)
        alone = [*(d for d, size in enumerate(self.numbers.shape) if size == 1), shard.dim()]
        wide = torch.promote_types(shard.dtype, torch.float32)
        norms = torch.linalg.vector_norm(shard.unsqueeze(-1), dim=alone, keepdim=True, dtype=wide)
        found = torch.zeros(self.units.count, dtype=wide, device=shard.device)
        return found.index_add_(0, self.numbers.flatten(), norms.squeeze(-1).square().flatten())

    @property
    def rows(self) -> int | None:
        """None: units of a shard are found by number."""
        return None


@dataclass(frozen=True)
class MaskedPart:
    """A part and the step's mask of it.

    Attributes:
        part: of which.
        kept: bool `(n,)`, units that are kept.
        weight: `(n,)`, what their gradients are multiplied by.
        masked: the other units, as indices along `part.rows`; None where they are not known.
    """

    part: Part
    kept: Tensor
    weight: Tensor
    masked: Tensor | None


def shard_of(part: Part) -> ShardedPart:
    """The part on this rank, where the parameter is a DTensor."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    p: Any = part.slot.parameter
    numbers = part.units.numbers(p.device)
    # Along a dimension of size 1 they broadcast, however the parameter is cut there.
    placements = [
        q if isinstance(q, Shard) and numbers.shape[q.dim] > 1 else Replicate() for q in p.placements
    ]
    local = distribute_tensor(numbers.contiguous(), p.device_mesh, placements, src_data_rank=None)
    return ShardedPart(part.slot, part.modality, part.units, local.to_local())


def masked_rows(part: Part, kept: Tensor) -> Tensor | None:
    """The units that are not kept, as indices along `part.rows`; None where reading them would wait for a device."""
    known = part.rows is not None and on_host(kept) is not None
    return (~kept).nonzero().squeeze(1) if known else None


def alike(parts: Sequence[Part]) -> list[list[int]]:
    """Places of small parts whose units are rows of one shape, in groups whose norms are taken together."""
    places: dict[Any, list[int]] = {}
    for place, part in enumerate(parts):
        p, gradient = part.slot.parameter, part.slot.grad
        if part.is_rows and p.numel() <= SMALL:
            places.setdefault((gradient.device, gradient.dtype, p.shape[1:]), []).append(place)
    sizes = [part.slot.parameter.numel() for part in parts]
    return [group for own in places.values() for group in in_groups(own, sizes) if len(group) > 1]


def unit_norms(parts: Sequence[Part], together: Sequence[Sequence[int]] = ()) -> list[Tensor]:
    """`(n,)` norms of every part's units, over the whole tensors: sharded ones are summed over the ranks together.

    Args:
        parts: of which.
        together: groups of places that are `alike`; for each part alone, operations cost more than their arithmetic.
    """
    own: dict[int, Tensor] = {}
    for group in together:
        gradients = [parts[place].slot.grad for place in group]
        norms = parts[group[0]].units.norms(torch.cat(gradients))
        own.update(zip(group, norms.split([gradient.shape[0] for gradient in gradients]), strict=True))
    for place, part in enumerate(parts):
        if place not in own:
            own[place] = part.squares() if isinstance(part, ShardedPart) else part.norms()
    in_order = [own[place] for place in range(len(parts))]
    summed = summed_over_shards([part.slot.parameter for part in parts], in_order)
    pairs = zip(parts, summed, strict=True)
    return [found.sqrt() if isinstance(part, ShardedPart) else found for part, found in pairs]
