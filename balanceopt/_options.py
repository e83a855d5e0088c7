"""Checks of what a user gives, with messages of one form: what was expected, what came."""

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

# Their repr says what they are, in a few words.
_PLAIN = (str, bytes, bool, Integral, Real, complex, slice, type(None), tuple, list, dict, set, frozenset)


def shown(value: object) -> str:
    """What was given, short enough for a message."""
    if isinstance(value, type):
        return f"the class {value.__name__}, not an instance of it"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    return reprlib.repr(value) if isinstance(value, _PLAIN) else type(value).__name__


def names_of(names: Iterable[object]) -> str:
    """Names of any kind in order, for a message."""
    return f"[{', '.join(sorted(map(repr, names)))}]"


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a finite real number: of Python or numpy, and no bool."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    number: Any = value
    return bool(abs(number) <= sys.float_info.max)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether it is an integer, of Python or numpy, and no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_number(
    name: str,
    value: object,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    at_most: float = math.inf,
) -> None:
    """Refuse anything but a finite number within limits.

    Raises:
        ValueError: naming the option, its range and what was found.
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
    """Refuse anything but a whole number within limits.

    Raises:
        ValueError: naming the option, its range and what was found.
    """
    if or_none and value is None:
        return
    if is_whole(value) and (at_least is None or value >= at_least):
        return
    limits = ("" if at_least is None else f" of at least {at_least}") + (", or None" if or_none else "")
    raise ValueError(f"`{name}` should be a whole number{limits}. Found {name} = {shown(value)}.")


def check_seed(value: object) -> None:
    """Refuse anything but a whole number, or None.

    Raises:
        ValueError: naming what was found.
    """
    check_count("seed", value, at_least=None, or_none=True)


def check_choice(name: str, value: object, choices: Collection[str], *, other: str = "") -> None:
    """Refuse anything but one of a few values; `other` says what else is allowed.

    Raises:
        ValueError: naming the option, the choices and what was found.
    """
    if isinstance(value, str) and value in choices:
        return
    raise ValueError(f"`{name}` should be one of {tuple(choices)}{other}. Found {name} = {shown(value)}.")


def check_flag(name: str, value: object, *, or_none: bool = False) -> None:
    """Refuse anything but True and False.

    Raises:
        ValueError: naming the option and what was found.
    """
    if not isinstance(value, bool) and not (or_none and value is None):
        choices = "True, False or None" if or_none else "True or False"
        raise ValueError(f"`{name}` should be {choices}. Found {name} = {shown(value)}.")


def check_kind(role: str, value: object, kinds: type | tuple[type, ...], expected: str) -> None:
    """Refuse an object of another kind, and a class in the place of an object.

    Raises:
        TypeError: saying what was expected and what was found.
    """
    if not isinstance(value, kinds):
        raise TypeError(f"{role} should be {expected}. Found {shown(value)}.")


def check_function(name: str, value: object, of: str) -> None:
    """Refuse anything that can't be called, but for None; and a class in the place of a function.

    Raises:
        ValueError: saying what the function would be called with.
    """
    if value is not None and (isinstance(value, type) or not callable(value)):
        raise ValueError(f"`{name}` should be a function of {of}, or None. Found {shown(value)}.")


def check_generator(generator: object) -> None:
    """Refuse anything but a source of random numbers, or None.

    Raises:
        TypeError: saying what was found.
    """
    check_kind("`generator`", generator, (torch.Generator, type(None)), "a torch.Generator or None")


def check_tensor(
    name: str, value: Any, shape: str, *, dims: Collection[int] = (), kind: Kind = "real", empty: bool = True
) -> None:
    """Refuse anything but a dense tensor of some kind of numbers.

    Args:
        name: of the argument.
        value: what was given.
        shape: what the message says of its shape.
        dims: allowed numbers of dimensions; all where empty.
        kind: `"real"` numbers of any dtype, `"any"` (complex ones too), `"bool"` or `"integer"` (bools too).
        empty: whether it may be without an element.

    Raises:
        TypeError: for anything but a tensor.
        ValueError: for another kind of tensor or another number of dimensions.
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
    """A tensor as it is; sequences and arrays of numbers as a tensor on the CPU.

    Raises:
        TypeError: for what is no numbers.
    """
    if isinstance(value, Tensor):
        return value
    try:
        return torch.as_tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"`{name}` should be {expected}. Found {shown(value)}.") from error


def check_entries(role: str, state: Any, names: Collection[str]) -> None:
    """Refuse a state that is no mapping, or lacks an entry.

    Raises:
        TypeError, KeyError: naming what is missing.
    """
    check_kind(role, state, Mapping, "what state_dict() returned, a mapping")
    missing = [name for name in names if name not in state]
    if missing:
        raise KeyError(f"{role} should be what state_dict() returned. Missing: {missing}.")
