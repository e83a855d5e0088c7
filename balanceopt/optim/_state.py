"""The step counter, the seed and the epoch in an optimizer's param groups, which every checkpoint format carries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from balanceopt._options import check_count, check_entries, check_kind
from balanceopt._sharding import local_part
from balanceopt._warnings import warn_user
from balanceopt.distributed import shared_seed
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
    """Refuse what an optimizer can't load, and counters that are none.

    Raises:
        TypeError: if it is no mapping, or its parts are of another kind.
        KeyError: if a part is missing, or one of the counters without the others.
        ValueError: for a counter that is no whole number.
    """
    # Optimizers around others have states of other parts.
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


class Counters:
    """The step counter, the seed and the epoch; plain numbers, equal in every param group.

    Args:
        optimizer: the base, whose groups they live in.
        monitor: whose ranks share the seed.
        seed: of all randomness; None for what the groups hold, else `torch.initial_seed()`. That of the first rank
            holds for all.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, monitor: ModalityMonitor, seed: int | None) -> None:
        self._optimizer = optimizer
        self._is_chosen = seed is not None
        self._seed = shared_seed(monitor.group, seed)

    def read(self) -> tuple[int, int, int | None]:
        """Return how many steps came before, the seed, and the epoch that was set last; None before the first one."""
        first = self._optimizer.param_groups[0]
        epoch = first[EPOCH]
        return int(first[STEP]), int(first[SEED]), None if epoch is None else int(epoch)

    def write(self, key: str, value: int) -> None:
        """Write a counter, `STEP`, `SEED` or `EPOCH`, into every group."""
        for group in self._optimizer.param_groups:
            group[key] = value

    def begin(self) -> None:
        """Start from what a checkpoint or an earlier wrapper left in the groups, or anew."""
        found = STEP in self._optimizer.param_groups[0]
        self.fill()
        if found and self._is_chosen:
            self.write(SEED, self._seed)

    def fill(self) -> None:
        """Give groups that are new what the first one has."""
        # All keys are there from the start: a flattened checkpoint is read by the keys that the optimizer has.
        defaults: dict[str, Any] = {STEP: 0, SEED: self._seed, EPOCH: None}
        first = self._optimizer.param_groups[0]
        for group in self._optimizer.param_groups:
            for key, value in defaults.items():
                group.setdefault(key, first.get(key, value))

    def load(self) -> None:
        """Take over what a checkpoint put there."""
        first = self._optimizer.param_groups[0]
        if STEP not in first:
            warn_user(BARE_STATE)
        elif first[STEP] == 0 and _is_trained(self._optimizer):
            # torch.distributed.checkpoint fills in what a checkpoint lacks with what the optimizer had.
            warn_user(NOT_COUNTED)
        self.fill()

    def clear(self) -> None:
        """Leave the groups as they were."""
        for group in self._optimizer.param_groups:
            for key in (STEP, SEED, EPOCH):
                group.pop(key, None)


def _is_trained(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its state has left zero, where a step without gradients or no step at all has put it."""
    return any(
        isinstance(value, torch.Tensor) and value.dim() > 0 and bool(local_part(value).any())
        for state in optimizer.state.values()
        if isinstance(state, dict)
        for value in state.values()
    )


def device_of(optimizer: torch.optim.Optimizer) -> torch.device:
    """Where the optimizer's first parameter is."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return next((p.device for p in parameters), torch.device("cpu"))
