"""TCMax's loss, written naively: all combinations of the batch's samples, one for each modality, and all classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

Rows = Sequence[Sequence[float]]


def total_correlation_loss(logits: Sequence[Rows], labels: Sequence[int]) -> float:
    """Of M modalities' logits, B rows of C each."""
    size, classes = len(labels), len(logits[0][0])
    joint = sum(sum(rows[i][y] for rows in logits) for i, y in enumerate(labels)) / size
    combinations = product(range(size), repeat=len(logits))
    total = sum(
        math.exp(sum(rows[j][y] for rows, j in zip(logits, chosen, strict=True)))
        for chosen in combinations
        for y in range(classes)
    )
    return math.log(total) - joint - math.log(size)
