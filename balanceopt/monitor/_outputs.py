"""Tensors inside module outputs: tensors, tuples, dicts, dataclasses, Hugging Face outputs."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor


def is_differentiable(x: Tensor) -> bool:
    """Tell whether a tensor may hold features, real or complex, and no masks, indices or lengths."""
    return x.is_floating_point() or x.is_complex()


def detached_copy(x: Tensor) -> Tensor:
    """Copy a tensor without its graph, since modules after an encoder may change its output in place."""
    return x.detach().clone()


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply `function` to each tensor in `value`, and keep types and structure."""
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
            object.__setattr__(twin, f.name, map_tensors(function, getattr(value, f.name)))  # works if frozen
        return twin
    return value


def _with_items(value: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """Copy a mapping with other items; return a dict if the mapping is immutable."""
    if not isinstance(value, MutableMapping):
        return items
    twin = copy.copy(value)
    for key, item in items.items():
        twin[key] = item
    return twin


def first_tensor(value: Any) -> Tensor | None:
    """Return the first tensor in a value of any structure; None if there is no tensor."""
    return next(tensors_in(value), None)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Iterate over the tensors in a value of any structure, in order."""
    return (tensor for _, tensor in named_tensors(value))


def named_tensors(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in a value of any structure, in order, with paths such as "last_hidden_state" or "1.0"."""
    if isinstance(value, Tensor):
        yield path, value
        return
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        items = zip(value._fields, value, strict=True)
    elif isinstance(value, (tuple, list)):
        items = enumerate(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
    for key, item in items:
        yield from named_tensors(item, f"{path}.{key}" if path else str(key))


def feature_tensors(value: Any) -> dict[str, Tensor]:
    """Return by path the tensors that may hold features or logits: no masks, indices or scalars."""
    return {path: x for path, x in named_tensors(value) if is_differentiable(x) and x.dim() > 0}


def shapes_of(tensors: Mapping[str, Tensor]) -> str:
    """Format paths and shapes of an output's tensors, for messages."""
    return ", ".join(f"{path or 'the output'} {tuple(x.shape)}" for path, x in tensors.items()) or "none"
