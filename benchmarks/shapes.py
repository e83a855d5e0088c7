"""Models that are nothing but parameters of realistic shapes, behind encoders small enough not to be timed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]
FEATURES, INPUTS = 8, 4


def resnet18() -> list[Shape]:
    """The parameters of a ResNet-18 encoder: 11.2M in 61 tensors and a little."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    before = 64
    for width in (64, 128, 256, 512):
        for block in range(2):
            first = before if block == 0 else width
            shapes += [(width, first, 3, 3), (width,), (width,), (width, width, 3, 3), (width,), (width,)]
            if block == 0 and first != width:
                shapes += [(width, first, 1, 1), (width,), (width,)]
        before = width
    return shapes


def many_small() -> list[Shape]:
    """199 tensors of a few thousand elements."""
    layer: list[Shape] = [(32, 16, 3, 3), (32,), (64, 48)]
    return layer * 66 + [(64, 64)]


def transformer(width: int = 1024, layers: int = 8) -> list[Shape]:
    """A transformer encoder's matrices: about 100M in the default size."""
    return [
        shape
        for _ in range(layers)
        for shape in ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width))
    ]


def of_size(millions: int) -> list[Shape]:
    """An encoder's matrices of 512 x 1024: about so many million parameters, for two such encoders together."""
    return [(512, 1024)] * millions


CASES = {"two ResNet-18": resnet18, "398 small tensors": many_small, "200M parameters": transformer}


class Encoder(nn.Module):
    """Realistic parameters that no forward uses, and a small linear map that it does."""

    def __init__(self, shapes: list[Shape]) -> None:
        super().__init__()
        self.used = nn.Linear(INPUTS, FEATURES)
        self.carried = nn.ParameterList(torch.randn(shape) * 0.02 for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class Model(nn.Module):
    """Such encoders, two unless asked for more, and a linear head."""

    def __init__(self, shapes: list[Shape], classes: int = 6, modalities: int = 2) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({f"m{i}": Encoder(shapes) for i in range(modalities)})
        self.head = nn.Linear(modalities * FEATURES, classes)

    @property
    def modalities(self) -> dict[str, Encoder]:
        """Encoders by name."""
        return dict(self.encoders.items())  # type: ignore[arg-type]

    def forward(self, *inputs: Tensor) -> Tensor:
        pairs = zip(self.encoders.values(), inputs, strict=True)
        return self.head(torch.cat([encoder(x) for encoder, x in pairs], 1))

    def carried(self) -> Iterator[nn.Parameter]:
        """The parameters whose gradients are given, not computed."""
        for encoder in self.modalities.values():
            yield from encoder.carried
