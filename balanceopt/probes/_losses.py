"""Losses of the probes and of the joint prediction: their sums over training and over validation, and the means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from balanceopt._options import check_entries, check_kind, shown
from balanceopt.distributed import Group, sum_over_ranks
from balanceopt.functional import AnswerKind, wide
from balanceopt.monitor import two_classes
from balanceopt.probes._rows import Rows, target_by_sample, valid_target


class ProbeLosses(NamedTuple):
    """Mean losses of the probes in the monitor's order, and last the joint loss, each `(M + 1,)` float64.

    NaN where there was no sample, infinite where a prediction was not finite.

    Attributes:
        train: mean over the training samples, each in the pass that brought it, before the probes' step.
        val: mean over the samples of validation.
    """

    train: Tensor
    val: Tensor


class LossSums:
    """Sums of losses and numbers of samples, of training over all ranks and of validation on this rank.

    Args:
        modalities: the modalities, in the order of the columns; the last column is that of the joint prediction.
    """

    def __init__(self, modalities: tuple[str, ...]) -> None:
        self._names = (*modalities, None)
        nothing = torch.zeros(2, len(self._names), dtype=torch.float32, device="cpu")
        self._sums = {"train": nothing, "val": nothing}

    def columns(self, sums: Mapping[str | None, Tensor], device: torch.device) -> Tensor:
        """Stack the sums `(2,)` of a batch by name, of the joint prediction under None, to `(2, M + 1)`."""
        nothing = torch.zeros(2, dtype=torch.float32, device=device)
        return torch.stack([sums.get(name, nothing).to(device) for name in self._names], 1)

    def add(self, split: str, sums: Tensor) -> None:
        """Add the sums `(2, M + 1)` of a batch to those of a split, `"train"` or `"val"`."""
        # Not in place, because sums made in inference mode can't be changed outside.
        self._sums[split] = self._sums[split].to(sums.device) + sums

    def take(self, device: torch.device, group: Group) -> ProbeLosses:
        """Return the means since the previous call and start anew; over ranks a collective."""
        held, self._sums = self._sums, {name: torch.zeros_like(x) for name, x in self._sums.items()}
        both = held["train"], sum_over_ranks(held["val"].to(device), group)
        return ProbeLosses(*((total / count).cpu().double() for total, count in both))

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the sums by split."""
        return {name: sums.clone() for name, sums in self._sums.items()}

    def check_state(self, state: Any) -> None:
        """Raise where `load_state_dict` would, before anything changes."""
        check_entries("the state's 'losses'", state, tuple(self._sums))
        for name, sums in self._sums.items():
            value = state[name]
            check_kind(f"the state's {name!r} losses", value, Tensor, "a tensor")
            if value.shape != sums.shape or not value.is_floating_point():
                raise ValueError(
                    f"the state's {name!r} losses should be floating, of shape {tuple(sums.shape)}. Found "
                    f"{shown(value)}."
                )

    def load_state_dict(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Replace the sums by copies of a state's."""
        self._sums = {name: state[name].detach().to(device, torch.float32).clone() for name in self._sums}


def sums_of(prediction: Tensor, rows: Rows, task: AnswerKind) -> Tensor:
    """Sum the losses of predictions `(B, O)`, infinite for what is not finite; `(2,)`: the sum and the number."""
    if task == "classes":
        loss = F.cross_entropy(prediction, rows.y, reduction="none")
    elif task == "labels":
        loss = F.binary_cross_entropy_with_logits(prediction, rows.y, reduction="none").mean(1)
    else:
        loss = (prediction - rows.y).square().mean(1)
    loss = torch.where(rows.weight > 0, loss.nan_to_num(nan=torch.inf, posinf=torch.inf), 0)
    return torch.stack([loss.sum(), rows.weight.sum()]).float()


def joint_sums_of(
    by_head: Mapping[str | None, Tensor], target: Tensor, task: AnswerKind, ignore_index: int
) -> Tensor:
    """Sum the losses of the heads' added logits; `(2,)`: the sum and the number, 0 for a target of other rows."""
    logits = wide(torch.stack(list(by_head.values())).sum(0))
    logits = two_classes(logits) if task == "classes" else logits
    y = target_by_sample(target, task).to(logits.device)
    if y.shape not in (logits.shape, logits.shape[:1]):
        return torch.zeros(2, dtype=torch.float32, device=logits.device)
    y, valid = valid_target(y, logits.dtype, ignore_index)
    return sums_of(logits, Rows(logits, y, valid.to(logits.dtype)), task)
