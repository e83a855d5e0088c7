"""What OGM-GE's noise needs of an optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from balanceopt import _gaussian_compiled

Noise = Literal["compiled"]


def prepare_compiled(parameters: Sequence[Tensor]) -> None:
    """Compile the kernels for gradients of these parameters.

    Raises:
        RuntimeError: if nothing can be compiled here.
    """
    _gaussian_compiled.warm_up(sorted({(p.device, p.dtype) for p in parameters}, key=str))


def parameters_of(optimizer: torch.optim.Optimizer, min_ndim: int) -> list[nn.Parameter]:
    """Those of the optimizer with at least so many dimensions: all that may get noise, as far as they are built."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return [p for p in parameters if not is_lazy(p) and p.dim() >= min_ndim]
