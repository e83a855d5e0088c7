"""Small transformers: an encoder of sequences, and fusion by bottleneck tokens (MBT, Nagrani et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class SequenceEncoder(nn.Module):
    """Features `(B, width)` of sequences `(B, T, D)`: the mean over time after self-attention.

    Args:
        in_features: D.
        width: of the tokens.
        layers: of self-attention.
        length: longest T.
    """

    def __init__(self, in_features: int, width: int = 64, layers: int = 2, length: int = 64) -> None:
        super().__init__()
        self.out_features = width
        self.inward = nn.Linear(in_features, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        self.layers = nn.ModuleList(_layer(width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """A vector for each sample."""
        tokens = self.inward(x) + self.position[: x.shape[1]]
        for layer in self.layers:
            tokens = layer(tokens)
        return tokens.mean(dim=1)


class PatchEncoder(nn.Module):
    """Tokens `(B, N, width)` of pictures or spectrograms, after self-attention within the modality.

    Args:
        shape: `(C, H, W)` of the inputs, or `(C, T, H, W)`: then frames lie one under the other.
        width: of the tokens.
        patch: side of a patch.
        layers: of self-attention.
    """

    def __init__(self, shape: tuple[int, ...], width: int = 192, patch: int = 16, layers: int = 4) -> None:
        super().__init__()
        self.out_features = width
        self.cut = nn.Conv2d(shape[0], width, patch, stride=patch)
        height = shape[-2] * (shape[1] if len(shape) == 4 else 1)
        self.position = nn.Parameter(0.02 * torch.randn((height // patch) * (shape[-1] // patch), width))
        self.layers = nn.ModuleList(_layer(width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens of each sample."""
        x = x.flatten(2, 3) if x.dim() == 5 else x
        tokens = self.cut(x).flatten(2).transpose(1, 2) + self.position
        for layer in self.layers:
            tokens = layer(tokens)
        return tokens


class BottleneckClassifier(nn.Module):
    """Encoders of tokens, then layers in which modalities meet in a few bottleneck tokens only, then a linear head.

    Args:
        encoders: `PatchEncoder` for each modality, of one width.
        num_classes: C.
        bottlenecks: tokens between the modalities.
        layers: in which they meet.
    """

    def __init__(
        self, encoders: Mapping[str, PatchEncoder], num_classes: int, bottlenecks: int = 4, layers: int = 2
    ) -> None:
        super().__init__()
        width = next(iter(encoders.values())).out_features
        self.encoders = nn.ModuleDict(encoders)
        self.bottleneck = nn.Parameter(0.02 * torch.randn(bottlenecks, width))
        self.meetings = nn.ModuleList(
            nn.ModuleDict({name: _layer(width) for name in encoders}) for _ in range(layers)
        )
        self.head = nn.Linear(width * len(encoders), num_classes)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Logits `(B, C)` of the modalities' inputs, given in the order of `encoders`."""
        tokens = {name: encoder(x) for (name, encoder), x in zip(self.encoders.items(), inputs, strict=True)}
        shared = self.bottleneck.expand(len(inputs[0]), -1, -1)
        for meeting in self.meetings:
            assert isinstance(meeting, nn.ModuleDict)
            after = {name: meeting[name](torch.cat([own, shared], dim=1)) for name, own in tokens.items()}
            # Each modality has changed the bottleneck tokens in its own way: they meet in the mean.
            shared = torch.stack([x[:, tokens[name].shape[1] :] for name, x in after.items()]).mean(dim=0)
            tokens = {name: x[:, : tokens[name].shape[1]] for name, x in after.items()}
        logits: Tensor = self.head(torch.cat([x.mean(dim=1) for x in tokens.values()], dim=1))
        return logits


def _layer(width: int) -> nn.TransformerEncoderLayer:
    heads = max(1, width // 32)
    return nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.1, batch_first=True, norm_first=True)
