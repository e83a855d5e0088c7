"""The score of every loss, written naively: one modality, sample, position and class at a time, in Python floats."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from tests.reference.ogm import softmax

Nested = Any  # nested lists of floats


def leaves(x: Nested) -> list[float]:
    return [leaf for part in x for leaf in leaves(part)] if isinstance(x, list) else [float(x)]


def positions_of(sample: Nested) -> list[list[float]]:
    """A sample (C, ...) as one list of C numbers for each position."""
    by_class = [leaves(c) for c in sample]
    return [[c[p] for c in by_class] for p in range(len(by_class[0]))]


def log_softmax(logits: Sequence[float]) -> list[float]:
    return [math.log(p) for p in softmax(logits)]


def soft_label(label: Nested, classes: int, smoothing: float) -> list[float]:
    hard = label if isinstance(label, list) else [float(c == label) for c in range(classes)]
    return [(1 - smoothing) * p + smoothing / classes for p in hard]


def cross_entropy(
    sample: Nested,
    label: Nested,
    *,
    soft: bool = False,
    ignore_index: int = -100,
    weight: Sequence[float] | None = None,
    smoothing: float = 0.0,
) -> float | None:
    """A sample's loss; None where no position counts."""
    rows = positions_of(sample)
    labels: list[Any] = positions_of(label) if soft else [int(x) for x in leaves(label)]
    total = mass = 0.0
    for row, y in zip(rows, labels, strict=True):
        if y == ignore_index:
            continue
        for c, p in enumerate(soft_label(y, len(row), smoothing)):
            w = 1.0 if weight is None else weight[c]
            if w * p:
                total -= w * p * log_softmax(row)[c]
                mass += w * p
    return total / mass if mass else None


def binary_cross_entropy(
    sample: Nested,
    label: Nested,
    weight: Sequence[float] | None = None,
    pos_weight: Sequence[float] | None = None,
) -> float | None:
    """The mean over C labels, each as often as its weights say."""
    total = mass = 0.0
    for c, (z, y) in enumerate(zip(leaves(sample), leaves(label), strict=True)):
        if math.isnan(y):
            continue
        w = 1.0 if weight is None else weight[c]
        positive = w * y * (1.0 if pos_weight is None else pos_weight[c])
        negative = w * (1 - y)
        p = 1 / (1 + math.exp(-z))
        total -= (positive * math.log(p) if positive else 0) + (negative * math.log(1 - p) if negative else 0)
        mass += positive + negative
    return total / mass if mass else None


def square(f: float, y: float) -> float:
    return (f - y) ** 2


def distance(f: float, y: float) -> float:
    return abs(f - y)


def huber(delta: float) -> Callable[[float, float], float]:
    return lambda f, y: (f - y) ** 2 / 2 if abs(f - y) <= delta else delta * (abs(f - y) - delta / 2)


def smooth(beta: float) -> Callable[[float, float], float]:
    return lambda f, y: huber(beta)(f, y) / beta if beta else abs(f - y)


def regression(sample: Nested, target: Nested, of: Callable[[float, float], float]) -> float | None:
    """The mean over the entries with a target; None where all are NaN."""
    pairs = [(f, y) for f, y in zip(leaves(sample), leaves(target), strict=True) if not math.isnan(y)]
    return sum(of(f, y) for f, y in pairs) / len(pairs) if pairs else None


def regression_baseline(targets: Nested, of: Callable[[float, float], float]) -> float:
    """The loss of each output's best mean (MSE), or median, over samples and positions with a target."""
    samples = [positions_of(t) if isinstance(t, list) else [[t]] for t in targets]
    entries = []  # output, target, part of its sample
    for rows in samples:
        known = [(k, y) for row in rows for k, y in enumerate(row) if not math.isnan(y)]
        entries.append([(k, y, 1 / len(known)) for k, y in known])
    flat = [entry for sample in entries for entry in sample]
    constant = {}
    for k in {k for k, _, _ in flat}:
        own = [(y, w) for output, y, w in flat if output == k]
        mean = sum(w * y for y, w in own) / sum(w for _, w in own)
        constant[k] = mean if of is square else statistics.median(y for y, _ in own)
    return statistics.fmean(sum(w * of(constant[k], y) for k, y, w in sample) for sample in entries if sample)


def entropy(frequencies: Sequence[float]) -> float:
    return -sum(p * math.log(p) for p in frequencies if p > 0)


def score(loss: float | None, scale: float = 1.0) -> float:
    return 0.0 if loss is None else math.exp(-loss / scale)
