"""One row for each answer of a head: samples, or positions within samples."""

from __future__ import annotations

from torch import Tensor, nn

from balanceopt.modality import unwrap

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def as_rows(x: Tensor) -> Tensor:
    """`(B, ..., D)` as `(N, D)`."""
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(-1)


def logit_rows(head: nn.Module, logits: Tensor) -> Tensor:
    """A head's logits, or their gradient, as `(N, C)`.

    Classes stand last, but first after the batch for convolutions, and for others with four dimensions or more, except
    linear heads: as dense prediction has them.
    """
    inner = unwrap(head)
    dense = isinstance(inner, _CONVOLUTIONS) or (logits.dim() > 3 and not isinstance(inner, nn.Linear))
    return as_rows(logits.movedim(1, -1) if dense and logits.dim() > 2 else logits)
