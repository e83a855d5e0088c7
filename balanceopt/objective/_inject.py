"""The gradient of uni-modal losses, added while the joint loss's backward passes through the encoders' outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from balanceopt._deferred import DeferredCounts
from balanceopt.functional._labels import INVALID
from balanceopt.monitor import ModalityMonitor
from balanceopt.monitor._outputs import map_tensors
from balanceopt.monitor._pass import Pass
from balanceopt.monitor._supported import in_backward
from balanceopt.objective._losses import loss_of, row_cross_entropy
from balanceopt.objective._rows import Rows, rows_of

if TYPE_CHECKING:
    from balanceopt.objective._objective import UnimodalObjective

# A modality's loss from its logits, and what to differentiate it with.
Weighed = Callable[[str, Tensor], tuple[Tensor, Tensor]]


@dataclass(eq=False)
class _Noted:
    """What is remembered of one pass.

    Attributes:
        outputs: each encoder's latest output, detached.
        calls: how often each encoder was called.
        autocast: whether the forward ran under autocast, and its dtype.
        extras: by modality, what to add to the gradient of each floating tensor of its output.
        logits: the joint logits `(N, C)`.
    """

    outputs: dict[str, Any] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    autocast: tuple[bool, torch.dtype] = (False, torch.float32)
    extras: dict[str, list[Tensor | None]] = field(default_factory=dict)
    logits: Tensor | None = None


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
        self._doubtful = DeferredCounts(("rows", "doubtful"), _refuse_doubtful)
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

    def _tap(self, name: str, output: Any, current: Pass | None) -> None:
        if current is None or not self.objective.weight[name]:
            return
        noted: _Noted = current.notes.setdefault(self, _Noted())
        if not in_backward():
            # A copy: what comes after the encoder may work in place.
            noted.outputs[name] = map_tensors(lambda x: x.detach().clone(), output)
            noted.calls[name] = noted.calls.get(name, 0) + 1
            device = self.monitor.features(name, output).device.type
            noted.autocast = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            self._hook_shared_head()
        for place, tensor in enumerate(_floating(output)):
            if tensor.requires_grad:
                tensor.register_hook(partial(self._add, noted, name, noted.calls.get(name, 0), place))

    def _add(self, noted: _Noted, name: str, call: int, place: int, gradient: Tensor) -> Tensor | None:
        """The joint gradient at an encoder's output with the uni-modal one."""
        extras = noted.extras.get(name)
        if extras is None or call != noted.calls[name] or extras[place] is None:
            return None
        extra, extras[place] = extras[place], None
        assert extra is not None
        return gradient + extra.to(gradient.dtype)

    def _on_gradient(self, current: Pass, gradient: Tensor) -> None:
        """The gradient reached the joint logits."""
        noted: _Noted | None = current.notes.get(self)
        if noted is None:
            return
        _refuse_create_graph()
        noted.logits = current.logits if noted.logits is None else noted.logits
        assert noted.logits is not None
        ignore = self.monitor.ignore_index if current.ignore_index is None else current.ignore_index
        recover = self.monitor.recovers_labels
        rows = rows_of(current, noted.logits, gradient, ignore, recover=recover)
        total = torch.tensor(len(rows.labels), device=rows.doubtful.device)
        self._doubtful.add(total, rows.doubtful)
        self._make(noted, current, partial(self._weighed_rows, rows, current))

    def _on_loss(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """The loop called its loss."""
        current = self.monitor.latest
        if current is None or not (isinstance(output, Tensor) and output.requires_grad):
            return
        noted: _Noted | None = current.notes.get(self)
        logits = args[0] if args else kwargs.get("input")
        target = args[1] if len(args) > 1 else kwargs.get("target")
        if noted is None or target is None or not _is_joint(logits, current):
            return
        output.register_hook(partial(self._on_loss_gradient, noted, current, target))

    def _on_loss_gradient(self, noted: _Noted, current: Pass, target: Any, gradient: Tensor) -> None:
        _refuse_create_graph()
        self._make(noted, current, partial(self._weighed_loss, target, gradient.detach(), current))

    # -- the uni-modal gradients ---------------------------------------------------------------------------------

    def _make(self, noted: _Noted, current: Pass, weighed: Weighed) -> None:
        """All uni-modal gradients of a pass: kept for the encoders' outputs, added for the own heads."""
        objective = self.objective
        for name, output in noted.outputs.items():
            leaves: list[Tensor] = []
            enabled, dtype = noted.autocast
            device = self.monitor.features(name, output).device.type
            with torch.enable_grad(), torch.autocast(device, dtype=dtype, enabled=enabled):
                features = self.monitor.features(name, map_tensors(partial(_leaf, leaves), output))
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


def _leaf(leaves: list[Tensor], x: Tensor) -> Tensor:
    if not x.is_floating_point():
        return x
    leaves.append(x.detach().requires_grad_())
    return leaves[-1]


def _floating(output: Any) -> list[Tensor]:
    """The floating tensors of an output, in the order in which `map_tensors` meets them."""
    found: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        if x.is_floating_point():
            found.append(x)
        return x

    map_tensors(note, output)
    return found


def _is_joint(logits: Any, current: Pass) -> bool:
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


def _refuse_create_graph() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "inject=True can't follow backward(create_graph=True): the added gradient has no derivative. Add "
            "objective(labels) to the loss."
        )


def _refuse_doubtful(counts: dict[str, int]) -> None:
    if counts["doubtful"]:
        raise RuntimeError(
            f"the gradient at the joint logits is not that of a plain cross-entropy in {counts['doubtful']} of "
            f"{counts['rows']} rows (label smoothing, another loss, a temperature), so inject=True can't have labels "
            "and scale exactly. Pass `loss=`, the loss module that your loop calls on the logits, or add "
            "objective(labels) to the loss."
        )
