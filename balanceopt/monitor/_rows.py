"""One row for each answer of a head: samples, or positions within samples."""

from __future__ import annotations

from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """`(B, ..., D)` as `(N, D)`."""
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(-1)
