"""OGM at the encoders' outputs: their gradient is scaled on its way back, so that no parameter's gradient is touched.

Backward is linear: what goes into an encoder scaled by k leaves every parameter behind it scaled by k. That needs the
coefficient before backward reaches the encoder (the gradient at the logits, which tells the labels, comes first), and
that the loss reaches the encoder's parameters through its output alone, and through the output no others. Where the
graph behind the logits does not show that, an encoder is left alone here and its gradients are scaled at the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from balanceopt._deferred import on_host
from balanceopt.distributed import active_group
from balanceopt.monitor import ModalityMonitor, ModalitySums
from balanceopt.monitor._outputs import tensors_in
from balanceopt.monitor._pass import Pass
from balanceopt.monitor._supported import in_backward, outside_graphs

Coefficient = Callable[[ModalitySums], Tensor]
Output = tuple[Any, int]  # the autograd node that made it, and which of the node's outputs it is

# It runs modules that its graph does not show.
_OPAQUE = "CheckpointFunctionBackward"


class AtOutputs:
    """Scales the gradient at encoders' outputs, in backward.

    Args:
        coefficient: from the sums of a pass to the `(M,)` factors.
    """

    def __init__(self, coefficient: Coefficient) -> None:
        self._coefficient = coefficient
        self._monitor: ModalityMonitor | None = None
        self._acts: Callable[[], bool] | None = None
        self._used: Pass | None = None
        self._scaled: set[str] = set()
        self._shown: dict[str, bool] = {}

    def connect(self, monitor: ModalityMonitor, acts: Callable[[], bool]) -> None:
        """Act on those backward passes of `monitor` in which `acts()`, and on no other monitor's any more."""
        self.disconnect()
        self._monitor, self._acts = monitor, acts
        monitor.add_tap(self._tap)
        monitor.add_gradient_listener(self._on_gradient)

    def disconnect(self) -> None:
        """Act no more."""
        if self._monitor is not None:
            self._monitor.drop_tap(self._tap)
            self._monitor.drop_gradient_listener(self._on_gradient)
        self._monitor, self._acts = None, None
        self.forget()

    def scaled(self) -> frozenset[str]:
        """The modalities whose encoder's gradients are scaled already, since the last `forget`."""
        return frozenset(self._scaled)

    def forget(self) -> None:
        """Those gradients were used or thrown away."""
        self._used = None
        self._scaled = set()

    # -- hooks ---------------------------------------------------------------------------------------------------

    @outside_graphs
    def _tap(self, name: str, output: Any, current: Pass | None) -> None:
        if current is None or in_backward() or self._acts is None or not self._acts():
            return
        found: dict[str, set[Output]] = current.notes.setdefault(self, {})
        made = {(x.grad_fn, x.output_nr) for x in tensors_in(output) if x.grad_fn is not None}
        found.setdefault(name, set()).update(made)

    def _on_gradient(self, current: Pass, gradient: Tensor) -> None:
        """The gradient reached the logits of a pass."""
        if self._used is not None:
            raise NotImplementedError(
                "OGM(apply_to='output') takes one backward a step: the coefficient belongs to the scores of the whole "
                "step, which only its last backward completes. Use OGM(apply_to='grad')."
            )
        found: Mapping[str, set[Output]] | None = current.notes.pop(self, None)
        if not found or not self._can_act():
            return
        assert self._monitor is not None
        sums = self._monitor.sums_in_backward(current)
        if sums is None:
            return
        self._used = current
        self._show(found)
        task = torch._C._current_graph_task_id()
        factors = self._coefficient(sums)
        known = on_host(factors)
        for place, name in enumerate(self._monitor.modalities):
            # Several outputs may stand one behind the other: the first would be scaled twice.
            if not self._shown.get(name) or len(found.get(name, ())) != 1:
                continue
            if known is not None and known[place] == 1:
                self._scaled.add(name)
                continue
            ((node, number),) = found[name]
            node.register_prehook(partial(self._scale, name, task, number, factors[place]))

    def _can_act(self) -> bool:
        """Whether the coefficient is known in time: not where heads come one by one, nor over ranks."""
        monitor = self._monitor
        return (
            monitor is not None
            and self._acts is not None
            and self._acts()
            and not isinstance(monitor.head, Mapping)
            and active_group(monitor.group) is None
        )

    def _scale(
        self, name: str, task: int, number: int, factor: Tensor, gradients: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...] | None:
        """The gradient at an encoder's output passes by."""
        gradient = gradients[number]
        if gradient is None or torch._C._current_graph_task_id() != task:
            return None
        self._scaled.add(name)
        scaled = gradient * factor.to(gradient.device, gradient.dtype)
        return (*gradients[:number], scaled, *gradients[number + 1 :])

    # -- what leads where ----------------------------------------------------------------------------------------

    def _show(self, found: Mapping[str, set[Output]]) -> None:
        """Find out, once for each encoder, whether its output is the only way to its parameters, and only to them."""
        assert self._monitor is not None
        new = [name for name in found if name not in self._shown]
        if not new:
            return
        outputs = {id(node) for nodes in found.values() for node, _ in nodes}
        around = leaves([torch._C._current_autograd_node()], outputs)
        own = {name: {id(p) for p in parameters} for name, parameters in self._monitor.parameters.items()}
        for name in new:
            behind = leaves(node for node, _ in found[name])
            alone = around is not None and not around & own[name]
            self._shown[name] = alone and behind is not None and behind <= own[name]

    def __getstate__(self) -> dict[str, Any]:
        # The copy's monitor has no listeners: what the copy does not scale here it scales at the step.
        gone: dict[str, Any] = {"_monitor": None, "_used": None, "_scaled": set(), "_acts": None}
        return {**self.__dict__, **gone}


def leaves(start: Iterable[Any], stop: set[int] | None = None) -> set[int] | None:
    """`id` of every leaf tensor that backward reaches from some nodes; None where the graph does not show.

    Args:
        start: autograd nodes.
        stop: `id` of nodes not to go beyond.
    """
    seen: set[int] = set(stop or ())
    found: set[int] = set()
    keep: list[Any] = []  # `id` is of an object that lives
    waiting = [node for node in start if id(node) not in seen]
    while waiting:
        node = waiting.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        keep.append(node)
        if node.name() == _OPAQUE:
            return None
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.add(id(variable))
        waiting += [following for following, _ in node.next_functions]
    return found
