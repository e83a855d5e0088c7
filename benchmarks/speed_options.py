"""What the parts of the speed benchmark are told."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        device: where.
        repetitions: of what takes milliseconds; parts that take seconds take fewer.
        base: kind of SGD that the methods wrap.
        cases: of `shapes.CASES`.
        batch: samples a step, where they do not matter.
        quick: small sizes, to see that everything runs.
    """

    device: torch.device
    repetitions: int = 15
    base: str = "fused"
    cases: tuple[str, ...] = ("two ResNet-18", "398 small tensors")
    batch: int = 64
    quick: bool = False
