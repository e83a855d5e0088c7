"""Small encoders, and a classifier that joins one for each modality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks.data import MultimodalData


class MLP(nn.Sequential):
    """Linear layers and ReLU on the flattened input."""

    def __init__(self, in_features: int, widths: Sequence[int] = (64, 32)) -> None:
        sizes = (in_features, *widths)
        layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
        super().__init__(nn.Flatten(), *layers)
        self.out_features = sizes[-1]


class ConvNet(nn.Sequential):
    """Three convolutions of stride 2 with BatchNorm and ReLU, then the mean over the picture."""

    def __init__(self, in_channels: int = 1, widths: Sequence[int] = (8, 16, 32)) -> None:
        sizes = (in_channels, *widths)
        blocks = [
            nn.Sequential(
                nn.Conv2d(*pair, kernel_size=3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(pair[1]),
                nn.ReLU(),
            )
            for pair in pairwise(sizes)
        ]
        super().__init__(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.out_features = sizes[-1]


class MultimodalClassifier(nn.Module):
    """One encoder for each modality, fused by a linear head.

    Args:
        encoders: a module with `out_features` for each modality.
        num_classes: C.
        fusion: `"concat"`: one linear head on all features; `"sum"`: the sum of each modality's own linear head.
    """

    def __init__(
        self,
        encoders: Mapping[str, nn.Module],
        num_classes: int,
        fusion: Literal["concat", "sum"] = "concat",
    ) -> None:
        super().__init__()
        if fusion not in ("concat", "sum"):
            raise ValueError(f"`fusion` should be 'concat' or 'sum'. Found {fusion!r}.")
        self.encoders = nn.ModuleDict(encoders)
        self.fusion = fusion
        widths = {name: int(encoder.out_features) for name, encoder in encoders.items()}  # type: ignore[arg-type]
        self.head: nn.Module
        if fusion == "concat":
            self.head = nn.Linear(sum(widths.values()), num_classes)
        else:
            self.head = nn.ModuleDict({name: nn.Linear(width, num_classes) for name, width in widths.items()})

    def forward(self, *inputs: Tensor) -> Tensor:
        """Logits `(B, C)` of the modalities' inputs, given in the order of `encoders`."""
        features = {
            name: encoder(x) for (name, encoder), x in zip(self.encoders.items(), inputs, strict=True)
        }
        if isinstance(self.head, nn.ModuleDict):
            return torch.stack([self.head[name](z) for name, z in features.items()]).sum(dim=0)
        logits: Tensor = self.head(torch.cat(list(features.values()), dim=1))
        return logits


def encoder_for(shape: Sequence[int]) -> nn.Module:
    """A small encoder for samples of this shape: convolutions where there is room to halve it three times."""
    if len(shape) == 3 and min(shape[1:]) >= 12:
        return ConvNet(shape[0])
    return MLP(prod(shape))


def classifier_for(data: MultimodalData, modalities: Sequence[str] | None = None) -> MultimodalClassifier:
    """An untrained model for the modalities of `data`, all by default."""
    chosen = data.modalities if modalities is None else modalities
    shapes = {name: data.train.inputs[name].shape[1:] for name in chosen}
    return MultimodalClassifier({name: encoder_for(s) for name, s in shapes.items()}, data.num_classes)
