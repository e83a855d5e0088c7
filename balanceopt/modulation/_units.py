"""What is masked as one piece: the units of a parameter, by the type of its module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvTransposeNd


@dataclass(frozen=True)
class MaskUnits:
    """How a parameter falls into units, each of which is masked as one piece.

    Dimension `dim`, of size `parts * count * width`, is read as `(parts, count, width)`; unit j is everything with j in
    the middle.

    Args:
        count: how many units; None for one to each index, of `size / parts`.
        dim: the dimension that they divide.
        parts: how often the units stand in it one after the other: 3 for query, key and value in one matrix.

    Raises:
        ValueError: if `count` or `parts` is below 1.

    Example:
        >>> heads_of_query, heads_of_output = MaskUnits(12), MaskUnits(12, dim=1)
        >>> heads_of_fused_query_key_value = MaskUnits(12, parts=3)
        >>> lstm_cells_with_all_gates = MaskUnits(parts=4)

    Reference:
        Masks by filter and by attention head: Yang et al., AMSS (TPAMI 2024).
    """

    count: int | None = None
    dim: int = 0
    parts: int = 1

    def __post_init__(self) -> None:
        if self.parts < 1 or (self.count is not None and self.count < 1):
            raise ValueError(
                f"`count` and `parts` should be at least 1. Found count = {self.count}, parts = {self.parts}."
            )

    def on(self, shape: torch.Size) -> UnitView:
        """These units on a tensor of `shape`.

        Raises:
            ValueError: if they do not divide it.
        """
        if not -len(shape) <= self.dim < len(shape):
            raise ValueError(f"`{self}` needs a tensor with that dimension. Found shape {tuple(shape)}.")
        dim = self.dim % len(shape)
        size = shape[dim]
        count = size // self.parts if self.count is None else self.count
        if count == 0 or size % (self.parts * count):
            raise ValueError(
                f"`{self}` should divide dimension {dim} of its tensor. Found shape {tuple(shape)}."
            )
        splits = [(s,) for s in shape]
        if (self.parts, count) == (1, size):
            return UnitView(tuple(splits), (dim,))
        split = (self.parts, count, size // (self.parts * count))
        return UnitView((*splits[:dim], split, *splits[dim + 1 :]), (dim + 1,))


UnitSpec = MaskUnits | Literal["whole", "element"]
UnitFunction = Callable[[nn.Module, str, nn.Parameter], UnitSpec | None]
UnitRule = UnitFunction | Mapping[Any, UnitSpec]


@dataclass(frozen=True)
class UnitView:
    """Units on a tensor of one shape: its dimensions split up, and those that number the units.

    Attributes:
        splits: for each dimension of the tensor the sizes that it is read as; their product is its size.
        kept: positions among all the sizes; a unit is one index of them.
    """

    splits: tuple[tuple[int, ...], ...]
    kept: tuple[int, ...]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The shape as it is read."""
        return tuple(chain.from_iterable(self.splits))

    @cached_property
    def count(self) -> int:
        """Number of units."""
        return prod(self.sizes[d] for d in self.kept)

    @cached_property
    def only_dim(self) -> int | None:
        """The dimension of `view` that numbers the units, where it is one."""
        return self.kept[0] if len(self.kept) == 1 else None

    @cached_property
    def _is_split(self) -> bool:
        return any(len(split) != 1 for split in self.splits)

    @cached_property
    def _others(self) -> tuple[int, ...]:
        return tuple(d for d in range(len(self.sizes)) if d not in self.kept)

    @cached_property
    def _spread_shape(self) -> tuple[int, ...]:
        return tuple(size if d in self.kept else 1 for d, size in enumerate(self.sizes))

    def view(self, tensor: Tensor) -> Tensor:
        """The tensor, read in `sizes`; always possible without a copy, since dimensions are only split."""
        return tensor.view(self.sizes) if self._is_split else tensor

    def norms(self, tensor: Tensor) -> Tensor:
        """`(n,)` norm of each unit, in float32 or wider."""
        values = self.view(tensor)
        wide = tensor.dtype if tensor.dtype.itemsize >= 4 else torch.float32
        if not self._others:  # every element is a unit: there is nothing to reduce
            return values.abs().to(wide.to_real()).flatten()
        by_rows = self.kept == (0,) and values.is_contiguous()  # one dimension is reduced faster than several
        over, dims = (values.flatten(1), (1,)) if by_rows else (values, self._others)
        norms: Tensor = torch.linalg.vector_norm(over, dim=dims, dtype=wide)
        return norms if norms.dim() == 1 else norms.flatten()

    def spread(self, values: Tensor) -> Tensor:
        """`(n,)` values, one for each unit, in a shape that broadcasts with `view`."""
        return values.view(self._spread_shape)

    def numbers(self, device: torch.device) -> Tensor:
        """The number of each element's unit, in a shape that broadcasts with the tensor itself."""
        room: list[int] = []
        shape: list[int] = []
        for split in self.splits:
            own = range(len(room), len(room) + len(split))
            numbered = any(d in self.kept for d in own)
            room += split if numbered else [1] * len(split)
            shape.append(prod(split) if numbered else 1)
        return self.spread(torch.arange(self.count, device=device)).expand(room).reshape(shape)


def find_units(
    parameters: Sequence[nn.Parameter], model: nn.Module, rule: UnitRule | None, min_ndim: int
) -> list[UnitView | None]:
    """The units of each of `parameters`, by the module of `model` that holds it; None where it is left whole.

    Args:
        parameters: of `model`.
        model: all of it.
        rule: the user's, which goes first: a function of `(module, name, parameter)` that returns units or None, or a
            mapping from a parameter, a module or a module's class to units.
        min_ndim: parameters with fewer dimensions are left whole, unless the rule names them.

    Raises:
        ValueError: if the rule names strangers, or units that do not divide a parameter.
        TypeError: if it gives anything but units.
    """
    owners = _owners(model)
    outputs = {id(m.out_proj.weight): m for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    if isinstance(rule, Mapping):
        _refuse_strangers(rule, model)
    found: list[UnitView | None] = []
    for p in parameters:
        module, name = owners.get(id(p), (nn.Module(), ""))
        asked = None if rule is None else _asked(rule, min_ndim, module, name, p)
        if asked is not None:
            found.append(None if asked == "whole" else _resolve(asked, p, module, name))
        elif p.dim() < max(min_ndim, 1) or p.numel() == 0:
            found.append(None)
        elif id(p) in outputs:
            found.append(MaskUnits(outputs[id(p)].num_heads, dim=1).on(p.shape))
        else:
            found.append(_default(module, name, p))
    return found


def _asked(rule: UnitRule, min_ndim: int, module: nn.Module, name: str, p: nn.Parameter) -> UnitSpec | None:
    if not isinstance(rule, Mapping):
        return rule(module, name, p)
    if p in rule:
        return rule[p]
    if p.dim() < min_ndim:
        return None
    keys = (module, *type(module).__mro__)
    return next((rule[key] for key in keys if key in rule), None)


def _owners(model: nn.Module) -> dict[int, tuple[nn.Module, str]]:
    """Module and name of each parameter; a parametrized one's pieces count as the parameter itself."""
    owners = {id(p): (m, name) for m in model.modules() for name, p in m.named_parameters(recurse=False)}
    for module in model.modules():
        parametrized = getattr(module, "parametrizations", None)
        for name, pieces in parametrized.items() if isinstance(parametrized, nn.ModuleDict) else ():
            owners.update({id(p): (module, name) for p in pieces.parameters(recurse=False)})
    return owners


def _refuse_strangers(rule: Mapping[Any, UnitSpec], model: nn.Module) -> None:
    known = {id(part) for part in chain(model.modules(), model.parameters())}
    for key in rule:
        if not isinstance(key, type) and id(key) not in known:
            raise ValueError(
                "`units` should map parameters and modules of the monitor's model, or classes of modules. "
                f"Found a {type(key).__name__} outside of it."
            )


def _resolve(asked: UnitSpec, p: nn.Parameter, module: nn.Module, name: str) -> UnitView:
    if asked == "element":
        return UnitView(tuple((s,) for s in p.shape), tuple(range(p.dim())))
    if not isinstance(asked, MaskUnits):
        raise TypeError(f"`units` should give MaskUnits, 'whole', 'element' or None. Found {asked!r}.")
    try:
        return asked.on(p.shape)
    except ValueError as error:
        raise ValueError(f"`units` of {name!r} in {type(module).__name__}: {error}") from None


def _default(module: nn.Module, name: str, p: nn.Parameter) -> UnitView | None:
    """Filters, heads and rows; None for norms and biases."""
    norms = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
    if isinstance(module, norms) or name == "bias":
        return None
    if isinstance(module, nn.MultiheadAttention):
        if name in ("bias_k", "bias_v"):
            return None
        return MaskUnits(module.num_heads, parts=3 if name == "in_proj_weight" else 1).on(p.shape)
    if isinstance(module, _ConvTransposeNd) and p.shape[:1] == (module.in_channels,):
        # (in, out / groups, ...): output channels of group g belong to the g-th part of the input channels.
        groups = module.groups
        rest = tuple((s,) for s in p.shape[2:])
        return UnitView(((groups, p.shape[0] // groups), (p.shape[1],), *rest), (0, 2))
    return MaskUnits().on(p.shape)
