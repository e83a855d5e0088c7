"""Standard deviations on the CPU in one pass: torch's own cost twice an optimizer's step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from balanceopt._deferred import on_host

# Small enough to stay in cache between the two sums, and for float32 sums to keep their digits.
_CHUNK = 2**17
# Tensors up to this many elements are summed together: it is the calls that cost.
_SMALL = 2**14
# The mean's square is taken off the mean square. Where it is most of it, or that is tiny, digits are lost.
_LOST, _TINY = 0.5, 1e-30


def stds(tensors: Sequence[Tensor]) -> Tensor:
    """`(n,)` population standard deviations, in float32 or wider; not finite where an element is not."""
    if not all(_can_be_summed(tensor) for tensor in tensors):
        return torch.stack([_exact(tensor) for tensor in tensors])
    small = [place for place, tensor in enumerate(tensors) if tensor.numel() <= _SMALL]
    variance = np.empty(len(tensors))
    variance[small] = _of_small([tensors[place] for place in small])
    for place, tensor in enumerate(tensors):
        if tensor.numel() > _SMALL:
            variance[place] = _of_large(tensor.view(-1))
    found = torch.from_numpy(np.sqrt(variance)).float()
    for place in np.flatnonzero(np.isnan(variance)).tolist():
        found[place] = _exact(tensors[place])
    return found


def _can_be_summed(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.is_contiguous()


def _exact(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).std(correction=0)


def _of_small(tensors: list[Tensor]) -> np.ndarray:
    """Variances; nan where sums are inexact, or not finite."""
    if not tensors:
        return np.empty(0)
    norms = on_host(torch.stack(torch._foreach_norm(tensors)).double())
    sums = on_host(torch.stack([tensor.sum() for tensor in tensors]).double())
    assert norms is not None
    assert sums is not None
    numel = np.array([tensor.numel() for tensor in tensors])
    with np.errstate(invalid="ignore"):
        mean_square = norms**2 / numel
        variance = mean_square - (sums / numel) ** 2
        return np.where(variance > np.maximum(_LOST * mean_square, _TINY), variance, math.nan)


def _of_large(numbers: Tensor) -> float:
    """The same of one tensor."""
    sums = torch.stack([torch.stack([part.sum(), part.dot(part)]) for part in numbers.split(_CHUNK)])
    host = on_host(sums.double().sum(0))
    assert host is not None
    mean, mean_square = (float(total) / numbers.numel() for total in host)
    variance = mean_square - mean**2
    return variance if variance > max(_LOST * mean_square, _TINY) else math.nan
