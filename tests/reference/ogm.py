"""OGM-GE's formulas, written as naively as they stand in the papers: one sample, one class, one number at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor


def logits_eq8(z: Tensor, weight: Tensor, bias: Tensor | None, modalities: int) -> list[float]:
    """CVPR 2022, Eq. 8: one sample's `W^m z^m + b / M`."""
    joint = []
    for c in range(weight.shape[0]):
        total = sum(float(weight[c, d]) * float(z[d]) for d in range(z.shape[0]))
        joint.append(total + (0.0 if bias is None else float(bias[c]) / modalities))
    return joint


def softmax(logits: Sequence[float]) -> list[float]:
    powers = [math.exp(x - max(logits)) for x in logits]
    return [x / sum(powers) for x in powers]


def score_eq8(z: Tensor, weight: Tensor, bias: Tensor | None, modalities: int, labels: Tensor) -> float:
    """Sum over the batch of `softmax(...)[y_i]`."""
    total = 0.0
    for row, label in zip(z, labels.tolist(), strict=True):
        if label != -100:
            total += softmax(logits_eq8(row, weight, bias, modalities))[label]
    return total


def ratio_eq9(score_v: float, score_a: float) -> tuple[float, float]:
    """CVPR 2022, Eq. 9."""
    return score_v / score_a, score_a / score_v


def ratios_eq7(scores: Sequence[float]) -> list[float]:
    """TPAMI 2024, Eq. 7: the mean of the ratios to each of the others."""
    m = len(scores)
    return [sum(scores[i] / scores[j] for j in range(m) if j != i) / (m - 1) for i in range(m)]


def coefficient_a(ratio: float, alpha: float) -> float:
    """CVPR 2022, Eq. 10."""
    return 1 - math.tanh(alpha * ratio) if ratio > 1 else 1.0


def coefficient_b(ratio: float, alpha: float) -> float:
    """The code as first released."""
    return 1 - math.tanh(alpha * max(ratio - 1, 0))


def coefficient_c(ratio: float, alpha: float) -> float:
    """TPAMI 2024, Eq. 11; alpha <= 1."""
    return 1 - alpha * math.tanh(ratio - 1) if ratio > 1 else 1.0


def noise_std(grad: Tensor) -> float:
    """GE: the standard deviation of one gradient tensor's elements, over n."""
    numbers = [float(x) for x in grad.flatten()]
    mean = sum(numbers) / len(numbers)
    return math.sqrt(sum((x - mean) ** 2 for x in numbers) / len(numbers))
