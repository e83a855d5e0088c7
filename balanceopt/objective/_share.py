"""Share of the joint loss's gradient that encoders get, and of the uni-modal losses' gradient that a head gets."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from balanceopt._torch import number_of_node, running_node
from balanceopt._warnings import warn_user
from balanceopt.functional import mixed_gradient
from balanceopt.monitor import (
    ModalityMonitor,
    Pass,
    enter,
    is_differentiable,
    leave,
    map_tensors,
    refuse_company,
)

# Number of training forwards without a uni-modal loss before a warning.
_IDLE_FORWARDS = 10


def with_share(x: Tensor, share: float) -> Tensor:
    """Return a copy of a tensor through which `share` of the gradient goes back; the tensor itself at a share of 1.

    A copy, because modules after it may change it in place. A hook, because `share * x + (1 - share) * x.detach()`
    would change the values, and `detach()` would hide the way from encoder to logits.
    """
    if share == 1 or not (x.requires_grad and torch.is_grad_enabled()):
        return x
    result = x.clone()
    result.register_hook(partial(_share_of, share))
    return result


def _share_of(share: float, gradient: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"joint={share:g} can't follow backward(create_graph=True): the scaled gradient has no derivative. Use "
            "joint=1, or compute gradient penalties in a pass of their own in eval mode."
        )
    return mixed_gradient(gradient, None, share)


class JointShare:
    """Hooks that scale the gradient on its way from the fusion back to each encoder's output.

    The objective's own losses are on the clean outputs, before the scaling.
    """

    def __init__(self, monitor: ModalityMonitor, share: float, *, called: bool) -> None:
        """Prepare to let `share` of the gradient pass; `hook` registers the hooks.

        Args:
            monitor: monitor on the encoders.
            share: share in [0, 1].
            called: whether the loop has to call the objective, and hears of it if it does not.
        """
        self.monitor, self.share = monitor, share
        self._key = object()  # key of `Pass.notes`, which must hold no reference to this object
        self._acted = False
        self._idle_forwards: int | None = 0 if called else None

    def hook(self) -> None:
        """Register the hooks, unless everything passes."""
        if self.share != 1:
            enter(self)
            self.monitor.hooks.links.add(self._on_output)
            self.monitor.hooks.gradients.add(self._warn_of_other_ways)

    def remove(self) -> None:
        """Remove the hooks. May be called twice."""
        leave(self)
        self.monitor.hooks.links.drop(self._on_output)
        self.monitor.hooks.gradients.drop(self._warn_of_other_ways)

    def note_call(self) -> None:
        """Record that the loop has called the objective."""
        self._idle_forwards = None if self._idle_forwards is None else 0

    def _on_output(self, name: str, current: Pass, output: Any) -> Any:
        """Return an encoder's output with the same values, through which a share of the gradient goes back."""
        if not self._acted:
            refuse_company(self, "UnimodalObjective(joint=...)")
            self._acted = True
        if self._key not in current.notes:
            self._count_forward()
        nodes: set[int] = current.notes.setdefault(self._key, set())

        changed = False

        def scaled(x: Tensor) -> Tensor:
            nonlocal changed
            result = with_share(x, self.share) if is_differentiable(x) else x
            if result is not x:
                changed = True
                nodes.add(number_of_node(result.grad_fn))
            return result

        sent = map_tensors(scaled, output)
        return sent if changed else output

    def _count_forward(self) -> None:
        """Count a training forward since the objective's last call; warn after several."""
        if self._idle_forwards is None:
            return
        self._idle_forwards += 1
        if self._idle_forwards > _IDLE_FORWARDS:
            self._idle_forwards = None
            warn_user(
                f"{_IDLE_FORWARDS} training forwards without a call of the objective: with joint={self.share:g} "
                f"encoders get {self.share:g} of the joint gradient and no uni-modal one. Add objective(labels) to "
                "the loss, build the objective with inject=True, or remove() it."
            )

    def _warn_of_other_ways(self, current: Pass, gradient: Tensor) -> None:
        """Warn, in the first backward, of encoders that reach the joint logits past their outputs too."""
        nodes: set[int] | None = current.notes.get(self._key)
        if nodes is None:
            return
        self.monitor.hooks.gradients.drop(self._warn_of_other_ways)
        owners = {id(p): name for name, params in self.monitor.parameters.items() for p in params}
        names, seen, waiting = set(), set(), [running_node()]
        while waiting:
            node = waiting.pop()
            if node is None or node in seen or number_of_node(node) in nodes:
                continue
            seen.add(node)
            names.add(owners.get(id(getattr(node, "variable", None))))
            waiting.extend(before for before, _ in getattr(node, "next_functions", ()))
        names.discard(None)
        if names:
            warn_user(
                f"parameters of the encoders of {sorted(str(name) for name in names)} reach the joint logits past "
                "their encoders' outputs too (skip connections, tied weights): there they get the whole joint "
                f"gradient, of which joint={self.share:g} scales what goes through the outputs."
            )
