"""Signals of plain training: what each optimizer step shows of each modality, without a wrapper of the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, finalize

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from balanceopt._method import ABSENT, Listener
from balanceopt._sharding import local_part
from balanceopt._torch import foreach_norm, in_backward
from balanceopt._warnings import warn_user
from balanceopt.functional import agreement, discrepancy_ratio, effective_rank, wide
from balanceopt.monitor import ModalityMonitor, Pass, WeakHook
from balanceopt.optim import STEP

# Elements of an encoder's weights that are compared before and after a step, enough for three digits of a norm.
_SAMPLED = 2**15
# Samples whose features give the effective rank.
_RANKED = 256
# Steps in a row without a score before the user is told.
_UNSCORED = 10


class StepSignals:
    """Report each training step's scores, gradients, updates and features of all modalities to listeners.

    A step is a step of any optimizer that holds an encoder's parameters, after a training forward. Torch's hooks on all
    optimizers show it, so no optimizer is wrapped or changed. Values are of this rank: its samples, its shards of the
    weights, its gradients (equal on all ranks under DistributedDataParallel). No collective and no device
    synchronisation takes place.

    Args:
        monitor: the monitor of the model.
        every: interval in steps between reports, at least 1.

    Attributes:
        listeners: functions `(step, quantity, modalities, values (M,))`.
        step: number of steps so far.
    """

    def __init__(self, monitor: ModalityMonitor, *, every: int = 1) -> None:
        self.monitor = monitor
        self.every = every
        self.listeners: list[Listener] = []
        self.step = 0
        self._buffer = monitor.scores() if monitor.unimodal is not None else None
        self._unscored = 0
        self._forwards = 0  # training forwards since the last step
        self._next = 0  # number of the step that begins
        self._number = 0  # of the latest step
        self._reports = False  # whether the latest step is reported
        self._pass: Pass | None = None
        self._held: dict[str, Callable[[], Tensor]] = {}
        self._agreement: Tensor | None = None
        self._norms: list[Tensor | None] | None = None  # of the gradients that a modulated closure left
        self._params: dict[str, list[nn.Parameter]] = {}  # of all encoders
        self._owned: WeakKeyDictionary[torch.optim.Optimizer, _Owned] = WeakKeyDictionary()
        self._open: WeakKeyDictionary[torch.optim.Optimizer, _Open] = WeakKeyDictionary()
        monitor.hooks.outputs.add(self._on_output)
        monitor.hooks.gradients.add(self._on_gradient)
        monitor.hooks.before_step.add(self._before_modulated)
        monitor.hooks.after_closure.add(self._on_closure)
        monitor.hooks.after_step.add(self._end)
        handles = [
            register_optimizer_step_pre_hook(WeakHook(self._before)),
            register_optimizer_step_post_hook(WeakHook(self._after)),
        ]
        self._unhook = finalize(self, _remove_handles, handles)
        self._unhook.atexit = False

    def remove(self) -> None:
        """Remove all hooks and the buffer of scores; a second call is a no-op."""
        hooks = self.monitor.hooks
        hooks.outputs.drop(self._on_output)
        hooks.gradients.drop(self._on_gradient)
        hooks.before_step.drop(self._before_modulated)
        hooks.after_closure.drop(self._on_closure)
        hooks.after_step.drop(self._end)
        self._unhook()
        if self._buffer is not None:
            self._buffer.remove()
        self._forget()
        self._open.clear()

    def check(self) -> None:
        """Warn if training forwards were seen, and never an optimizer's step."""
        if self.step == 0 and self._forwards > 1:
            warn_user(
                f"{self._forwards} training forwards were seen, and no step of an optimizer that holds an encoder's "
                "parameters: nothing is recorded. Train with a torch.optim.Optimizer whose constructor calls "
                "Optimizer.__init__, on the parameters of the model that the monitor watches."
            )

    # -- hooks of the model --------------------------------------------------------------------------------------

    def _on_output(self, name: str, output: Any, current: Pass | None) -> None:
        if current is None or current.rehearsal or in_backward():
            return
        if current is not self._pass:
            self._pass, self._held, self._agreement = current, {}, None
            self._forwards += 1
        if self.step % self.every == 0:
            # A copy, because modules after the encoder may change the output in place.
            self._held[name] = self.monitor.features.held(name, output)

    def _on_gradient(self, current: Pass, gradient: Tensor) -> None:
        if self.step % self.every or not current.unimodal or current.logits is None:
            return
        names = self.monitor.modalities
        absent = torch.full_like(current.logits, torch.nan, dtype=torch.float32)
        logits = torch.stack([current.unimodal.get(name, absent) for name in names])
        values = agreement(logits, current.logits, self.monitor.labels.loss.answers)
        here = [name in current.unimodal for name in names]
        self._agreement = values if all(here) else _with_nan(values, here)

    # -- hooks of optimizers -------------------------------------------------------------------------------------

    def _before(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Begin an optimizer's step, called by torch."""
        current = self._open.get(optimizer)
        if current is None or not current.modulated:
            self._begin(optimizer, (args[1] if len(args) > 1 else kwargs.get("closure")) is not None)

    def _before_modulated(self, optimizer: torch.optim.Optimizer, has_closure: bool) -> None:
        """Begin a modulated step, called by the engine: its gradients are not changed yet."""
        current = self._open.get(optimizer)
        if current is None or current.modulated:
            self._begin(optimizer, has_closure)
        if optimizer in self._open:
            self._open[optimizer].modulated = True

    def _after(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """End an optimizer's step, called by torch; the engine ends a modulated one, whose update it scales."""
        current = self._open.get(optimizer)
        if current is not None and not current.modulated:
            self._end(optimizer)

    @torch.no_grad()
    def _on_closure(self, optimizer: torch.optim.Optimizer) -> None:
        if self.step % self.every == 0:
            self._norms = [norm_of_gradients(params) for params in self._params.values()]

    @torch.no_grad()
    def _begin(self, optimizer: torch.optim.Optimizer, has_closure: bool) -> None:
        params = self._params_in(optimizer)
        if not params:
            return
        # Methods on the same optimizer count its steps in the param groups, over all of its runs.
        self._next = max(self.step, int(optimizer.param_groups[0].get(STEP, 0)))
        if self._forwards and not has_closure:  # with a closure, the step's gradients come within it
            self._open.clear()  # of steps that raised
            self._report_step(optimizer)
        if not (self.step % self.every == 0 if has_closure else self._reports):
            return
        # An optimizer may step another one inside it, which has the same parameters.
        others = [current.params for other, current in self._open.items() if other is not optimizer]
        measured = {id(p) for by_name in others for part in by_name.values() for p in part}
        apart = {name: [p for p in part if id(p) not in measured] for name, part in params.items()}
        self._open[optimizer] = _Open({name: part for name, part in apart.items() if part})

    @torch.no_grad()
    def _end(self, optimizer: torch.optim.Optimizer) -> None:
        current = self._open.pop(optimizer, None)
        if self._forwards and self._params_in(optimizer):
            self._report_step(optimizer)
        if current is None or not current.before:
            return
        changes = current.changes()
        device = changes[0].device
        self._tell("update_ratio", torch.stack([x.to(device) for x in changes]), tuple(current.before))

    def _params_in(self, optimizer: torch.optim.Optimizer) -> dict[str, list[nn.Parameter]]:
        """Return the encoders' parameters that an optimizer holds, by modality."""
        owned = self._owned.get(optimizer)
        if owned is None or owned.is_outdated(optimizer):
            self._params = self.monitor.parameters
            owned = self._owned[optimizer] = _Owned(optimizer, self._params)
        return owned.params

    def _report_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Report what the step of an optimizer begins with, or with a closure, what it has ended with."""
        self._number = self._next
        self._reports = self._number % self.every == 0
        self.step = self._number + 1
        self._forwards = 0
        scores = None if self._buffer is None else self._buffer.take_local()
        self._count_scores(missing=self._buffer is not None and scores is None)
        if self._reports:
            if scores is not None:
                here = scores.present
                self._tell("score", torch.where(here, scores.mean_score, ABSENT))
                if len(here) > 1:
                    ratio = discrepancy_ratio(scores.mean_score, "mean_of_ratios", here)
                    self._tell("ratio", torch.where(scores.usable, ratio, ABSENT))
            self._report_gradients(optimizer)
            self._report_features()
        self._forget()

    def _report_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        norms = self._norms or [norm_of_gradients(params) for params in self._params.values()]
        device = next((norm.device for norm in norms if norm is not None), None)
        if device is None:
            return
        names = tuple(n for n, norm in zip(self._params, norms, strict=True) if norm is not None)
        values = torch.stack([norm.to(device) for norm in norms if norm is not None])
        scale = getattr(optimizer, "grad_scale", None)  # a GradScaler leaves unscaling to a fused step
        if isinstance(scale, Tensor):
            values = values / scale.to(device)
        self._tell("gradient_norm", values, names)
        total = values.sum()
        self._tell("gradient_share", torch.where(total == 0, ABSENT, values / total), names)

    def _report_features(self) -> None:
        if self._pass is None or not self._held:
            return
        norms, ranks = [], []
        for name, held in self._held.items():
            z = self.monitor.features.pooled(name, held(), self._pass.samples)
            norm = wide(z).norm(dim=1)
            absent = torch.full_like(norm.sum(), ABSENT)
            norms.append(norm.mean() if len(z) else absent)
            ranks.append(effective_rank(z[:_RANKED]) if len(z) > 1 else absent)
        device, names = norms[0].device, tuple(self._held)
        self._tell("feature_norm", torch.stack([x.to(device) for x in norms]), names)
        self._tell("effective_rank", torch.stack([x.to(device) for x in ranks]), names)
        if self._agreement is not None:
            self._tell("agreement", self._agreement.nan_to_num(ABSENT))

    def _count_scores(self, *, missing: bool) -> None:
        self._unscored = self._unscored + 1 if missing else 0
        if self._unscored == _UNSCORED:
            warn_user(f"no score came in {_UNSCORED} steps, none is recorded: {self.monitor.silence()}.")

    def _tell(self, quantity: str, values: Tensor, names: tuple[str, ...] | None = None) -> None:
        for listener in self.listeners:
            listener(self._number, quantity, self.monitor.modalities if names is None else names, values)

    def _forget(self) -> None:
        self._pass, self._held, self._agreement, self._norms = None, {}, None, None


class _Owned:
    """The parameters of the encoders that an optimizer holds, by modality."""

    def __init__(self, optimizer: torch.optim.Optimizer, encoders: dict[str, list[nn.Parameter]]) -> None:
        self._ids = _ids_in(optimizer)
        held = set(self._ids)
        params = {name: [p for p in part if id(p) in held] for name, part in encoders.items()}
        self.params = {name: part for name, part in params.items() if part}

    def is_outdated(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the optimizer's parameters have changed."""
        return self._ids != _ids_in(optimizer)


class _Open:
    """A step that runs, with a sample of the weights before it.

    Attributes:
        params: parameters by modality.
        strides: by modality, the interval between sampled elements.
        before: by modality, the sampled elements before the step.
        modulated: whether an engine reports the step's end.
    """

    def __init__(self, params: dict[str, list[nn.Parameter]]) -> None:
        self.params = params
        totals = {name: sum(p.numel() for p in part) for name, part in params.items()}
        # Odd, so that samples of tensors with sizes that are powers of two do not lie in one column.
        self.strides = {name: max(1, total // _SAMPLED | 1) for name, total in totals.items()}
        self.before = {name: sample(part, self.strides[name]) for name, part in params.items()}
        self.modulated = False

    def changes(self) -> list[Tensor]:
        """Return the norm of each modality's change relative to the weights before the step, 0-d."""
        return [
            (sample(self.params[name], self.strides[name]) - before).norm() / before.norm()
            for name, before in self.before.items()
        ]


def sample(params: list[nn.Parameter], stride: int) -> Tensor:
    """Copy every `stride`-th element of parameters, in float32 or wider, into one vector."""
    parts = [wide(_flat(local_part(p.detach()))[::stride]) for p in params]
    return torch.cat([part.to(parts[0].device) for part in parts])


def _flat(x: Tensor) -> Tensor:
    """Return a tensor's numbers in one dimension, in any order, without a copy where it is dense."""
    x = torch.view_as_real(x) if x.is_complex() else x
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).view(-1)
    return x.reshape(-1)


def norm_of_gradients(params: list[nn.Parameter]) -> Tensor | None:
    """Compute the norm of this rank's gradients of parameters, 0-d; None where no parameter has a gradient."""
    grads = [local_part(p.grad) for p in params if p.grad is not None]
    if not grads:
        return None
    parts = [grad.coalesce().values() if grad.is_sparse else grad for grad in grads]
    # Squares of half precision would overflow or lose digits.
    narrow = all(part.dtype in (torch.float16, torch.bfloat16, torch.float32) for part in parts)
    norms = foreach_norm(parts, 2, torch.float32 if narrow else None)
    result: Tensor = torch.stack([wide(norm).to(norms[0].device) for norm in norms]).norm()
    return result


def _with_nan(values: Tensor, here: list[bool]) -> Tensor:
    return torch.stack(
        [
            value if known else torch.full_like(value, torch.nan)
            for value, known in zip(values, here, strict=True)
        ]
    )


def _ids_in(optimizer: torch.optim.Optimizer) -> list[int]:
    return [id(p) for group in optimizer.param_groups for p in group["params"]]


def _remove_handles(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
