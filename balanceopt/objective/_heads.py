"""Linear heads of each modality's own, built for the width that its features turn out to have."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class OwnHead(nn.LazyLinear):
    """A linear layer whose width the first features tell, with nn.Linear's distribution of initial weights.

    The weights are a function of the seed: the same on every rank, and the global random stream is left alone.
    """

    def __init__(self, out_features: int, seed: int, device: torch.device) -> None:
        """Answer with `out_features` logits."""
        super().__init__(out_features, device=device)
        self.seed = seed

    def reset_parameters(self) -> None:
        """Draw both weight and bias from U(-1/sqrt(width), 1/sqrt(width))."""
        if self.has_uninitialized_params() or self.in_features == 0:
            return
        generator = torch.Generator().manual_seed(self.seed)
        bound = self.in_features**-0.5
        with torch.no_grad():
            for parameter in (self.weight, self.bias):
                parameter.copy_(bound * (2 * torch.rand(parameter.shape, generator=generator) - 1))


def build(head: nn.Module, width: int) -> None:
    """Build an `OwnHead` for features of this width, unless it is built."""
    if isinstance(head, OwnHead):
        with torch.no_grad():
            like = next(head.parameters())
            head(torch.empty(0, width, device=like.device, dtype=like.dtype))


def answer(head: nn.Linear, vectors: Tensor, name: str) -> Tensor:
    """The head's logits `(B, C)` of `(B, D)` features.

    Raises:
        ValueError: if the features have another width than the head was built for.
    """
    if isinstance(head, OwnHead):
        head.to(vectors.device)
        build(head, vectors.shape[1])
    if vectors.shape[1] != head.in_features:
        raise ValueError(
            f"the features of {name!r} should have width {head.in_features}, for which its head was built. "
            f"Found {vectors.shape[1]}."
        )
    if not torch.is_autocast_enabled(vectors.device.type):
        vectors = vectors.to(head.weight.dtype)
    logits: Tensor = head(vectors)
    return logits
