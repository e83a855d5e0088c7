"""The vote of several predictions, written naively: one sample and one class after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence


def classes(logits: Sequence[Sequence[float]]) -> list[float]:
    """The probabilities of a sample: the geometric mean of the predictions' softmax, made to sum to 1."""
    parts = [[math.exp(x) / sum(map(math.exp, row)) for x in row] for row in logits]
    means = [math.prod(p[c] for p in parts) ** (1 / len(parts)) for c in range(len(parts[0]))]
    return [mean / sum(means) for mean in means]


def label(logits: Sequence[float]) -> float:
    """The probability of a label: the same, of the two sides that a sigmoid tells."""
    return classes([[x, 0.0] for x in logits])[0]
