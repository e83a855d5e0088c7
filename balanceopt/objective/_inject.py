"""Injection: add gradients of uni-modal losses at the encoders' outputs during the joint loss's backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from balanceopt._deferred import DeferredCounts
from balanceopt._sharding import is_sharded
from balanceopt._torch import after_backward, backward_number, in_backward, is_batched
from balanceopt._warnings import warn_user
from balanceopt.functional import INVALID, as_targets, mixed_gradient, recover_labels, recover_scale
from balanceopt.monitor import (
    CallWatch,
    ModalityMonitor,
    Pass,
    WeakHook,
    as_rows,
    detached_copy,
    enter,
    is_differentiable,
    leave,
    map_tensors,
    off_residual,
    refuse_company,
    tensors_in,
    two_classes,
)
from balanceopt.objective._heads import Heads
from balanceopt.objective._loss import UnimodalLoss, share_of_modality, with_modality

_NOTHING_ADDED = "no uni-modal gradient is added"
# Number of backwards without a gradient at the joint logits before a warning.
_IDLE_BACKWARDS = 10


@dataclass(eq=False)
class _Seen:
    """State of one forward, recorded for the backward.

    Attributes:
        outputs: each encoder's latest output, detached.
        extras: uni-modal gradient of each floating tensor of an encoder's output, by modality.
        autocast: function that returns the autocast context of the forward.
        logits: joint logits `(N, C)`.
        backward: number of the backward that made `extras`.
    """

    outputs: dict[str, Any] = field(default_factory=dict)
    extras: dict[str, list[Tensor | None]] = field(default_factory=dict)
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    logits: Tensor | None = None
    backward: int = -1


class Injection:
    """Hooks on clean encoder outputs, and on the shared head's parameters, that add uni-modal gradients.

    The gradient at the loss module's result, or at the joint logits where there is no module, is the first in every
    backward. It weighs the uni-modal losses, whose gradients are all computed then; each is added to the joint gradient
    of the same tensor. The target is that of the module's call, or labels given or read from the gradient.

    Attributes:
        handles: handles of the hooks outside the monitor.
    """

    def __init__(
        self, monitor: ModalityMonitor, heads: Heads, weight: Mapping[str, float], loss: UnimodalLoss
    ) -> None:
        """Prepare to add the gradients of `heads` times `weight`; `hook` registers the hooks.

        Raises:
            ValueError: if neither joint logits nor a loss module could give labels and scale.
            NotImplementedError: for a sharded shared head.
        """
        self.monitor, self.heads, self.weight, self.loss = monitor, heads, weight, loss
        self._key = object()  # key of `Pass.notes`, which must hold no reference to the injection
        self.handles: list[RemovableHandle | CallWatch] = []
        self._head_gradients: dict[nn.Parameter, Tensor] = {}
        self._acted = False
        self._idle_backwards: set[int] | None = set()
        self._hooked: set[nn.Parameter] = set()
        self._doubtful = DeferredCounts(("rows", "doubtful"), _refuse_doubtful)
        criterion = loss.criterion
        if criterion is not None and not isinstance(criterion, nn.Module):
            raise ValueError(
                "with inject=True `loss` should be the loss module that the loop calls, of the monitor or the "
                "objective. Found a function: its calls can't be seen."
            )
        if criterion is None and monitor.head is None:
            raise ValueError(
                "inject=True reads labels and scale from the gradient at the joint logits. Build the monitor with "
                "`head=`, or pass `loss=`, the loss module that the loop calls."
            )
        if heads.shared and any(is_sharded(p) for p in heads.parameters(monitor.modalities[0])):
            raise NotImplementedError(
                "inject=True with heads='shared' is not supported for a sharded head: its gradient is made on other "
                "tensors. Use heads='own', or add objective(labels) to the loss."
            )

    def hook(self) -> None:
        """Register the hooks."""
        if not any(self.weight.values()):
            return
        enter(self)
        self.handles.append(CallWatch(self.monitor, "inject=True", _NOTHING_ADDED))
        self.monitor.hooks.outputs.add(self._on_output)
        if isinstance(self.loss.criterion, nn.Module):
            hook = WeakHook(self._on_loss)
            self.handles.append(self.loss.criterion.register_forward_hook(hook, with_kwargs=True))
            return
        self.monitor.hooks.gradients.add(self._on_gradient)
        # In late fusion every head is hooked, because the gradient may reach any of the heads first.
        heads = self.monitor.head.values() if isinstance(self.monitor.head, Mapping) else ()
        self.handles += [head.register_forward_hook(WeakHook(self._on_late_head)) for head in heads]

    def remove(self) -> None:
        """Remove the hooks."""
        leave(self)
        self.monitor.hooks.outputs.drop(self._on_output)
        self.monitor.hooks.gradients.drop(self._on_gradient)
        remove_handles(self.handles)

    def extras_of(self, current: Pass, name: str) -> list[Tensor | None]:
        """Return the list that takes the uni-modal gradients of the latest output of an encoder, one for each tensor.

        It is filled before the backward reaches the output; a gradient that is taken out is not added.
        """
        seen: _Seen | None = current.notes.get(self._key)
        return [] if seen is None else seen.extras.get(name, [])

    def _on_output(self, name: str, output: Any, current: Pass | None) -> None:
        """Record an encoder's output, and hook the gradients of its tensors."""
        if current is None or not self.weight[name]:
            return
        if not self._acted:
            refuse_company(self, "UnimodalObjective(inject=True)")
            self._acted = True
        seen: _Seen = current.notes.setdefault(self._key, _Seen())
        if not in_backward():
            # A copy, because modules after the encoder may change the output in place.
            seen.outputs[name] = map_tensors(detached_copy, output)
            seen.extras[name] = []
            device = next(x for x in tensors_in(output) if is_differentiable(x)).device.type
            enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
            seen.autocast = partial(torch.autocast, device, dtype=dtype, enabled=enabled)
            for parameter in self.heads.parameters(name) if self.heads.shared else ():
                if parameter not in self._hooked:
                    self._hooked.add(parameter)
                    hook = partial(WeakHook(self._add_to_head), parameter)
                    self.handles.append(parameter.register_hook(hook))
        for index, tensor in enumerate(x for x in tensors_in(output) if is_differentiable(x)):
            if tensor.requires_grad:  # a repeated call gets a new list, which stays empty
                add = WeakHook(self._add, seen, seen.extras.setdefault(name, []), index)
                tensor.register_hook(add)

    def _on_late_head(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        current = self.monitor.hooks.latest
        if current is None or in_backward():
            return
        logits = self.monitor.hooks.answers.logits(module, output, self.monitor.hooks.latest)
        if logits is not None and logits.requires_grad:
            logits.register_hook(partial(self._on_late_gradient, current))

    def _on_late_gradient(self, current: Pass, gradient: Tensor) -> None:
        if not is_batched(gradient):
            self._on_gradient(current, as_rows(gradient.detach()))

    def _on_gradient(self, current: Pass, gradient: Tensor) -> None:
        """Make the uni-modal gradients by the gradient at the joint logits."""
        seen: _Seen | None = current.notes.get(self._key)
        if seen is None or seen.backward == backward_number():
            return
        seen.backward = backward_number()
        seen.logits = current.logits if seen.logits is None else seen.logits
        assert seen.logits is not None
        logits = two_classes(seen.logits)
        gradient = torch.cat([-gradient, gradient], -1) if gradient.shape[-1] == 1 else gradient
        labels, doubtful = self._labels(current, logits, gradient)
        scale, misfit, vanished = recover_scale(gradient, logits, labels)
        doubtful = doubtful | misfit | (scale < 0) | (vanished if current.labels is None else misfit)
        rows = torch.tensor(len(labels), dtype=torch.int64, device=doubtful.device)
        self._doubtful.add(rows=rows, doubtful=doubtful.sum())
        labels = torch.where(labels == INVALID, self.monitor.labels.ignore_index, labels)
        self._make(seen, current, labels, scale)

    def _on_loss(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Hook the gradient at the loss, where the loop calls the loss on the joint logits."""
        current = self.monitor.hooks.latest
        if current is None or not (isinstance(output, Tensor) and output.requires_grad):
            return
        seen: _Seen | None = current.notes.get(self._key)
        logits = args[0] if args else kwargs.get("input")
        target = args[1] if len(args) > 1 else kwargs.get("target")
        if seen is not None and isinstance(target, Tensor) and _is_joint(logits, current):
            target = target.detach()
            output.register_hook(lambda gradient: self._make(seen, current, target, gradient.detach()))

    def _make(self, seen: _Seen, current: Pass, target: Tensor, at_loss: Tensor) -> None:
        """Compute all uni-modal gradients of a pass; store those of encoder outputs, add those of heads.

        Args:
            seen: state of the pass's forward.
            current: the pass.
            target: target of the joint loss.
            at_loss: gradient at the joint loss, or at its values; the uni-modal losses get the same.
        """
        self._idle_backwards = None
        if torch.is_grad_enabled():
            raise RuntimeError(
                "inject=True can't follow backward(create_graph=True): the added gradient has no derivative. Add "
                "objective(labels) to the loss."
            )
        target, positions = self.loss.by_sample(target, current.samples)
        for name, output in seen.outputs.items():
            leaves: list[Tensor] = []
            present = current.present.get(name)
            with torch.enable_grad(), seen.autocast():
                features = self.monitor.features.of(name, map_tensors(partial(_leaf, leaves), output))
                logits = self.heads.logits(name, features, len(target), present, positions)
                # The values of rows are masked, because selecting rows synchronises the device.
                selects = self.loss.criterion is not None or len(logits) != len(target)
                chosen = with_modality(logits, target, present) if selects else (logits, target)
                value = self.loss.values(name, *chosen)
            scale = self.weight[name] * share_of_modality(at_loss, present, len(target), selects=selects)
            scale = scale.sum() if value.dim() == 0 else scale.reshape_as(value)
            params = self.heads.parameters(name)
            inputs = [*leaves, *params]
            gradients = torch.autograd.grad(value, inputs, scale.to(value.dtype), allow_unused=True)
            seen.extras[name][:] = gradients[: len(leaves)]
            for parameter, gradient in zip(params, gradients[len(leaves) :], strict=True):
                if gradient is not None:
                    self._give(parameter, gradient)
        self.heads.warn_if_untrained()
        if self.heads.shared:
            after_backward(self._head_gradients.clear)
        else:
            self.heads.average.after_this_backward()

    def _give(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        if not self.heads.shared:
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        else:  # added to the joint gradient by a hook, before the sum over ranks
            earlier = self._head_gradients.get(parameter)
            self._head_gradients[parameter] = gradient if earlier is None else earlier + gradient

    def _add_to_head(self, parameter: nn.Parameter, gradient: Tensor) -> Tensor | None:
        extra = self._head_gradients.pop(parameter, None)
        return None if extra is None else gradient + extra

    def _add(self, seen: _Seen, extras: list[Tensor | None], index: int, gradient: Tensor) -> Tensor | None:
        """Return the sum of uni-modal and joint gradient at a tensor of an encoder's output; None for no change."""
        if not extras:
            if self._idle_backwards is not None:
                self._warn_of_idle_backward()
            return None
        extra, extras[index] = extras[index], None
        return None if extra is None else mixed_gradient(gradient, extra)

    def _warn_of_idle_backward(self) -> None:
        """Count a backward that reached an encoder and not the joint logits; warn after several."""
        assert self._idle_backwards is not None
        self._idle_backwards.add(backward_number())
        if len(self._idle_backwards) == _IDLE_BACKWARDS:
            self._idle_backwards = None
            uncalled = "the loss module (`loss=`) was not called on the joint logits"
            warn_user(
                f"{_IDLE_BACKWARDS} backwards reached encoders and not the joint logits: {_NOTHING_ADDED}. Likely "
                f"causes: {self.monitor.silence() if self.loss.criterion is None else uncalled}."
            )

    def _labels(self, current: Pass, logits: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return class indices `(B,)`, -100 for rows without a valid label, and bool `(B,)`, doubtful rows."""
        rows, classes = logits.shape
        labels = current.labels
        if labels is None:
            if not self.monitor.labels.recovers:
                raise RuntimeError(
                    "inject=True needs the labels by the time of backward: call monitor.observe(labels) before it, or "
                    "build the monitor with `loss=`, the loss module that your loop calls."
                )
            read = recover_labels(gradient, logits)
            unknown = (read.labels == INVALID) & torch.isfinite(gradient).all(1) & (gradient != 0).any(1)
            doubtful = read.ambiguous | unknown
            if current.logits is not None and current.logits.shape[-1] == 1:
                # With two classes any gradient has a label and a factor; only differing factors show a regression.
                doubtful |= off_residual(gradient[:, 1:], logits[:, 1:], read.labels.unsqueeze(1)).squeeze(1)
            return read.labels, doubtful
        if labels.numel() != rows:
            raise ValueError(
                f"inject=True without `loss=` needs a class index for each of the {rows} rows of the logits. Found "
                f"labels of shape {tuple(labels.shape)}; for other targets build the monitor with `loss=`, the loss "
                "module that your loop calls."
            )
        ignore = self.monitor.labels.ignore_index if current.ignore_index is None else current.ignore_index
        targets = as_targets(labels.to(logits.device).flatten().long(), classes, ignore)
        assert targets.index is not None
        return torch.where(targets.valid, targets.index, INVALID), torch.zeros_like(targets.valid)


def remove_handles(handles: list[RemovableHandle | CallWatch]) -> None:
    """Remove hooks by `handles`, and clear the list."""
    for handle in handles:
        handle.remove()
    handles.clear()


def _leaf(leaves: list[Tensor], x: Tensor) -> Tensor:
    """Return a new leaf for a floating tensor, and append the leaf to `leaves`; other tensors are returned as such."""
    if not is_differentiable(x):
        return x
    leaves.append(x.detach().requires_grad_())
    return leaves[-1]


def _is_joint(logits: Any, current: Pass) -> bool:
    """Whether `logits` are the pass's joint logits; any tensor counts where the joint logits are unknown."""
    if not isinstance(logits, Tensor) or current.logits is None:
        return isinstance(logits, Tensor)
    if logits.numel() != current.logits.numel():
        return False
    same = logits.detach().to(current.logits.dtype)
    # Losses of torch take the classes in dimension 1, before positions.
    layouts = (same, same.movedim(1, -1)) if same.dim() > 2 else (same,)
    return any(torch.equal(x.reshape(current.logits.shape), current.logits) for x in layouts)


def _refuse_doubtful(counts: dict[str, int]) -> None:
    if counts["doubtful"]:
        raise RuntimeError(
            f"the gradient at the joint logits is not that of a plain cross-entropy in {counts['doubtful']} of "
            f"{counts['rows']} rows (label smoothing, regression or another loss, other labels than given, a "
            "temperature, or logits so far apart that it vanished), so inject=True can't have labels and scale "
            "exactly. Build the monitor with `loss=`, the loss module that your loop calls on the logits, or add "
            "objective(labels) to the loss."
        )
