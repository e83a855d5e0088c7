"""What a practitioner would try first: some samples lose one modality, whoever is ahead."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.models import MultimodalClassifier


def drop_at_random(model: MultimodalClassifier, p: float, seed: int) -> tuple[Callable[[], object], ...]:
    """In training, a part `p` of the samples loses the features of one modality, each as likely as the others.

    Returns:
        What takes the hooks off again.
    """
    generator = torch.Generator().manual_seed(seed)
    count = len(model.encoders)
    chosen = torch.empty(0)

    def choose(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal chosen
        lost = torch.randint(count, (len(args[0]),), generator=generator)
        keeps_all = torch.rand(len(lost), generator=generator) >= p
        chosen = torch.where(keeps_all, count, lost).to(args[0].device)

    def drop(position: int, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not module.training:
            return None
        lost = (chosen == position).view(-1, *[1] * (output.dim() - 1))
        return output.masked_fill(lost, 0)

    handles = [model.register_forward_pre_hook(choose)]
    handles += [
        encoder.register_forward_hook(partial(drop, position))
        for position, encoder in enumerate(model.encoders.values())
    ]
    return tuple(handle.remove for handle in handles)
