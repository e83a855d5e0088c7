"""MLB's rule (Kontras et al., BMVC 2024), written naively in Python's floats."""

from __future__ import annotations

import math
from collections.abc import Sequence


def coefficients(scores: Sequence[float], alpha: float, beta: float) -> list[float]:
    result = []
    for index, own in enumerate(scores):
        others = [score for other, score in enumerate(scores) if other != index]
        ratio = sum(others) / len(others) / own
        reach = beta - 1 if ratio > 1 else 1
        result.append(1 + reach * math.tanh(alpha * (ratio - 1)))
    return result
