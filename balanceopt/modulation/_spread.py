"""The standard deviation of a large tensor on the CPU in one pass: torch's own costs twice an optimizer's step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from balanceopt._deferred import on_host

# Small enough to stay in cache between the two sums, and for float32 sums to keep their digits.
_CHUNK = 2**17
# Below this many elements torch's own is as fast.
_WORTH_IT = 2**14
# The mean's square is taken off the mean square. Where it is most of it, or that is tiny, digits are lost.
_LOST, _TINY = 0.5, 1e-30


def std(tensor: Tensor) -> Tensor:
    """The population standard deviation, 0-d, in float32 or wider; not finite where an element is not."""
    quick = (
        tensor.numel() > _WORTH_IT
        and tensor.device.type == "cpu"
        and tensor.dtype == torch.float32
        and tensor.is_contiguous()
    )
    found = _by_sums(tensor.view(-1)) if quick else None
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return wide.std(correction=0) if found is None else tensor.new_tensor(found)


def _by_sums(numbers: Tensor) -> float | None:
    """From sums and sums of squares; None where that would be inexact, or not finite."""
    sums = torch.stack([torch.stack([part.sum(), part.dot(part)]) for part in numbers.split(_CHUNK)])
    host = on_host(sums.double().sum(0))
    assert host is not None
    mean, mean_square = (float(total) / numbers.numel() for total in host)
    variance = mean_square - mean**2
    return math.sqrt(variance) if variance > max(_LOST * mean_square, _TINY) else None
