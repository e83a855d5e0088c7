"""Scale the update that the base optimizer's step makes to parameters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from balanceopt._deferred import on_host
from balanceopt._sharding import local_part
from balanceopt._torch import foreach_add_, foreach_lerp_, foreach_mul_, foreach_sub

Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]


class UpdateScaling:
    """Scale the updates of one step: `p <- before + k (p - before)`, after the base optimizer has stepped.

    `before` is copied once in a step, at the first `scale` of a parameter. Where a closure is evaluated several times,
    the factors of the last evaluation count. On the CPU the copies' memory is reused in the next step, because
    allocating it again would take longer than the step.
    """

    def __init__(self) -> None:
        self._before: dict[nn.Parameter, Tensor] = {}
        self._spare: dict[Layout, list[Tensor]] = {}
        self._factors: list[tuple[list[nn.Parameter], Tensor]] = []
        self._has_closure = False

    def begin(self, *, has_closure: bool) -> None:
        """Begin a step; with a closure, copy parameters even for a factor of 1: a later evaluation may scale them."""
        self.abandon()
        self._has_closure = has_closure

    def restart(self) -> None:
        """Discard the factors of the closure's previous evaluation."""
        self._factors.clear()

    @torch.no_grad()
    def scale(self, params: Sequence[nn.Parameter], factor: Tensor) -> None:
        """Scale the step's update of `params` by `factor`, 0-d or broadcastable with each parameter.

        Non-finite elements of the factor leave the update unchanged.
        """
        host_value = on_host(factor)
        has_effect = host_value is None or bool(((host_value != 1) & np.isfinite(host_value)).any())
        if has_effect or self._has_closure:
            for p in params:
                if p not in self._before:
                    self._before[p] = self._copy(p)
        if has_effect:
            self._factors.append((list(params), factor))

    @torch.no_grad()
    def finish(self) -> None:
        """Scale the update of the finished step by the recorded factors."""
        for params, factor in self._factors:
            _scale_differences(
                [local_part(p.detach()) for p in params], [self._before[p] for p in params], factor
            )
        if self._before:
            self._spare = {}
            for before in self._before.values():
                if before.device.type == "cpu":
                    self._spare.setdefault(_layout_of(before), []).append(before)
        self.abandon()

    def abandon(self) -> None:
        """Discard copies and factors; parameters stay as the base optimizer left them."""
        self._before.clear()
        self._factors.clear()

    def _copy(self, p: nn.Parameter) -> Tensor:
        values = local_part(p.detach())
        spare = self._spare.get(_layout_of(values))
        return spare.pop().copy_(values) if spare and values.device.type == "cpu" else values.clone()


def _layout_of(x: Tensor) -> Layout:
    return x.shape, x.stride(), x.dtype


def _scale_differences(values: list[Tensor], before: list[Tensor], factor: Tensor) -> None:
    """Set `values` to `before + factor (values - before)` in place, exact for equal elements and for a factor of 1."""
    host_value = on_host(factor)
    if host_value is not None and factor.dim() == 0:
        foreach_lerp_(values, before, 1 - float(host_value))
        return
    rest = torch.where(torch.isfinite(factor), 1 - factor, 0)
    if factor.dim():
        for x, earlier in zip(values, before, strict=True):
            x.add_((earlier - x).mul_(rest.to(x.device, x.dtype.to_real())))
        return
    by_kind: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, x in enumerate(values):
        by_kind.setdefault((x.device, x.dtype), []).append(index)
    for (device, dtype), indices in by_kind.items():
        chosen = [values[i] for i in indices]
        differences = foreach_sub([before[i] for i in indices], chosen)
        foreach_mul_(differences, rest.to(device, dtype.to_real()))
        foreach_add_(chosen, differences)
