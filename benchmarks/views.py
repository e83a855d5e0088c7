"""What an 8x8 picture of a digit can be shown as. choose_views.py measures them in pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor


@dataclass(frozen=True)
class View:
    """How to make a view of pictures `(N, 1, 8, 8)`, and what it is for a reader.

    Args:
        of: the function.
        about: one line.
        per_feature: whether its numbers differ in scale, so that each is normalised by itself.
    """

    of: Callable[[Tensor], Tensor]
    about: str
    per_feature: bool = False


def _spectrum(pixels: Tensor) -> Tensor:
    """Log-magnitude of the 2-D Fourier transform, zero frequency in the middle of the left edge."""
    return torch.fft.fftshift(torch.fft.rfft2(pixels).abs(), dim=-2).log1p()


VIEWS: Mapping[str, View] = MappingProxyType(
    {
        "image": View(lambda x: x, "8x8 pixels: which strokes are where"),
        "spectrum": View(
            _spectrum, "strength of each spatial frequency: which strokes, but not where", per_feature=True
        ),
        "thumbnail": View(lambda x: torch.nn.functional.avg_pool2d(x, 2), "4x4 pixels"),
        "projections": View(
            lambda x: torch.cat([x.sum(dim=-1), x.sum(dim=-2)], dim=-1).flatten(1),
            "ink in each row and column",
            per_feature=True,
        ),
        "rows": View(lambda x: x.sum(dim=-1).flatten(1), "ink in each row", per_feature=True),
        "left": View(lambda x: x[..., :4], "left half"),
        "right": View(lambda x: x[..., 4:], "right half"),
        "top": View(lambda x: x[..., :3, :], "upper three rows"),
        "bottom": View(lambda x: x[..., 3:, :], "lower five rows"),
        "centre": View(lambda x: x[..., 2:6, 2:6], "middle 4x4 pixels"),
        "rim": View(
            lambda x: x.masked_fill(torch.nn.functional.pad(torch.ones(4, 4), (2, 2, 2, 2)) > 0, 0.0),
            "all but the middle 4x4 pixels",
        ),
        "across": View(lambda x: x.diff(dim=-1), "edges from left to right"),
        "down": View(lambda x: x.diff(dim=-2), "edges from top to bottom"),
    }
)
