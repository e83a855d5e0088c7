"""SGD's step on the units that are kept alone: what is masked is neither read nor written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from balanceopt.modulation._base import Undo
from balanceopt.modulation._parts import MaskedPart
from balanceopt.modulation._scratch import Scratch

# Elements of the rows that are stepped at once: few enough to stay in cache from one operation to the next.
_AT_ONCE = 2**17


def steps_as_sgd(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `step_kept` may stand in for a part of its step: torch's SGD, and no hook that looks at gradients."""
    if type(optimizer) is not torch.optim.SGD:
        return False
    return not (optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


def can_skip(own: MaskedPart, optimizer: torch.optim.Optimizer) -> bool:
    """Whether something is known to be masked, in units that lie in memory one after the other.

    Gradient and momentum must lie as the parameter does.
    """
    part = own.part
    if own.masked is None or own.masked.numel() == 0 or not part.is_rows:
        return False
    p = part.slot.parameter
    formats = [torch.contiguous_format, torch.channels_last] if p.dim() == 4 else [torch.contiguous_format]
    alike = [part.slot.grad, *(t for t in optimizer.state.get(p, {}).values() if isinstance(t, Tensor))]
    return (
        p.device.type == "cpu"
        and p.dtype in (torch.float32, torch.float64)
        and any(p.is_contiguous(memory_format=form) for form in formats)
        and all(t.dtype == p.dtype and t.stride() == p.stride() for t in alike)
    )


@torch.no_grad()
def step_kept(parts: Sequence[MaskedPart], optimizer: torch.optim.Optimizer, scratch: Scratch) -> Undo:
    """Step the units of each part that are kept, and hide its gradient from the base; returns what shows it again.

    The arithmetic is SGD's, operation by operation, so that units move to the bit as in a step on all of them.

    Args:
        parts: what `can_skip`.
        optimizer: torch's SGD, which steps next.
        scratch: memory for the pieces.
    """
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    hidden = [(own.part.slot.parameter, own.part.slot.grad) for own in parts]
    room: dict[torch.dtype, int] = {}
    for p, _ in hidden:
        room[p.dtype] = max(room.get(p.dtype, _AT_ONCE), p[0].numel())
    pieces = {dtype: scratch.take(2 * size, dtype).chunk(2) for dtype, size in room.items()}
    for (p, gradient), own in zip(hidden, parts, strict=True):
        rows = own.kept.nonzero().squeeze(1)
        _step_rows(p, gradient, rows, optimizer.state[p], group_of[id(p)], pieces[p.dtype])
    for p, _ in hidden:
        p.grad = None

    def show() -> None:
        for p, gradient in hidden:
            p.grad = gradient

    return show


def _step_rows(
    p: Tensor, gradient: Tensor, rows: Tensor, state: Any, group: Mapping[str, Any], pieces: Sequence[Tensor]
) -> None:
    lr, decay, momentum = (float(group[key]) for key in ("lr", "weight_decay", "momentum"))
    damped, nesterov, maximize = 1 - group["dampening"], group["nesterov"], group["maximize"]
    is_first = momentum != 0 and state.get("momentum_buffer") is None
    if is_first:
        state["momentum_buffer"] = torch.zeros_like(gradient)
    theta, g = _as_rows(p), _as_rows(gradient)
    buffer = _as_rows(state["momentum_buffer"]) if momentum != 0 else g
    length, count = theta.shape[1], rows.shape[0]
    most = min(count, max(1, _AT_ONCE // length))
    block, other = (piece[: most * length].view(most, length) for piece in pieces)
    for own in rows.split(most):
        if own.shape[0] < most:
            block, other = block[: own.shape[0]], other[: own.shape[0]]
        update, b = block, other
        torch.index_select(g, 0, own, out=update)
        if maximize:
            update.neg_()
        if decay != 0:
            update.add_(torch.index_select(theta, 0, own, out=b), alpha=decay)
        if is_first:
            b.copy_(update)
        elif momentum != 0:
            torch.index_select(buffer, 0, own, out=b).mul_(momentum).add_(update, alpha=damped)
        if momentum != 0:
            buffer.index_copy_(0, own, b)
            update = update.add_(b, alpha=momentum) if nesterov else b
        # As rows of a sparse matrix they are added in one operation, without a copy of the parameter's.
        added = torch.sparse_coo_tensor(
            own[None], update, theta.shape, check_invariants=False, is_coalesced=True
        )
        theta.add_(added, alpha=-lr)


def _as_rows(tensor: Tensor) -> Tensor:
    """`(n, length)`: each unit's numbers in the order in which they lie."""
    count = tensor.shape[0]
    length = tensor.numel() // count
    return tensor.detach().as_strided((count, length), (length, 1))
