"""G-Blending, written naively: the weights of heads from their losses before and after a super-epoch."""

from __future__ import annotations

from collections.abc import Sequence

Losses = Sequence[float]


def weights(t0: Losses, t1: Losses, v0: Losses, v1: Losses, *, floor: float) -> list[float]:
    gains = [max(before - after, 0.0) for before, after in zip(v0, v1, strict=True)]
    gaps = [abs((b - a) - (d - c)) for a, b, c, d in zip(t1, v1, t0, v0, strict=True)]
    least = floor * max(gaps)
    ratios = [gain / (max(gap, least) or 1) ** 2 for gain, gap in zip(gains, gaps, strict=True)]
    total = sum(ratios)
    return [ratio / total if total else 0.0 for ratio in ratios]
