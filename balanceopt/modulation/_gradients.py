"""Scale gradients in place and add noise, leaving any that are not finite as they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from balanceopt._deferred import on_host
from balanceopt._random import add_gaussians_
from balanceopt.modulation._base import Slot


@torch.no_grad()
def scale_grads_(slots: Sequence[Slot], coefficient: Tensor) -> Tensor:
    """Multiply the gradients by a 0-d `coefficient`; returns how many were not finite and left alone, 0-d."""
    left = torch.zeros_like(coefficient, dtype=torch.int64)
    for device, own in _by_device(slots).items():
        grads = [slot.grad for slot in own]
        finite = torch.stack([_all_finite(grad) for grad in grads])
        _scale_where(grads, coefficient.to(device), finite)
        left += (~finite).sum().to(left.device)
    return left


@torch.no_grad()
def scale_and_add_noise_(
    slots: Sequence[Slot], coefficient: Tensor, noise_scale: Tensor, seed: int, step: int
) -> Tensor:
    """`g <- k g + noise_scale * std(g) * N(0, 1)` tensor by tensor, std of the unscaled gradient.

    Returns how many gradients were not finite and left alone, 0-d.
    """
    left = torch.zeros_like(coefficient, dtype=torch.int64)
    for device, own in _by_device(slots).items():
        grads = [slot.grad for slot in own]
        sigma = torch.stack([_std(grad) for grad in grads])
        finite = torch.isfinite(sigma)
        _scale_where(grads, coefficient.to(device), finite)
        scales = torch.where(finite, noise_scale.to(device) * sigma, 0)
        add_gaussians_(grads, scales, seed, step, [slot.index for slot in own])
        left += (~finite).sum().to(left.device)
    return left


def _scale_where(grads: list[Tensor], coefficient: Tensor, finite: Tensor) -> None:
    host = on_host(finite)
    if host is not None and host.all():
        torch._foreach_mul_(grads, coefficient)
    else:
        for grad, own in zip(grads, torch.where(finite, coefficient, 1), strict=True):
            grad.mul_(own)


def _by_device(slots: Sequence[Slot]) -> dict[torch.device, list[Slot]]:
    groups: dict[torch.device, list[Slot]] = {}
    for slot in slots:
        groups.setdefault(slot.grad.device, []).append(slot)
    return groups


def _std(grad: Tensor) -> Tensor:
    """Population standard deviation of all elements of the (whole) tensor; not finite if any element is not."""
    std = grad.to(torch.promote_types(grad.dtype, torch.float32)).std(correction=0)
    return _local(std)


def _all_finite(grad: Tensor) -> Tensor:
    """Whether all elements are finite, 0-d: a sum is, unless one of its terms is not."""
    values = grad.coalesce().values() if grad.is_sparse else grad
    return torch.isfinite(_local(values.sum(dtype=torch.promote_types(values.dtype, torch.float32))))


def _local(value: Tensor) -> Tensor:
    full = getattr(value, "full_tensor", None)
    return value if full is None else full()
