"""Tensors inside what modules return: tensors, tuples, dicts, dataclasses, Hugging Face outputs."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor

# Where several tensors come back, these names are the one meant.
_FEATURES = ("pooler_output",)
_LOGITS = ("logits",)


def features_of(output: Any) -> Tensor | None:
    """The feature tensor of an encoder's output: itself, its `pooler_output`, or the first tensor in it."""
    return _pick(output, _FEATURES)


def logits_of(output: Any) -> Tensor | None:
    """The logits of a head's or model's output: itself, its `logits`, or the first tensor in it."""
    return _pick(output, _LOGITS)


def is_differentiable(x: Tensor) -> bool:
    """Whether a tensor may hold features, real or complex: not masks, indices and lengths."""
    return x.is_floating_point() or x.is_complex()


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with `function` applied to each tensor in it, of the same types and structure."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        changed = {key: map_tensors(function, item) for key, item in value.items()}
        return changed if type(value) is dict else _with_items(value, changed)
    if isinstance(value, tuple):
        items = [map_tensors(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [map_tensors(function, item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        twin = copy.copy(value)
        for f in dataclasses.fields(value):
            object.__setattr__(twin, f.name, map_tensors(function, getattr(value, f.name)))  # frozen ones too
        return twin
    return value


def _with_items(value: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """A mapping of the same type with other items; a dict for one that can't be changed."""
    if not isinstance(value, MutableMapping):
        return items
    twin = copy.copy(value)
    for key, item in items.items():
        twin[key] = item
    return twin


def _pick(output: Any, names: tuple[str, ...]) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    for name in names:
        named = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(named, Tensor):
            return named
    return first_tensor(output)


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor in a value of any structure; None where there is none."""
    return next(tensors_in(value), None)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in a value of any structure, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors_in_each(value.values())
    elif isinstance(value, (tuple, list)):
        yield from _tensors_in_each(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _tensors_in_each(getattr(value, f.name) for f in dataclasses.fields(value))


def _tensors_in_each(items: Iterable[Any]) -> Iterator[Tensor]:
    for item in items:
        yield from tensors_in(item)
