"""InfoReg: pull the encoders of modalities that are ahead back to their weights at the start of the epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from balanceopt._deferred import on_host
from balanceopt._method import Unit
from balanceopt._options import (
    check_choice,
    check_count,
    check_entries,
    check_kind,
    check_number,
    check_tensor,
)
from balanceopt._sharding import is_sharded, local_like, local_part, sharded_like, summed_over_shards, whole
from balanceopt._torch import foreach_add_, foreach_mul_, foreach_sub
from balanceopt._warnings import warn_user
from balanceopt.functional import check_threshold, in_prime_window, regulation_strength, wide
from balanceopt.modulation._base import Modulation, OptimizerHintWarning, Slot, StepContext
from balanceopt.modulation._cancelling import cancels_constant_factor
from balanceopt.monitor import ModalityMonitor

Trace = Literal["modality", "model"]
_ENTRIES = ("epoch", "history", "total", "steps", "anchors")


class InfoReg(Modulation):
    r"""Adaptive uni-modal regulation: slow what a modality that is ahead learns, early in training.

    $$g^m \leftarrow g^m + \text{scale} \cdot a^m (\theta^m - \theta^m_{\text{epoch start}})$$

    with \(a^m\) of `functional.regulation_strength`, 0 for modalities that are not ahead, while the prime learning
    window is open (`functional.in_prime_window`): the gradient of
    \(a^m/2 |\theta^m - \theta^m_{\text{epoch start}}|^2\). Epochs are those of `set_epoch`; without it the first step
    raises. A copy of the encoders is kept, in memory and in the optimizer's checkpoint.

    Args:
        beta: growth of the strength with the lead, >= 0.
        threshold: growth of the squared gradient norm in an epoch above which the window stays open; infinite to never
            act.
        scale: factor on the strength, >= 0.
        trace: `"modality"` for a window of each modality, by the norm of its own gradient, or `"model"` for one window,
            by the norm of all encoders' gradients.
        start: first step or epoch in which the method acts, counted from 0.
        end: last step or epoch in which the method acts, inclusive; None for no end.
        unit: unit of `start` and `end`: `"step"`, or `"epoch"`.

    Raises:
        ValueError: for an option outside its range.
        RuntimeError: in the first step, if no epoch was set.
        NotImplementedError: in a step with a sparse gradient.

    Example:
        >>> InfoReg(beta=0.9)
        InfoReg(beta=0.9, threshold=0.04, scale=1.0, trace='modality', start=0, end=None, unit='step')

    Reference:
        Huang et al., Adaptive Unimodal Regulation for Balanced Multimodal Information Acquisition, CVPR 2025;
        docs/methods/inforeg.md.
    """

    def __init__(
        self,
        beta: float = 0.9,
        *,
        threshold: float = 0.04,
        scale: float = 1.0,
        trace: Trace = "modality",
        start: int = 0,
        end: int | None = None,
        unit: Unit = "step",
    ) -> None:
        super().__init__(start=start, end=end, unit=unit)
        check_number("beta", beta, at_least=0)
        check_threshold(threshold)
        check_number("scale", scale, at_least=0)
        check_choice("trace", trace, get_args(Trace))
        self.beta = beta
        self.threshold = threshold
        self.scale = scale
        self.trace: Trace = trace
        # Epoch of the anchors, means of past epochs, and of this epoch the sum of squared norms and number of steps.
        self._epoch: int | None = None
        self._history = torch.zeros(0, 0, dtype=torch.float32, device="cpu")
        self._total = torch.zeros(0, dtype=torch.float32, device="cpu")
        self._steps = torch.zeros((), dtype=torch.float32, device="cpu")
        # Weights at the start of the epoch, by index of the parameter: the full tensor, or this rank's shard.
        self._anchors: dict[int, Tensor] = {}
        self._shards_of: dict[int, Tensor] = {}  # the sharded parameters, by index, whose anchors are shards

    def check(self, optimizer: torch.optim.Optimizer, monitor: ModalityMonitor) -> None:
        """Warn of learning rates with which the pull overshoots."""
        if cancels_constant_factor(optimizer):
            return  # its learning rate is no factor on gradients
        largest = self.scale * math.exp(self.beta)
        for group in optimizer.param_groups:
            lr = group.get("lr")
            if self.scale > 0 and isinstance(lr, (int, float)) and lr * largest >= 1:
                warn_user(
                    f"the learning rate {lr:g} times InfoReg's largest strength {largest:.3g} is above 1: the pull to "
                    "the weights of the epoch's start overshoots. Use a smaller `scale`.",
                    OptimizerHintWarning,
                )
                return

    @torch.no_grad()
    def modulate(self, step: StepContext) -> None:
        """Count the squared gradient norms, and add the pull to the gradients of modalities that are ahead."""
        if self.epoch is None:
            raise RuntimeError(
                "InfoReg acts by epochs, and none was set yet. Call set_epoch(epoch) of the optimizer when an epoch "
                "begins, before its first step."
            )
        slots = [step.slots.get(name, ()) for name in step.modalities]
        device = step.scores.score.device
        self._to(device)
        if self.epoch != self._epoch:
            self._begin_epoch(len(slots), device)
        for slot in (slot for own in slots for slot in own if slot.index not in self._anchors):
            self._set_anchor(slot, local_part(slot.parameter.detach()).clone())
        norms = self._squared_norms(slots, device)
        finite = torch.isfinite(norms).all()
        self._total = self._total + torch.where(finite, norms, 0)
        self._steps = self._steps + finite
        strength = regulation_strength(step.scores.mean_cross_entropy, self.beta, step.scores.present)
        history = self._history.sum(1) if self.trace == "model" else self._history
        acts = in_prime_window(history, self.threshold) & step.scores.usable & torch.isfinite(strength)
        strength = torch.where(acts, self.scale * strength, 0)
        step.report("regulation_strength", strength)
        host_value = on_host(strength)
        for index, own in enumerate(slots):
            if own and (host_value is None or host_value[index] > 0):
                self._pull(own, strength[index])

    def _to(self, device: torch.device) -> None:
        """Move the norms to a device, once after a load, as a copy synchronises."""
        self._history, self._total, self._steps = (
            x.to(device) for x in (self._history, self._total, self._steps)
        )

    def _begin_epoch(self, modalities: int, device: torch.device) -> None:
        """Add the mean of the epoch before to the history, and release the epoch's anchors."""
        if self._epoch is None:
            self._history = torch.zeros(0, modalities, dtype=torch.float32, device=device)
        else:
            mean = (self._total / self._steps.clamp(min=1)).unsqueeze(0)
            self._history = torch.cat([self._history, mean])[-2:]  # the rule looks at two
        self._epoch = self.epoch
        self._total = torch.zeros(modalities, dtype=torch.float32, device=device)
        self._steps = torch.zeros((), dtype=torch.float32, device=device)
        self._anchors.clear()
        self._shards_of.clear()

    def _set_anchor(self, slot: Slot, anchor: Tensor) -> None:
        self._anchors[slot.index] = anchor
        if is_sharded(slot.parameter):
            self._shards_of[slot.index] = slot.parameter.detach()

    def _squared_norms(self, slots: Sequence[Sequence[Slot]], device: torch.device) -> Tensor:
        """Return each modality's squared gradient norm `(M,)`, over all shards, in one collective."""
        flat = [slot for own in slots for slot in own]
        if any(slot.grad.is_sparse for slot in flat):
            raise NotImplementedError(
                "InfoReg adds to whole gradients, and found a sparse one. Use an embedding with sparse=False."
            )
        squares = [wide(local_part(slot.grad).abs()).square().sum().view(1).to(device) for slot in flat]
        sums = iter(summed_over_shards([slot.grad for slot in flat], squares))
        nothing = torch.zeros(1, dtype=torch.float32, device=device)
        return torch.stack([sum((next(sums).to(device) for _ in own), nothing)[0] for own in slots]).float()

    def _pull(self, slots: Sequence[Slot], strength: Tensor) -> None:
        """Add a modality's pull towards its anchors to its gradients."""
        groups: dict[Any, tuple[list[Tensor], list[Tensor], list[Tensor]]] = {}
        for slot in slots:
            values, grad = local_part(slot.parameter.detach()), local_part(slot.grad)
            anchor = self._anchors[slot.index]
            if anchor.shape != values.shape or anchor.device != values.device:  # full, of a checkpoint
                anchor = local_like(anchor.to(values.device), slot.parameter.detach())
                self._set_anchor(slot, anchor)
            at = groups.setdefault((values.device, values.dtype, grad.dtype), ([], [], []))
            for several, one in zip(at, (values, anchor, grad), strict=True):
                several.append(one)
        for (device, dtype, grad_dtype), (values_, anchors, grads) in groups.items():
            pulls = foreach_sub(values_, anchors)
            foreach_mul_(pulls, strength.to(device, dtype.to_real()))
            foreach_add_(grads, [pull.to(grad_dtype) for pull in pulls])

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, its anchors and norms, and the norms of past epochs; a collective for sharded encoders."""
        anchors = {
            str(index): whole(sharded_like(anchor, self._shards_of[index]))
            if index in self._shards_of
            else anchor
            for index, anchor in self._anchors.items()
        }
        return {
            "epoch": self._epoch,
            "history": self._history.clone(),
            "total": self._total.clone(),
            "steps": self._steps.clone(),
            "anchors": anchors,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the state of a checkpoint. A load that fails changes nothing.

        Raises:
            TypeError, KeyError, ValueError: if `state` is no state of an InfoReg.
        """
        check_entries("the state of an InfoReg", state, _ENTRIES)
        check_count("epoch", state["epoch"], or_none=True)
        for name, dims in (("history", 2), ("total", 1), ("steps", 0)):
            check_tensor(name, state[name], f"of {dims} dimensions", dims=(dims,))
        check_kind("the state's anchors", state["anchors"], Mapping, "a mapping from index to weights")
        anchors = {int(index): anchor for index, anchor in state["anchors"].items()}
        for anchor in anchors.values():
            check_kind("each of the state's anchors", anchor, Tensor, "a tensor")
        self._epoch = state["epoch"]
        self._history, self._total, self._steps = (
            state[n].detach().clone() for n in ("history", "total", "steps")
        )
        self._anchors = {index: anchor.detach().clone() for index, anchor in anchors.items()}
        self._shards_of = {}
