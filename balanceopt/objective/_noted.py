"""What the injection remembers of a pass, and what it refuses to guess."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from balanceopt.monitor._outputs import map_tensors
from balanceopt.monitor._pass import Pass


@dataclass(eq=False)
class Noted:
    """What is remembered of one pass.

    Attributes:
        outputs: each encoder's latest output, detached.
        calls: how often each encoder was called.
        autocast: whether the forward ran under autocast, and its dtype.
        extras: by modality, what to add to the gradient of each floating tensor of its output.
        logits: the joint logits `(N, C)`.
        task: number of the backward that made the extras.
    """

    outputs: dict[str, Any] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    autocast: tuple[bool, torch.dtype] = (False, torch.float32)
    extras: dict[str, list[Tensor | None]] = field(default_factory=dict)
    logits: Tensor | None = None
    task: int = -1


def leaf(leaves: list[Tensor], x: Tensor) -> Tensor:
    """A leaf in the place of a floating tensor, noted in `leaves`."""
    if not x.is_floating_point():
        return x
    leaves.append(x.detach().requires_grad_())
    return leaves[-1]


def floating(output: Any) -> list[Tensor]:
    """The floating tensors of an output, in the order in which `map_tensors` meets them."""
    found: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        if x.is_floating_point():
            found.append(x)
        return x

    map_tensors(note, output)
    return found


def is_joint(logits: Any, current: Pass) -> bool:
    """Whether a loss is called on the pass's joint logits, as far as these are known."""
    if not isinstance(logits, Tensor):
        return False
    if current.logits is None:
        return True
    same = logits.numel() == current.logits.numel()
    return same and (
        logits.data_ptr() == current.logits.data_ptr()
        or bool(
            torch.equal(logits.detach().reshape_as(current.logits).to(current.logits.dtype), current.logits)
        )
    )


def refuse_create_graph() -> None:
    """Refuse a backward whose gradients have a graph.

    Raises:
        RuntimeError: naming the alternative.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "inject=True can't follow backward(create_graph=True): the added gradient has no derivative. Add "
            "objective(labels) to the loss."
        )


def refuse_doubtful(counts: dict[str, int]) -> None:
    """Refuse rows whose label and scale the gradient does not tell.

    Raises:
        RuntimeError: naming the alternatives.
    """
    if counts["doubtful"]:
        raise RuntimeError(
            f"the gradient at the joint logits is not that of a plain cross-entropy in {counts['doubtful']} of "
            f"{counts['rows']} rows (label smoothing, another loss, a temperature), so inject=True can't have labels "
            "and scale exactly. Pass `loss=`, the loss module that your loop calls on the logits, or add "
            "objective(labels) to the loss."
        )
