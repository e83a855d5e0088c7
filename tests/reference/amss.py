"""The rules of AMSS and AMSS+ written out naively, in floats and loops."""

from __future__ import annotations

import itertools
import math


def keep_ratio(u: list[float], temperature: float, low: float, high: float) -> list[float]:
    if len(u) == 1:
        return [1.0]
    if any(not math.isfinite(x) or x <= 0 for x in u):
        return [(len(u) - 1) / len(u)] * len(u)
    weights = [math.exp(x / temperature) for x in u]
    return [min(high, max(low, 1 - w / sum(weights))) for w in weights]


def keep_ratio_of_two(u_audio: float, u_visual: float, temperature: float) -> tuple[float, float]:
    """The published code's form for two modalities, before its clamp."""
    audio = math.exp(u_visual / temperature)
    audio /= math.exp(u_audio / temperature) + math.exp(u_visual / temperature)
    return audio, 1 - audio


def unit_importance(grad: list[list[float]]) -> list[float]:
    return [sum(g * g for g in unit) for unit in grad]


def successive_inclusion(importance: list[float], k: int) -> list[float]:
    """P(unit j is among k successive draws without replacement), over all orders of the draws."""
    inclusion = [0.0] * len(importance)
    for order in itertools.permutations(range(len(importance)), k):
        probability, left = 1.0, sum(importance)
        for j in order:
            probability *= importance[j] / left
            left -= importance[j]
        for j in order:
            inclusion[j] += probability
    return inclusion


def capped_probabilities(s: list[float], budget: float) -> list[float]:
    """min(1, c s) that sum to the budget, by capping until nothing changes."""
    if budget >= sum(x > 0 for x in s):
        return [float(x > 0) for x in s]
    capped: set[int] = set()
    while True:
        c = (budget - len(capped)) / sum(x for j, x in enumerate(s) if j not in capped)
        more = {j for j, x in enumerate(s) if j not in capped and c * x >= 1}
        if not more:
            return [1.0 if j in capped else c * x for j, x in enumerate(s)]
        capped |= more


def systematic_sample(pi: list[float], order: list[int], u: float) -> list[bool]:
    """Units, laid end to end in an order, that hold one of the points u, u + 1, ..."""
    taken, end = [False] * len(pi), 0.0
    for j in order:
        begin, end = end, end + pi[j]
        taken[j] = math.ceil(end - u) > math.ceil(begin - u)
    return taken
