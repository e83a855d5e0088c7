"""ResNet-18 (He et al. 2016) without its classifier, for pictures, clips, flow and spectrograms."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = _convolution(inputs, outputs, 3, stride)
        self.second = _convolution(outputs, outputs, 3, 1)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else _convolution(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` to `(B, C', H / stride, W / stride)`."""
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


class ResNet18(nn.Module):
    """Features `(B, 8 width)` of `(B, C, H, W)`, or of `(B, C, T, H, W)` by the mean over T.

    Args:
        in_channels: C.
        width: channels of the first stage; 64 in the original.
    """

    def __init__(self, in_channels: int = 3, width: int = 64) -> None:
        super().__init__()
        self.out_features = 8 * width
        self.stem = nn.Sequential(
            _convolution(in_channels, width, 7, 2), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1)
        )
        widths = (width, width, 2 * width, 4 * width, 8 * width)
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    BasicBlock(inputs, outputs, 1 if i == 0 else 2), BasicBlock(outputs, outputs, 1)
                )
                for i, (inputs, outputs) in enumerate(pairwise(widths))
            )
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """A vector for each sample."""
        if x.dim() == 4:
            features: Tensor = self.stages(self.stem(x)).mean(dim=(2, 3))
            return features
        frames = x.transpose(1, 2)
        features = self.stages(self.stem(frames.flatten(0, 1))).mean(dim=(2, 3))
        return features.unflatten(0, frames.shape[:2]).mean(dim=1)


def _convolution(inputs: int, outputs: int, size: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))
