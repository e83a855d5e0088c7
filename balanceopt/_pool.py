"""Approximate noise: slices of a pool of Gaussian numbers, rotated; a part of the pool is new in every step.

Each tensor's numbers are normal, and a step's have nothing to do with another step's beyond what tests can see, but
they are not independent: tensors of one step may share parts of the pool, and the pool outlives a step. In return a
large tensor is scaled and gets its noise in one matrix product, without a temporary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from balanceopt._deferred import on_host, sent
from balanceopt._gaussian import Gaussians
from balanceopt._random import SMALL, fill_, in_groups, key_of, keys_of, scale_, shaped_like
from balanceopt._splitmix import mixed

# The pool is made anew part by part, one in a step. Without that, slices come back (an inner product of many sigma).
_PARTS = 16
# Small tensors of so many elements share a slice.
_TOGETHER = 2**16
# Rows that a slice is read in; the rotation mixes them.
_ROWS = 8
# Of what is drawn for the pool, so that it has nothing to do with the noise of the same seed, step and parameter.
_PART_SALT, _PLACE_SALT, _ROTATION_SALT = 0x2545F4914F6CDD1D, 0x9E6C63D0876A9A1B, 0x1B873593CC9E2D51


class Pool:
    """A function of (seed, step) and its size: a resumed run makes it again, and ranks make the same."""

    def __init__(self) -> None:
        """Hold nothing yet."""
        self._numbers: dict[torch.device, Tensor] = {}
        self._made: dict[torch.device, list[Any]] = {}

    @torch.no_grad()
    def scale_and_add_(
        self,
        tensors: Sequence[Tensor],
        factors: Tensor,
        scales: Tensor,
        seed: int,
        step: int,
        indices: Sequence[int],
        largest: int,
    ) -> None:
        """`tensors[i] <- factors[i] * tensors[i] + scales[i] * z_i` in place, z_i about N(0, 1).

        Args:
            tensors: on one device, not sharded.
            factors: `(n,)`.
            scales: `(n,)`.
            seed: of all randomness.
            step: number of the step.
            indices: of the parameters.
            largest: number of elements of the largest tensor of any step.
        """
        numbers = self._at(tensors[0].device, largest, seed, step)
        large = [i for i, tensor in enumerate(tensors) if tensor.numel() > SMALL]
        small = in_groups(
            [i for i, t in enumerate(tensors) if t.numel() <= SMALL], [t.numel() for t in tensors], _TOGETHER
        )
        first_of = [*large, *(group[0] for group in small)]
        factor_of, scale_of = factors.unbind(), scales.float().unbind()
        turns = rotations([indices[i] for i in first_of], seed, step, numbers.device)
        for i, turn in zip(large, turns, strict=False):
            source = _slice(numbers, tensors[i].numel(), seed, step, indices[i])
            _scale_and_add_to_one(tensors[i], factor_of[i], source, turn * scale_of[i])
        for group, turn in zip(small, turns[len(large) :], strict=True):
            chosen = [tensors[i] for i in group]
            total = sum(tensor.numel() for tensor in chosen)
            source = _slice(numbers, total, seed, step, indices[group[0]])
            noise = (turn @ source.view(_ROWS, -1)).view(-1)[:total].split([t.numel() for t in chosen])
            torch._foreach_mul_(noise, [scale_of[i] for i in group])
            scale_(chosen, [factor_of[i] for i in group])
            torch._foreach_add_(chosen, [shaped_like(t, z) for z, t in zip(noise, chosen, strict=True)])

    def _at(self, device: torch.device, largest: int, seed: int, step: int) -> Tensor:
        """The pool of a step: what is there already, and the parts that are due."""
        each = -(-max(5 * largest // 4, 4 * _TOGETHER) // _PARTS)
        numbers = self._numbers.get(device)
        if numbers is None or numbers.numel() != each * _PARTS:
            self._numbers[device] = numbers = torch.empty(each * _PARTS, device=device)
            self._made[device] = [None] * _PARTS
        for part in range(_PARTS):
            due = (seed, step - (step - part) % _PARTS)
            if self._made[device][part] != due:
                _fill(numbers[part * each : (part + 1) * each], seed, due[1])
                self._made[device][part] = due
        return numbers

    def __getstate__(self) -> dict[str, Any]:
        return {"_numbers": {}, "_made": {}}


def rotations(indices: Sequence[int], seed: int, step: int, device: torch.device) -> Tensor:
    """`(n, 8, 8)` orthogonal matrices, uniform among all: Q of a Gaussian matrix, with the signs of R's diagonal."""
    host = torch.device("cpu")  # so small that making them on a device would take longer
    size = _ROWS * _ROWS
    numels = (size,) * len(indices)
    keys = keys_of(seed ^ _ROTATION_SALT, step, indices, host)
    numbers = torch.stack(Gaussians(host).heads(numels, keys)).view(-1, _ROWS, _ROWS)
    q, r = torch.linalg.qr(numbers.double())
    turns = (q * r.diagonal(dim1=1, dim2=2).sign()[:, None]).float()
    return sent(turns, device)


def _fill(part: Tensor, seed: int, step: int) -> None:
    fill_(part, Gaussians(part.device).pieces(len(part), key_of(seed ^ _PART_SALT, step, 0)))


def _slice(numbers: Tensor, size: int, seed: int, step: int, index: int) -> Tensor:
    size += -size % _ROWS
    start = mixed(seed ^ _PLACE_SALT, step, index) % (numbers.numel() - size + 1)
    return numbers[start : start + size]


def _scale_and_add_to_one(tensor: Tensor, factor: Tensor, source: Tensor, turn: Tensor) -> None:
    """`tensor <- factor * tensor + turn @ source`, both read in rows; what is left over by itself."""
    flat = tensor.view(-1) if tensor.is_contiguous() else tensor.reshape(-1)
    whole = flat.numel() - flat.numel() % _ROWS
    rows, noise = flat[:whole].view(_ROWS, -1), source[:whole].view(_ROWS, -1)
    known = on_host(factor)
    if flat.dtype != torch.float32:
        rows.mul_(factor).add_(turn @ noise)
    elif known is None:
        rows.mul_(factor).addmm_(turn, noise)
    else:
        rows.addmm_(turn, noise, beta=float(known))
    if whole < flat.numel():
        last = turn @ source[-_ROWS:]
        flat[whole:].mul_(factor).add_(last[: flat.numel() - whole])
    if not tensor.is_contiguous():
        tensor.copy_(flat.view(tensor.shape))
