"""Scale gradients in place and add noise; non-finite gradients stay unchanged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from balanceopt._deferred import on_host
from balanceopt._torch import foreach_mul_
from balanceopt.modulation._base import Slot
from balanceopt.modulation._noise import scale_and_add_gaussians_
from balanceopt.modulation._spread import all_finite, stds


@torch.no_grad()
def scale_grads_(slots: Sequence[Slot], coefficient: Tensor) -> Tensor:
    """Multiply finite gradients by a 0-d `coefficient` in place; return the number of non-finite ones, 0-d."""
    left = torch.zeros_like(coefficient, dtype=torch.int64)
    for device, own in _by_device(slots).items():
        grads = [slot.grad for slot in own]
        finite, k = all_finite(grads), coefficient.to(device)
        left += (~finite).sum().to(left.device)
        touched = [grads[i] for i in _to_touch(finite)]
        if on_host(finite) is None:
            for grad, factor in zip(grads, torch.where(finite, k, 1), strict=True):
                grad.mul_(factor)
        elif touched:
            foreach_mul_(touched, k)
    return left


@torch.no_grad()
def scale_and_add_noise_(
    slots: Sequence[Slot],
    coefficient: Tensor,
    noise_scale: Tensor,
    seed: int,
    step: int,
    *,
    compiled: bool = False,
) -> Tensor:
    """Set each gradient g to `k g + noise_scale * std(g) * N(0, 1)` in place, std of the unscaled gradient.

    Complex gradients are treated as their real and imaginary parts. Returns the number of non-finite gradients, 0-d,
    which stay unchanged.
    """
    left = torch.zeros_like(coefficient, dtype=torch.int64)
    for device, own in _by_device(slots).items():
        grads = [slot.grad for slot in own]
        numbers = [_as_real(grad) for grad in grads]
        sigma = stds(numbers)
        finite = torch.isfinite(sigma)
        left += (~finite).sum().to(left.device)
        touched = _to_touch(finite)
        if not touched:
            continue
        factors = torch.where(finite, coefficient.to(device), 1)
        scales = torch.where(finite, noise_scale.to(device) * sigma, 0)
        if len(touched) < len(own):
            factors, scales = (torch.stack([x[i] for i in touched]) for x in (factors, scales))
        chosen, indices = [numbers[i] for i in touched], [own[i].index for i in touched]
        scale_and_add_gaussians_(chosen, factors, scales, seed, step, indices, compiled=compiled)
        for i in touched:
            if grads[i].is_conj():
                grads[i].copy_(torch.view_as_complex(numbers[i]))
    return left


def _as_real(grad: Tensor) -> Tensor:
    """Return a real view of a complex gradient; of a copy for a lazily conjugated gradient."""
    return torch.view_as_real(grad.resolve_conj()) if grad.is_complex() else grad


def _to_touch(finite: Tensor) -> list[int]:
    """Return the indices of finite gradients; all indices where `finite` can't be read without synchronising."""
    host = on_host(finite)
    return [i for i in range(len(finite)) if host is None or host[i]]


def _by_device(slots: Sequence[Slot]) -> dict[torch.device, list[Slot]]:
    groups: dict[torch.device, list[Slot]] = {}
    for slot in slots:
        groups.setdefault(slot.grad.device, []).append(slot)
    return groups
