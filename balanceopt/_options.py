"""Checks of user arguments, with messages of one form: the expected value, then the given one."""

from __future__ import annotations

import math
import reprlib
import sys
from collections.abc import Collection, Iterable, Mapping
from numbers import Integral, Real
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor

Kind = Literal["any", "real", "bool", "integer"]

# Types whose repr is short and readable enough for a message.
_PLAIN = (str, bytes, bool, Integral, Real, complex, slice, type(None), tuple, list, dict, set, frozenset)


def shown(value: object) -> str:
    """Format a given value, short enough for a message."""
    if isinstance(value, type):
        return f"the class {value.__name__}, not an instance of it"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    return reprlib.repr(value) if isinstance(value, _PLAIN) else type(value).__name__


def names_of(names: Iterable[object]) -> str:
    """Format names of any type in sorted order, for a message."""
    return f"[{', '.join(sorted(map(repr, names)))}]"


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite real number of Python or numpy, and not a bool."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    number: Any = value
    return bool(abs(number) <= sys.float_info.max)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is an integer of Python or numpy, and not a bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_number(
    name: str,
    value: object,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    at_most: float = math.inf,
) -> None:
    """Check that an option is a finite number within limits.

    Raises:
        ValueError: naming the option, its range and the given value.
    """
    if is_number(value) and above < value and at_least <= value <= at_most:
        return
    limits = f" of at least {at_least:g}" if at_least > -math.inf else ""
    limits = f" above {above:g}" if above > -math.inf else limits
    limits = f" from {at_least:g} to {at_most:g}" if at_most < math.inf else limits
    raise ValueError(f"`{name}` should be a finite number{limits}. Found {name} = {shown(value)}.")


def check_count(
    name: str,
    value: object,
    *,
    at_least: int | None = 0,
    or_none: bool = False,
) -> None:
    """Check that an option is a whole number within limits.

    Raises:
        ValueError: naming the option, its range and the given value.
    """
    if or_none and value is None:
        return
    if is_whole(value) and (at_least is None or value >= at_least):
        return
    limits = ("" if at_least is None else f" of at least {at_least}") + (", or None" if or_none else "")
    raise ValueError(f"`{name}` should be a whole number{limits}. Found {name} = {shown(value)}.")


def check_seed(value: object) -> None:
    """Check that a seed is a whole number or None.

    Raises:
        ValueError: naming the given value.
    """
    check_count("seed", value, at_least=None, or_none=True)


def check_choice(name: str, value: object, choices: Collection[str], *, other: str = "") -> None:
    """Check that an option is one of its choices; `other` names further allowed values in the message.

    Raises:
        ValueError: naming the option, the choices and the given value.
    """
    if isinstance(value, str) and value in choices:
        return
    raise ValueError(f"`{name}` should be one of {tuple(choices)}{other}. Found {name} = {shown(value)}.")


def check_flag(name: str, value: object, *, or_none: bool = False) -> None:
    """Check that an option is True or False.

    Raises:
        ValueError: naming the option and the given value.
    """
    if not isinstance(value, bool) and not (or_none and value is None):
        choices = "True, False or None" if or_none else "True or False"
        raise ValueError(f"`{name}` should be {choices}. Found {name} = {shown(value)}.")


def check_kind(role: str, value: object, kinds: type | tuple[type, ...], expected: str) -> None:
    """Check that an argument is an instance of some types.

    Raises:
        TypeError: naming the expected and the given type; also for a class in place of its instance.
    """
    if not isinstance(value, kinds):
        raise TypeError(f"{role} should be {expected}. Found {shown(value)}.")


def check_function(name: str, value: object, of: str) -> None:
    """Check that an argument is a function or None.

    Raises:
        ValueError: naming the arguments that the function would get; also for a class.
    """
    if value is not None and (isinstance(value, type) or not callable(value)):
        raise ValueError(f"`{name}` should be a function of {of}, or None. Found {shown(value)}.")


def check_generator(generator: object) -> None:
    """Check that an argument is a `torch.Generator` or None.

    Raises:
        TypeError: naming the given type.
    """
    check_kind("`generator`", generator, (torch.Generator, type(None)), "a torch.Generator or None")


def check_tensor(
    name: str, value: Any, shape: str, *, dims: Collection[int] = (), kind: Kind = "real", empty: bool = True
) -> None:
    """Check that an argument is a dense tensor of some dtype and number of dimensions.

    Args:
        name: name of the argument.
        value: the given argument.
        shape: the expected shape, for the message.
        dims: allowed numbers of dimensions; empty for any.
        kind: `"real"` for any dtype but complex ones, `"any"`, `"bool"` or `"integer"` (bools too).
        empty: whether a tensor without elements is allowed.

    Raises:
        TypeError: if `value` is not a tensor.
        ValueError: for another layout, dtype or number of dimensions, or a forbidden empty tensor.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` should be a tensor of shape {shape}. Found {shown(value)}.")
    fits = {
        "any": True,
        "real": not value.is_complex(),
        "bool": value.dtype is torch.bool,
        "integer": not (value.is_floating_point() or value.is_complex()),
    }[kind]
    dense = value.layout is torch.strided
    if not (fits and dense and (not dims or value.dim() in dims) and (empty or value.numel())):
        what = "" if kind == "any" else f"{kind} "
        raise ValueError(
            f"`{name}` should be a dense {what}tensor of shape {shape}{'' if empty else ', not empty'}. Found shape "
            f"{tuple(value.shape)}, dtype {value.dtype}{'' if dense else f', layout {value.layout}'}."
        )


def to_tensor(name: str, value: Any, expected: str) -> Tensor:
    """Convert sequences and arrays of numbers to a CPU tensor; return a tensor unchanged.

    Raises:
        TypeError: if `value` can't be converted.
    """
    if isinstance(value, Tensor):
        return value
    try:
        return torch.as_tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"`{name}` should be {expected}. Found {shown(value)}.") from error


def check_entries(role: str, state: Any, names: Collection[str]) -> None:
    """Check that a state is a mapping with all of its entries.

    Raises:
        TypeError: if `state` is not a mapping.
        KeyError: naming the missing entries.
    """
    check_kind(role, state, Mapping, "what state_dict() returned, a mapping")
    missing = [name for name in names if name not in state]
    if missing:
        raise KeyError(f"{role} should be what state_dict() returned. Missing: {missing}.")
