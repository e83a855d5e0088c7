"""Modality dropout, written naively: one sample after the other, from the numbers that were drawn for it."""

from __future__ import annotations

from collections.abc import Sequence


def independent(p: Sequence[float], numbers: Sequence[float], present: Sequence[bool]) -> list[bool]:
    """The modalities that a sample keeps: lost with probability p, and one is spared where all would be lost."""
    kept = [u >= rate for u, rate in zip(numbers, p, strict=True)]
    if not any(k and here for k, here in zip(kept, present, strict=True)):
        had = [m for m, here in enumerate(present) if here]
        kept[max(had, key=lambda m: numbers[m] / p[m])] = True
    return kept


def equal(number: float, present: Sequence[bool]) -> list[bool]:
    """The modalities that a sample keeps: all in the first part of [0, 1), else all but one of those that it has."""
    had = [m for m, here in enumerate(present) if here]
    case = int(number * (len(had) + 1))
    lost = had[case - 1] if case > 0 and len(had) > 1 else None
    return [m != lost for m in range(len(present))]
