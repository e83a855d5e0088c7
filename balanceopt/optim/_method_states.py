"""The modulations' states in an optimizer's param groups, which every checkpoint format carries."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

import torch

from balanceopt._options import check_kind, shown
from balanceopt._warnings import warn_user
from balanceopt.modulation import Modulation
from balanceopt.optim._state import METHODS


class MethodStates:
    """The modulations' states, as one string in every param group; None where no modulation has a state.

    A string, because checkpoint formats differ in the other values that they support in a param group: some compare
    values of two groups for equality, some flatten lists.

    Args:
        optimizer: the base optimizer, whose groups hold the string.
        modulations: the methods whose states are saved.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, modulations: Sequence[Modulation]) -> None:
        self._optimizer = optimizer
        self._modulations = list(modulations)
        self._names = [type(modulation).__name__ for modulation in modulations]
        self._fresh = [modulation.state_dict() for modulation in modulations]

    def begin(self) -> None:
        """Load any states that a checkpoint or an earlier wrapper left in the groups, then save all states."""
        if self._optimizer.param_groups[0].get(METHODS) is not None:
            self.load()
        self.save()

    def save(self) -> None:
        """Write the current states into the groups, with a device synchronisation."""
        states = [modulation.state_dict() for modulation in self._modulations]
        text = (
            to_text([list(pair) for pair in zip(self._names, states, strict=True)]) if any(states) else None
        )
        for group in self._optimizer.param_groups:
            group[METHODS] = text

    def fill(self) -> None:
        """Add the entry to new groups: a flattened checkpoint is read by the keys in the optimizer's groups."""
        for group in self._optimizer.param_groups:
            group.setdefault(METHODS, None)

    def load(self) -> None:
        """Load the states from the groups into the methods. A load that fails changes nothing.

        Raises:
            ValueError: if the text can't be read.
            TypeError, KeyError, ValueError: as the methods' `load_state_dict`.
        """
        text = self._optimizer.param_groups[0].get(METHODS)
        saved = [] if text is None else from_text(text)
        names, states = [name for name, _ in saved], [state for _, state in saved]
        if names != self._names:
            if any(self._fresh) or any(states):
                warn_user(
                    f"the checkpoint holds the states of the methods {names}, this optimizer has {self._names}: their "
                    "states start anew."
                )
            states = self._fresh
        before = [modulation.state_dict() for modulation in self._modulations]
        try:
            for modulation, state in zip(self._modulations, states, strict=True):
                modulation.load_state_dict(state)
        except BaseException:
            for modulation, state in zip(self._modulations, before, strict=True):
                modulation.load_state_dict(state)
            raise
        self.fill()

    def clear(self) -> None:
        """Remove the entry from the groups."""
        for group in self._optimizer.param_groups:
            group.pop(METHODS, None)


def to_text(states: list[list[Any]]) -> str:
    """Serialise pairs of a method's name and state, of plain values and tensors, exactly.

    Raises:
        TypeError: for a value of another type in a state.
    """
    return json.dumps(states, default=_tensor_to_json)


def from_text(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Parse the pairs that `to_text` wrote, with tensors on the CPU.

    Raises:
        ValueError: if the text has another form.
    """
    try:
        pairs = json.loads(text, object_hook=_tensor_from_json)
        check_kind("the text", pairs, list, "a list")
        return [(str(name), dict(state)) for name, state in pairs]
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"{METHODS} should be the text that an optimizer's state_dict() wrote. Found {shown(text)}."
        ) from error


def _tensor_to_json(value: object) -> dict[str, Any]:
    check_kind(
        "each value in a method's state",
        value,
        torch.Tensor,
        "a number, a string, a list, a mapping or a tensor",
    )
    assert isinstance(value, torch.Tensor)
    numbers = value.detach().cpu().contiguous()
    content = numbers.reshape(-1).view(torch.uint8).numpy().tobytes() if numbers.numel() else b""
    return {
        "dtype": str(value.dtype).removeprefix("torch."),
        "shape": list(value.shape),
        "bytes": base64.b64encode(content).decode("ascii"),
    }


def _tensor_from_json(entry: dict[str, Any]) -> Any:
    if entry.keys() != {"dtype", "shape", "bytes"}:
        return entry
    content = bytearray(base64.b64decode(entry["bytes"]))
    dtype = getattr(torch, entry["dtype"])
    flat = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype, device="cpu")
    return flat.reshape(entry["shape"])
