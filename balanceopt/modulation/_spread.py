"""Standard deviations on the CPU in one pass: torch's own cost twice an optimizer's step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from balanceopt._deferred import on_host

# Small enough to stay in cache between the two sums, and for float32 sums to keep their digits.
_CHUNK = 2**19
# Tensors up to this many elements are summed together: it is the calls that cost.
_SMALL = 2**14
# The mean's square is taken off the mean square. Where it is most of it, or that is tiny, digits are lost.
_LOST, _TINY = 0.5, 1e-30


def stds(tensors: Sequence[Tensor]) -> Tensor:
    """`(n,)` population standard deviations, in float32 or wider; not finite where an element is not."""
    if not all(_can_be_summed(tensor) for tensor in tensors):
        return torch.stack([_exact(tensor) for tensor in tensors])
    variance = np.empty(len(tensors))
    for numbers_of, places in (
        (_of_small, [place for place, tensor in enumerate(tensors) if tensor.numel() <= _SMALL]),
        (_of_large, [place for place, tensor in enumerate(tensors) if tensor.numel() > _SMALL]),
    ):
        if places:
            variance[places] = numbers_of([tensors[place] for place in places])
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
    norms = _numbers(torch._foreach_norm(tensors))
    return _variance(_numbers([tensor.sum() for tensor in tensors]), norms**2, _sizes(tensors))


def _of_large(tensors: list[Tensor]) -> np.ndarray:
    """The same, part by part: of one that is in cache, the second sum costs little."""
    parts = [tensor.view(-1).split(_CHUNK) for tensor in tensors]
    both = [(part.sum(), part.dot(part)) for own in parts for part in own]
    firsts = np.cumsum([0, *(len(own) for own in parts[:-1])])
    sums, squares = (np.add.reduceat(_numbers(found), firsts) for found in zip(*both, strict=True))
    return _variance(sums, squares, _sizes(tensors))


def _variance(sums: np.ndarray, squares: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):
        mean_square = squares / sizes
        variance = mean_square - (sums / sizes) ** 2
        return np.where(variance > np.maximum(_LOST * mean_square, _TINY), variance, math.nan)


def _sizes(tensors: list[Tensor]) -> np.ndarray:
    return np.array([tensor.numel() for tensor in tensors])


def _numbers(scalars: Sequence[Tensor]) -> np.ndarray:
    """In float64."""
    host = on_host(torch.stack(list(scalars)).double())
    assert host is not None
    return host
