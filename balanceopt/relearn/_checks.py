"""What `ReLearnScheduler` refuses before anything is changed."""

from __future__ import annotations

from typing import Any, get_args

import torch

from balanceopt.monitor import ModalityMonitor
from balanceopt.relearn._reinit import OptimizerState
from balanceopt.relearn._sources import is_given


def check_arguments(
    optimizer: torch.optim.Optimizer,
    monitor: ModalityMonitor,
    every: int,
    max_relearns: int | None,
    optimizer_state: OptimizerState,
) -> None:
    """Refuse what can't be re-learned with.

    Raises:
        TypeError: if `optimizer` or `monitor` is something else.
        ValueError: for an option outside its range.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"`optimizer` should be a torch.optim.Optimizer. Found {type(optimizer).__name__}.")
    if not isinstance(monitor, ModalityMonitor):
        raise TypeError(f"`monitor` should be a ModalityMonitor. Found {type(monitor).__name__}.")
    if every < 1:
        raise ValueError(f"`every` should be at least 1. Found every = {every}.")
    if max_relearns is not None and max_relearns < 0:
        raise ValueError(
            f"`max_relearns` should be non-negative or None. Found max_relearns = {max_relearns}."
        )
    if optimizer_state not in get_args(OptimizerState):
        raise ValueError(
            f"`optimizer_state` should be one of {get_args(OptimizerState)}. Found {optimizer_state!r}."
        )


def check_loaders(train: Any, val: Any) -> None:
    """Refuse one loader without the other, and features in the place of a loader.

    Raises:
        ValueError, TypeError: naming what to pass.
    """
    for loader, name in ((train, "train_loader"), (val, "val_loader")):
        if loader is None and (train is not None or val is not None):
            raise ValueError(
                f"`{name}` should yield batches: a diagnosis compares training with held-out samples. Found None; "
                "give both loaders, or neither and features to each step."
            )
        if is_given(loader):
            raise TypeError(
                f"`{name}` should be a loader. Found features: pass them to each step, and None for both loaders here."
            )
