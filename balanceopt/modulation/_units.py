"""Units: the slices of a parameter that are masked as a whole, such as filters, rows and attention heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from balanceopt._options import check_count, check_kind, shown

_NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

# Names of the submodules of attention in transformers, timm and diffusers.
_SEPARATE = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("q", "k", "v"),
)
_FUSED = ("qkv", "c_attn", "in_proj", "query_key_value")
_OUTPUT = ("out_proj", "o_proj", "out_lin", "to_out", "o", "proj", "c_proj", "dense")
_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "heads")


@dataclass(frozen=True)
class MaskUnits:
    """Division of a parameter into units, each of which is masked as a whole.

    Dimension `dim`, of size `parts * count * width`, is viewed as `(parts, count, width)`; unit j is index j of the
    middle.

    Args:
        count: number of units; None for `size / parts`, a unit for each index.
        dim: dimension that is divided into units.
        parts: number of consecutive repetitions of all units: 3 for query, key and value in one matrix.

    Raises:
        ValueError: if `count` or `parts` is no whole number of at least 1, or `dim` no whole number.

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
        check_count("count", self.count, at_least=1, or_none=True)
        check_count("dim", self.dim, at_least=None)
        check_count("parts", self.parts, at_least=1)

    def on(self, shape: torch.Size) -> UnitView:
        """Return the view of the units on a tensor of `shape`.

        Raises:
            ValueError: if the units do not divide the dimension.
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
    """Units on a tensor of one shape, as dimensions of the tensor with split dimensions.

    Attributes:
        splits: sizes that each dimension of the tensor is split into.
        unit_dims: dimensions of the split tensor that index the units, in ascending order.
    """

    splits: tuple[tuple[int, ...], ...]
    unit_dims: tuple[int, ...]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Shape of the split tensor."""
        return tuple(chain.from_iterable(self.splits))

    @cached_property
    def count(self) -> int:
        """Number of units."""
        return prod(self.sizes[d] for d in self.unit_dims)

    @cached_property
    def only_dim(self) -> int | None:
        """The dimension of the split tensor that indexes the units; None for several dimensions."""
        return self.unit_dims[0] if len(self.unit_dims) == 1 else None

    @cached_property
    def _is_split(self) -> bool:
        return any(len(split) != 1 for split in self.splits)

    @cached_property
    def _spread_shape(self) -> tuple[int, ...]:
        return tuple(size if d in self.unit_dims else 1 for d, size in enumerate(self.sizes))

    def view(self, tensor: Tensor) -> Tensor:
        """Return the tensor with split dimensions, as a view in any memory format."""
        return tensor.view(self.sizes) if self._is_split else tensor

    def spread(self, values: Tensor) -> Tensor:
        """Return `(n,)` values of the units in a shape that broadcasts with `view`."""
        return values.view(self._spread_shape)

    def numbers(self, device: torch.device) -> Tensor:
        """Return the index of each element's unit, in a shape that broadcasts with the unsplit tensor."""
        sizes: list[int] = []
        shape: list[int] = []
        for split in self.splits:
            dims = range(len(sizes), len(sizes) + len(split))
            numbered = any(d in self.unit_dims for d in dims)
            sizes += split if numbered else [1] * len(split)
            shape.append(prod(split) if numbered else 1)
        return (
            self.spread(torch.arange(self.count, dtype=torch.int64, device=device))
            .expand(sizes)
            .reshape(shape)
        )


def check_units(rule: object) -> None:
    """Raise for an invalid rule for units; `find_units` checks whether a rule fits a model.

    Raises:
        TypeError: for a rule, a key or units of another type.
    """
    if isinstance(rule, Mapping):
        for key, spec in rule.items():
            if not (
                isinstance(key, (Tensor, nn.Module)) or (isinstance(key, type) and issubclass(key, nn.Module))
            ):
                raise TypeError(
                    "`units` should map parameters, modules or classes of modules to their units. Found the key "
                    f"{shown(key)}."
                )
            _check_spec(spec)
    elif rule is not None and (not callable(rule) or isinstance(rule, (type, nn.Module))):
        raise TypeError(
            "`units` should be a mapping from parameters, modules or classes of modules to MaskUnits, 'whole' or "
            f"'element', or a function of (module, name, parameter). Found {shown(rule)}."
        )


def _check_spec(spec: object) -> None:
    if not isinstance(spec, MaskUnits) and not (isinstance(spec, str) and spec in ("whole", "element")):
        raise TypeError(f"`units` should give MaskUnits, 'whole', 'element' or None. Found {shown(spec)}.")


def find_units(
    parameters: Sequence[nn.Parameter], model: nn.Module, rule: UnitRule | None, min_ndim: int
) -> list[UnitView | None]:
    """Return the units of each parameter by the parameter's module; None for a parameter that is not masked.

    Args:
        parameters: parameters of the model.
        model: the model that holds the parameters.
        rule: the user's rule, which precedes the default: a function of `(module, name, parameter)` that returns units
            or None, or a mapping from a parameter, a module or a module's class to units.
        min_ndim: least number of dimensions of masked parameters, other than those that the rule names.

    Raises:
        ValueError: if the rule names modules or parameters of another model, or units that do not divide a parameter.
        TypeError: if the rule returns anything but units.
    """
    owners = _owners(model)
    outputs = {id(m.out_proj.weight): m for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    if isinstance(rule, Mapping):
        _refuse_strangers(rule, model)
    result: list[UnitView | None] = []
    for p in parameters:
        module, name = owners.get(id(p), (nn.Module(), ""))
        spec = None if rule is None else _spec_of(rule, min_ndim, module, name, p)
        if spec is not None:
            result.append(None if spec == "whole" else _view_of(spec, p, module, name))
        elif p.dim() < max(min_ndim, 1) or p.numel() == 0:
            result.append(None)
        elif id(p) in outputs:
            result.append(MaskUnits(outputs[id(p)].num_heads, dim=1).on(p.shape))
        else:
            result.append(_default(module, name, p))
    return result


def _spec_of(rule: UnitRule, min_ndim: int, module: nn.Module, name: str, p: nn.Parameter) -> UnitSpec | None:
    if not isinstance(rule, Mapping):
        return rule(module, name, p)
    if p in rule:
        return rule[p]
    if p.dim() < min_ndim:
        return None
    keys = (module, *type(module).__mro__)
    return next((rule[key] for key in keys if key in rule), None)


def _owners(model: nn.Module) -> dict[int, tuple[nn.Module, str]]:
    """Return module and name of each parameter; originals of a parametrized parameter have the parameter's name."""
    owners = {id(p): (m, name) for m in model.modules() for name, p in m.named_parameters(recurse=False)}
    for module in model.modules():
        parametrized = getattr(module, "parametrizations", None)
        for name, pieces in parametrized.items() if isinstance(parametrized, nn.ModuleDict) else ():
            owners.update({id(p): (module, name) for p in pieces.parameters(recurse=False)})
    return owners


def _refuse_strangers(rule: Mapping[Any, UnitSpec], model: nn.Module) -> None:
    members = {id(member) for member in chain(model.modules(), model.parameters())}
    for key in rule:
        if not isinstance(key, type) and id(key) not in members:
            raise ValueError(
                "`units` should map parameters and modules of the monitor's model, or classes of modules. "
                f"Found a {type(key).__name__} outside of it."
            )


def _view_of(spec: UnitSpec, p: nn.Parameter, module: nn.Module, name: str) -> UnitView:
    _check_spec(spec)
    if not isinstance(spec, MaskUnits):
        return UnitView(tuple((s,) for s in p.shape), tuple(range(p.dim())))
    try:
        return spec.on(p.shape)
    except ValueError as error:
        raise ValueError(f"`units` of {name!r} in {type(module).__name__}: {error}") from None


def _default(module: nn.Module, name: str, p: nn.Parameter) -> UnitView | None:
    """Return the default units by the module's type: filters, heads or rows; None for norms and biases."""
    if isinstance(module, _NORMS) or name == "bias":
        return None
    if isinstance(module, nn.MultiheadAttention):
        if name in ("bias_k", "bias_v"):
            return None
        return MaskUnits(module.num_heads, parts=3 if name == "in_proj_weight" else 1).on(p.shape)
    if isinstance(module, _TRANSPOSED) and p.shape[:1] == (module.in_channels,):
        # (in, out / groups, ...): output channels of group g belong to the g-th part of the input channels.
        groups = module.groups
        rest = tuple((s,) for s in p.shape[2:])
        return UnitView(((groups, p.shape[0] // groups), (p.shape[1],), *rest), (0, 2))
    return MaskUnits().on(p.shape)


def attention_heads(model: nn.Module) -> dict[nn.Module, MaskUnits]:
    """Return units by attention head for attention made of linear layers, as in Hugging Face's models.

    Such an attention is a module with the number of heads as an attribute and the projections as submodules with one of
    the usual names. Each projection is masked separately: query, key and value by rows, the output projection by
    columns. `nn.MultiheadAttention` is masked by heads by default.

    Args:
        model: an encoder, or the whole model.

    Returns:
        Mapping for `AMSS(units=...)`, alone or with other layers: `{**attention_heads(model), layer: MaskUnits(8)}`.

    Raises:
        ValueError: if there is no such attention, or an attention without a number of heads.
        TypeError: if `model` is no module.

    Example:
        >>> class Attention(nn.Module):
        ...     num_heads = 2
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.query, self.key, self.value, self.out_proj = (nn.Linear(4, 4) for _ in range(4))
        >>> [(units.count, units.dim) for units in attention_heads(Attention()).values()]
        [(2, 0), (2, 0), (2, 0), (2, 1)]

    Reference:
        Masks by attention head: Yang et al., AMSS (TPAMI 2024), and its published code for BERT.
    """
    check_kind("`model`", model, nn.Module, "a module")
    result: dict[nn.Module, MaskUnits] = {}
    for parent in model.modules():
        result.update(_of_attention(parent, parent))
        # In BERT and ViT the output projection is a sibling of the attention.
        output = getattr(parent, "output", None)
        for child in parent.children():
            if isinstance(output, nn.Module) and not _projections(child, _OUTPUT):
                result.update(_of_attention(child, output))
    if not result:
        raise ValueError(
            f"`model` should hold attention made of linear layers. Found none in {type(model).__name__}: give "
            "AMSS(units={layer: MaskUnits(heads), ...}) by hand."
        )
    return result


def _of_attention(module: nn.Module, holder: nn.Module) -> dict[nn.Module, MaskUnits]:
    """Return units of the attention `module` with output projection in `holder`; empty for other modules."""
    separate = next((names for names in _SEPARATE if len(_projections(module, names)) == len(names)), ())
    projections = _projections(module, separate) or _projections(module, _FUSED)[:1]
    if not projections:
        return {}
    heads = _number_of_heads(module)
    output = {
        layer: MaskUnits(heads, dim=1 - _output_dim(layer)) for layer in _projections(holder, _OUTPUT)[:1]
    }
    if not separate:
        layer = projections[0]
        # GPT-NeoX, BLOOM and Falcon store query, key and value of each head next to each other.
        parts = 1 if layer is getattr(module, "query_key_value", None) else 3
        return {layer: MaskUnits(heads, dim=_output_dim(layer), parts=parts), **output}
    width = _outputs(projections[0]) // heads
    # Counted by layer, because keys and values have fewer heads in grouped-query attention.
    inputs = {layer: MaskUnits(_outputs(layer) // width, dim=_output_dim(layer)) for layer in projections}
    return {**inputs, **output}


def _number_of_heads(module: nn.Module) -> int:
    for source in (module, getattr(module, "config", None)):
        for name in _HEADS:
            heads = getattr(source, name, None)
            if isinstance(heads, int):
                return heads
    raise ValueError(
        f"{type(module).__name__} has no number of heads. Give AMSS(units={{layer: MaskUnits(heads), ...}})."
    )


def _projections(module: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """Return the submodules of these names with a weight tensor, in the order of the names."""
    children = [getattr(module, name, None) for name in names]
    return [
        child
        for child in children
        if isinstance(child, nn.Module) and isinstance(getattr(child, "weight", None), Tensor)
    ]


def _output_dim(layer: nn.Module) -> int:
    """Return the output dimension of a layer's weight: 0, or 1 in transformers' `Conv1D`."""
    return 0 if isinstance(layer, nn.Linear) else 1


def _outputs(layer: nn.Module) -> int:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.shape[_output_dim(layer)]
