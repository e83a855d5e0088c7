"""Standard deviations of whole tensors, on the CPU by short float32 sums, twice as fast as `torch.std`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from balanceopt._sharding import is_sharded, local_part, summed_over_shards
from balanceopt._torch import foreach_norm

# Largest numbers of elements summed in float32, of a tensor and of a row in a larger tensor, because longer sums
# lose a number of digits that depends on the processor.
_SMALL, _ROW = 2**13, 2**10
# Limits of mean square minus squared mean, because digits cancel where the variance is a small part or tiny.
_LOST, _TINY = 0.5, 1e-30


def _whole_stds(tensors: Sequence[Tensor]) -> Tensor:
    """Return the population standard deviation of each unsharded tensor's elements.

    Contiguous float32 tensors on the CPU are summed in float32; those with more than 2^13 elements by rows of 2^10
    elements, whose sums are added in float64. A sum of n squares in four lanes or more has at most n / 4 roundings of
    2^-24, so that the relative error is at most 1.5e-4 on any processor, and 2e-5 where rows are summed. (Measured:
    1e-5 and 1e-6 for elements all of one size, whose roundings have one sign, and 2e-7 for others.) Threads sum whole
    rows, so that results do not depend on their number.

    Returns:
        `(n,)`, in float32 or wider; non-finite where an element is.
    """
    in_order = np.array([_is_summed(tensor) for tensor in tensors])
    sizes = np.array([tensor.numel() for tensor in tensors])
    small = np.flatnonzero(in_order & (sizes <= _SMALL) & (sizes > 0)).tolist()
    sums, squares = np.full((2, len(tensors)), math.nan)
    if small:
        chosen = [tensors[place] for place in small]
        sums[small] = torch.stack([tensor.sum() for tensor in chosen]).numpy()
        squares[small] = torch.stack(foreach_norm(chosen)).numpy().astype(np.float64) ** 2
    for place in np.flatnonzero(in_order & (sizes > _SMALL)).tolist():
        sums[place], squares[place] = _by_rows(tensors[place].detach().view(-1))
    with np.errstate(all="ignore"):
        variance = squares / sizes - (sums / sizes) ** 2
        inexact = ~(variance > np.maximum(_LOST * squares / sizes, _TINY))  # also for non-finite elements
    result = list(torch.from_numpy(np.sqrt(np.where(inexact, 0, variance))).float())
    for place in np.flatnonzero(inexact).tolist():
        result[place] = _exact(tensors[place])
    return torch.stack(result)


def _is_summed(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.is_contiguous()


def _by_rows(flat: Tensor) -> tuple[float, float]:
    """Return sum and sum of squares of a vector's elements, row by row."""
    total = squares = 0.0
    whole = len(flat) - len(flat) % _ROW
    for rows in (flat[:whole].view(-1, _ROW), flat[whole:].view(1, -1)):
        total += float(rows.sum(1).numpy().sum(dtype=np.float64))
        squares += float(np.square(torch.linalg.vector_norm(rows, dim=1).numpy(), dtype=np.float64).sum())
    return total, squares


def _exact(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).std(correction=0)


def stds(tensors: Sequence[Tensor]) -> Tensor:
    """Return the `(n,)` population standard deviations of whole tensors; non-finite where an element is."""
    if not any(is_sharded(tensor) for tensor in tensors):
        return _whole_stds(tensors)
    count, total, squares = torch.stack(summed_over_shards(tensors, [_moments(t) for t in tensors])).unbind(1)
    mean = total / count
    return (squares / count - mean.square()).clamp(min=0).sqrt().to(_wide_dtype(tensors[0]))


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Return bool `(n,)`, whether the sum of each tensor, and so every element, is finite."""
    parts = [local_part(t.coalesce().values() if t.is_sparse else t) for t in tensors]
    sums = [part.sum(dtype=_wide_dtype(part)).view(1) for part in parts]
    return torch.isfinite(torch.cat(summed_over_shards(tensors, sums)))


def _moments(tensor: Tensor) -> Tensor:
    """Return count, sum and sum of squares of this rank's shard, in float64 because the squared mean is subtracted."""
    part = local_part(tensor)
    if part.numel() == 0:
        return torch.zeros(3, dtype=torch.float64, device=part.device)
    std, mean = (x.double() for x in torch.std_mean(_wide(part), correction=0))
    count = torch.full_like(mean, part.numel())
    return torch.stack([count, count * mean, count * (std.square() + mean.square())])


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(_wide_dtype(tensor))


def _wide_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
