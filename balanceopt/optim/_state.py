"""Step counter, seed, epoch and methods' states in param groups, which every format of checkpoints carries."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from balanceopt._options import check_count, check_entries, check_kind, shown
from balanceopt._sharding import local_part
from balanceopt._warnings import warn_user
from balanceopt.distributed import shared_seed
from balanceopt.modulation import Modulation
from balanceopt.monitor import ModalityMonitor
from balanceopt.optim._checks import refuse_differentiable

STEP, SEED, EPOCH = "balanceopt_step", "balanceopt_seed", "balanceopt_epoch"
METHODS = "balanceopt_methods"

BARE_STATE = (
    "the checkpoint holds a bare optimizer's state: it is loaded, and balanceopt's step counter and seed "
    "start anew."
)
NOT_COUNTED = (
    "the optimizer state that was loaded has been trained, and balanceopt's step counter in it is 0: the checkpoint is "
    "taken for a bare optimizer's, and steps count from 0."
)


def check_state(optimizer: torch.optim.Optimizer, state: object) -> None:
    """Raise for a state that the optimizer can't load, or whose counters are invalid.

    Raises:
        TypeError: if the state is no mapping, or a part has another type.
        KeyError: if a part is missing, or one of the counters.
        ValueError: for a counter that is no whole number.
    """
    # Parts are required of the standard format only, because wrappers of optimizers have other formats.
    usual = type(optimizer).load_state_dict is torch.optim.Optimizer.load_state_dict
    parts: dict[str, type | tuple[type, ...]] = {"state": Mapping, "param_groups": (list, tuple)}
    check_entries("the optimizer's state", state, parts if usual else ())
    assert isinstance(state, Mapping)
    for part, kinds in parts.items():
        if part in state:
            check_kind(f"the optimizer's state[{part!r}]", state[part], kinds, "what state_dict() returned")
    for group in state.get("param_groups", ()):
        check_kind("each of the state's param groups", group, Mapping, "a mapping")
        if STEP in group or SEED in group:
            check_entries("each of the state's param groups", group, (STEP, SEED, EPOCH))
            check_count(STEP, group[STEP])
            check_count(SEED, group[SEED])
        check_count(EPOCH, group.get(EPOCH), or_none=True)
        check_kind(METHODS, group.get(METHODS), (str, type(None)), "the methods' states as one text, or None")
        refuse_differentiable(group)


class State:
    """What a checkpoint of the optimizer carries: step counter, seed, epoch and methods' states, in every param group.

    The counters are plain numbers. The methods' states are one string, None where no method has a state, because
    checkpoint formats differ in the other values that they support in a param group: some compare values of two groups
    for equality, some flatten lists.

    Args:
        optimizer: the base optimizer, whose groups hold the state.
        monitor: the monitor, whose ranks share the seed.
        modulations: the methods whose states are saved.
        seed: seed of all randomness; None for the seed in the groups, else `torch.initial_seed()`. All ranks use the
            first rank's.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        monitor: ModalityMonitor,
        modulations: Sequence[Modulation],
        seed: int | None,
    ) -> None:
        self._optimizer = optimizer
        self._modulations = list(modulations)
        self._names = [type(modulation).__name__ for modulation in modulations]
        self._fresh = [modulation.state_dict() for modulation in modulations]
        self._is_chosen = seed is not None
        self._seed = shared_seed(monitor.group, seed)

    def read(self) -> tuple[int, int, int | None]:
        """Return the number of earlier steps, the seed, and the current epoch, None before the first `set_epoch`."""
        first = self._optimizer.param_groups[0]
        epoch = first[EPOCH]
        return int(first[STEP]), int(first[SEED]), None if epoch is None else int(epoch)

    def write(self, key: str, value: int | str | None) -> None:
        """Write an entry, `STEP`, `SEED`, `EPOCH` or `METHODS`, into every group."""
        for group in self._optimizer.param_groups:
            group[key] = value

    def begin(self) -> None:
        """Start from the state that a checkpoint or an earlier wrapper left in the groups, else from step 0."""
        first = self._optimizer.param_groups[0]
        if STEP in first and self._is_chosen:
            self.write(SEED, self._seed)
        self.fill()
        if first[METHODS] is not None:
            self._load_methods()
        self.save()

    def fill(self) -> None:
        """Copy the entries of the first group into new groups."""
        # All keys exist from the start, because a flattened checkpoint is read by the keys in the optimizer's groups.
        defaults: dict[str, Any] = {STEP: 0, SEED: self._seed, EPOCH: None, METHODS: None}
        first = self._optimizer.param_groups[0]
        for group in self._optimizer.param_groups:
            for key, value in defaults.items():
                group.setdefault(key, first.get(key, value))

    def save(self) -> None:
        """Write the methods' current states into the groups, with a device synchronisation."""
        states = [modulation.state_dict() for modulation in self._modulations]
        pairs = [list(pair) for pair in zip(self._names, states, strict=True)]
        self.write(METHODS, to_text(pairs) if any(states) else None)

    def load(self) -> None:
        """Continue from a loaded checkpoint, with a warning where it has no counters; a failed load changes no method.

        Raises:
            ValueError: if the methods' states can't be read.
            TypeError, KeyError, ValueError: as the methods' `load_state_dict`.
        """
        first = self._optimizer.param_groups[0]
        if STEP not in first:
            warn_user(BARE_STATE)
        elif first[STEP] == 0 and _is_trained(self._optimizer):
            # torch.distributed.checkpoint fills keys missing in a checkpoint with the optimizer's current values.
            warn_user(NOT_COUNTED)
        self.fill()
        self._load_methods()

    def clear(self) -> None:
        """Remove the entries from the groups."""
        for group in self._optimizer.param_groups:
            for key in (STEP, SEED, EPOCH, METHODS):
                group.pop(key, None)

    def _load_methods(self) -> None:
        text = self._optimizer.param_groups[0][METHODS]
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


def _is_trained(optimizer: torch.optim.Optimizer) -> bool:
    """Whether any tensor in the optimizer's state is non-zero, as after a step with gradients."""
    return any(
        isinstance(value, torch.Tensor) and value.dim() > 0 and bool(local_part(value).any())
        for state in optimizer.state.values()
        if isinstance(state, dict)
        for value in state.values()
    )


def device_of(optimizer: torch.optim.Optimizer) -> torch.device:
    """Return the device of the optimizer's first parameter; the CPU if there is none."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return next((p.device for p in parameters), torch.device("cpu"))


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
