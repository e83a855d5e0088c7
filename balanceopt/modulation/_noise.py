"""Where OGM-GE's noise comes from: made for each element, compiled or not, or from a pool."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from balanceopt import _gaussian_compiled
from balanceopt._pool import Pool
from balanceopt._random import scale_and_add_gaussians_

Noise = Literal["compiled", "pool"]


class NoiseSource(ABC):
    """Scales gradients and adds Gaussian numbers, which are a function of (seed, step, parameter)."""

    def prepare(self, parameters: Sequence[Tensor]) -> None:
        """Get ready for gradients of these parameters of an optimizer, before its first step.

        Raises:
            RuntimeError: if the machine lacks what is needed.
        """

    def begin(self, parameters: Sequence[Tensor]) -> None:
        """A step on these parameters begins, with or without gradients.

        Raises:
            NotImplementedError: for parameters that can't be served.
        """

    @abstractmethod
    def scale_and_add_(
        self,
        gradients: Sequence[Tensor],
        factors: Tensor,
        scales: Tensor,
        seed: int,
        step: int,
        indices: Sequence[int],
    ) -> None:
        """`gradients[i] <- factors[i] * gradients[i] + scales[i] * z_i` in place, all on one device."""


class Independent(NoiseSource):
    """Every element's number its own: exact."""

    def __init__(self, *, compiled: bool = False) -> None:
        """Make them by compiled kernels or by torch's operations."""
        self.compiled = compiled

    def prepare(self, parameters: Sequence[Tensor]) -> None:
        """Compile."""
        if self.compiled:
            _gaussian_compiled.warm_up(sorted({(p.device, p.dtype) for p in parameters}, key=str))

    def scale_and_add_(
        self,
        gradients: Sequence[Tensor],
        factors: Tensor,
        scales: Tensor,
        seed: int,
        step: int,
        indices: Sequence[int],
    ) -> None:
        """A pass over each gradient."""
        scale_and_add_gaussians_(gradients, factors, scales, seed, step, indices, compiled=self.compiled)


class Pooled(NoiseSource):
    """Rotated slices of a pool: a fast approximation."""

    def __init__(self) -> None:
        """Make the pool when it is first needed."""
        self._pool = Pool()
        self._largest = 0

    def prepare(self, parameters: Sequence[Tensor]) -> None:
        """Refuse at once what would be refused in the first step."""
        self.begin(parameters)

    def begin(self, parameters: Sequence[Tensor]) -> None:
        """Make the pool as large as the largest one, with or without a gradient: resumed runs make the same."""
        if any(hasattr(p, "device_mesh") for p in parameters):
            raise NotImplementedError(
                "noise='pool' is not supported for sharded parameters: each rank would need all of the pool. "
                "Use noise=True, of which each rank makes only its own part."
            )
        self._largest = max((p.numel() for p in parameters), default=0)

    def scale_and_add_(
        self,
        gradients: Sequence[Tensor],
        factors: Tensor,
        scales: Tensor,
        seed: int,
        step: int,
        indices: Sequence[int],
    ) -> None:
        """A matrix product with each gradient."""
        self._pool.scale_and_add_(gradients, factors, scales, seed, step, indices, self._largest)


def source_of(noise: bool | Noise) -> NoiseSource:
    """The source that an option names."""
    return Pooled() if noise == "pool" else Independent(compiled=noise == "compiled")


def parameters_of(optimizer: torch.optim.Optimizer, min_ndim: int) -> list[nn.Parameter]:
    """Those of the optimizer with at least so many dimensions: all that may get noise, as far as they are built."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return [p for p in parameters if not is_lazy(p) and p.dim() >= min_ndim]
