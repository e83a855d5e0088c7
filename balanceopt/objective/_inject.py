"""The gradient of uni-modal losses, added while the joint loss's backward passes through the encoders' outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from balanceopt._deferred import DeferredCounts
from balanceopt.functional._labels import INVALID
from balanceopt.monitor import ModalityMonitor
from balanceopt.monitor._outputs import logits_of, map_tensors
from balanceopt.monitor._pass import Pass
from balanceopt.monitor._rows import as_rows
from balanceopt.monitor._supported import in_backward, outside_graphs
from balanceopt.objective._losses import loss_of, row_cross_entropy
from balanceopt.objective._noted import (
    Noted,
    floating,
    is_joint,
    leaf,
    refuse_create_graph,
    refuse_doubtful,
)
from balanceopt.objective._rows import Rows, rows_of

if TYPE_CHECKING:
    from balanceopt.objective._objective import UnimodalObjective

# A modality's loss from its logits, and what to differentiate it with.
Weighed = Callable[[str, Tensor], tuple[Tensor, Tensor]]


class Injection:
    """Hooks on clean encoder outputs, and on the shared head's parameters, that add uni-modal gradients.

    The gradient at the joint logits (or at the loss) comes first in every backward. It tells labels and scale, all
    uni-modal gradients are made at once, and each is added where the joint one passes.
    """

    def __init__(self, objective: UnimodalObjective, monitor: ModalityMonitor) -> None:
        """Serve `objective`.

        Raises:
            ValueError: if nothing would tell labels and scale.
            NotImplementedError: for a sharded shared head.
        """
        self.objective = objective
        self.monitor = monitor
        self._pending: dict[nn.Parameter, Tensor] = {}
        self._hooked: dict[nn.Parameter, RemovableHandle] = {}
        self._handles: list[RemovableHandle] = []
        self._doubtful = DeferredCounts(("rows", "doubtful"), refuse_doubtful)
        loss = objective.loss
        if isinstance(loss, nn.Module):
            self._handles.append(loss.register_forward_hook(self._on_loss, with_kwargs=True))
        elif loss is not None:
            raise ValueError(
                "with inject=True `loss` should be the loss module that the loop calls. Found a function: its calls "
                "can't be seen."
            )
        elif monitor.head is None:
            raise ValueError(
                "inject=True reads labels and scale from the gradient at the joint logits. Build the monitor with "
                "`head=`, or pass `loss=`, the loss module that the loop calls."
            )
        else:
            monitor.add_gradient_listener(self._on_gradient)
            self._watch_own_heads(monitor.head)
        self._refuse_sharded()
        if any(objective.weight.values()):
            monitor.add_tap(self._tap)

    def remove(self) -> None:
        """Take every hook off."""
        self.monitor.drop_tap(self._tap)
        self.monitor.drop_gradient_listener(self._on_gradient)
        for handle in (*self._handles, *self._hooked.values()):
            handle.remove()
        self._handles.clear()
        self._hooked.clear()
        self._pending.clear()

    # -- hooks ---------------------------------------------------------------------------------------------------

    @outside_graphs
    def _tap(self, name: str, output: Any, current: Pass | None) -> None:
        if current is None or not self.objective.weight[name]:
            return
        noted: Noted = current.notes.setdefault(self, Noted())
        if not in_backward():
            # A copy: what comes after the encoder may work in place.
            noted.outputs[name] = map_tensors(lambda x: x.detach().clone(), output)
            noted.calls[name] = noted.calls.get(name, 0) + 1
            device = self.monitor.features(name, output).device.type
            noted.autocast = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            self._hook_shared_head()
        for place, tensor in enumerate(floating(output)):
            if tensor.requires_grad:
                tensor.register_hook(partial(self._add, noted, name, noted.calls.get(name, 0), place))

    def _add(self, noted: Noted, name: str, call: int, place: int, gradient: Tensor) -> Tensor | None:
        """The joint gradient at an encoder's output with the uni-modal one."""
        extras = noted.extras.get(name)
        if extras is None or call != noted.calls[name] or extras[place] is None:
            return None
        extra, extras[place] = extras[place], None
        assert extra is not None
        return gradient + extra.to(gradient.dtype)

    def _watch_own_heads(self, head: Any) -> None:
        """Late fusion: each head gets the gradient of the joint logits, and any of them may be the first."""
        for own in head.values() if isinstance(head, Mapping) else ():
            self._handles.append(own.register_forward_hook(self._on_own_head))

    @outside_graphs
    def _on_own_head(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        current, logits = self.monitor.latest, logits_of(output)
        if current is not None and logits is not None and logits.requires_grad and not in_backward():
            logits.register_hook(lambda gradient: self._on_gradient(current, as_rows(gradient.detach())))

    def _on_gradient(self, current: Pass, gradient: Tensor) -> None:
        """The gradient reached the joint logits."""
        noted: Noted | None = current.notes.get(self)
        task = torch._C._current_graph_task_id()
        if noted is None or noted.task == task:
            return
        refuse_create_graph()
        noted.task = task
        noted.logits = current.logits if noted.logits is None else noted.logits
        assert noted.logits is not None
        ignore = self.monitor.ignore_index if current.ignore_index is None else current.ignore_index
        recover = self.monitor.recovers_labels
        rows = rows_of(current, noted.logits, gradient, ignore, recover=recover)
        total = torch.tensor(len(rows.labels), device=rows.doubtful.device)
        self._doubtful.add(total, rows.doubtful)
        self._make(noted, current, partial(self._weighed_rows, rows, current))

    @outside_graphs
    def _on_loss(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """The loop called its loss."""
        current = self.monitor.latest
        if current is None or not (isinstance(output, Tensor) and output.requires_grad):
            return
        noted: Noted | None = current.notes.get(self)
        logits = args[0] if args else kwargs.get("input")
        target = args[1] if len(args) > 1 else kwargs.get("target")
        if noted is None or target is None or not is_joint(logits, current):
            return
        output.register_hook(partial(self._on_loss_gradient, noted, current, target))

    def _on_loss_gradient(self, noted: Noted, current: Pass, target: Any, gradient: Tensor) -> None:
        refuse_create_graph()
        self._make(noted, current, partial(self._weighed_loss, target, gradient.detach(), current))

    # -- the uni-modal gradients ---------------------------------------------------------------------------------

    def _make(self, noted: Noted, current: Pass, weighed: Weighed) -> None:
        """All uni-modal gradients of a pass: kept for the encoders' outputs, added for the own heads."""
        objective = self.objective
        if objective.heads == "shared":
            torch.autograd.Variable._execution_engine.queue_callback(self._pending.clear)
        for name, output in noted.outputs.items():
            leaves: list[Tensor] = []
            enabled, dtype = noted.autocast
            device = self.monitor.features(name, output).device.type
            with torch.enable_grad(), torch.autocast(device, dtype=dtype, enabled=enabled):
                features = self.monitor.features(name, map_tensors(partial(leaf, leaves), output))
                logits = objective.unimodal_logits(name, features)
                value, scale = weighed(name, logits)
            heads = self._head_parameters(name)
            inputs = [*leaves, *heads]
            found = torch.autograd.grad(value, inputs, scale.to(value.dtype), allow_unused=True)
            noted.extras[name] = list(found[: len(leaves)])
            self._give_heads(heads, found[len(leaves) :])
        if objective.heads == "own":
            objective._average.after_this_backward()

    def _weighed_rows(self, rows: Rows, current: Pass, name: str, logits: Tensor) -> tuple[Tensor, Tensor]:
        if len(logits) != len(rows.labels):
            raise ValueError(
                f"inject=True needs a row of joint logits for each of the {len(logits)} samples of {name!r}. "
                f"Found {len(rows.labels)}."
            )
        scale = rows.scale
        present = current.present.get(name)
        if present is not None:  # a mean over the samples that have the modality
            own = torch.where(present.to(scale.device), scale, 0)
            scale = own * (scale.sum() / own.sum().clamp(min=1e-300))
        return row_cross_entropy(logits, rows.labels, INVALID), self.objective.weight[name] * scale

    def _weighed_loss(
        self, target: Any, gradient: Tensor, current: Pass, name: str, logits: Tensor
    ) -> tuple[Tensor, Tensor]:
        loss = self.objective.loss
        assert loss is not None
        present = current.present.get(name)
        if present is not None:
            rows = present.to(logits.device).nonzero()[:, 0]
            logits, target = logits[rows], target[rows]
            gradient = gradient[rows] if gradient.dim() else gradient
            if len(rows) == 0:
                return logits.sum(), torch.zeros_like(gradient.sum())
        return loss_of(loss, logits, target), self.objective.weight[name] * gradient

    def _head_parameters(self, name: str) -> list[nn.Parameter]:
        own = self.objective.heads == "own"
        found = self.objective.head_of(name).parameters() if own else self._shared_parameters()
        return [p for p in found if p.requires_grad]

    def _shared_parameters(self) -> list[nn.Parameter]:
        head = self.monitor.head
        parts = [head] if isinstance(head, nn.Module) else list((head or {}).values())
        return [p for part in parts for p in part.parameters()]

    def _give_heads(self, heads: list[nn.Parameter], gradients: tuple[Tensor | None, ...]) -> None:
        for parameter, gradient in zip(heads, gradients, strict=True):
            if gradient is None:
                continue
            if (
                self.objective.heads == "shared"
            ):  # its own backward comes by: added there, before ranks sum it
                known = self._pending.get(parameter)
                self._pending[parameter] = gradient if known is None else known + gradient
            else:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def _hook_shared_head(self) -> None:
        if self.objective.heads == "own":
            return
        for parameter in self._shared_parameters():
            if parameter.requires_grad and parameter not in self._hooked:
                self._hooked[parameter] = parameter.register_hook(partial(self._add_to_head, parameter))

    def _add_to_head(self, parameter: nn.Parameter, gradient: Tensor) -> Tensor | None:
        extra = self._pending.pop(parameter, None)
        return None if extra is None else gradient + extra

    def _refuse_sharded(self) -> None:
        if self.objective.heads == "shared" and any(
            hasattr(p, "device_mesh") for p in self._shared_parameters()
        ):
            raise NotImplementedError(
                "inject=True with heads='shared' is not supported for a sharded head: its gradient is made on other "
                "tensors. Use heads='own', or add objective(labels) to the loss."
            )
