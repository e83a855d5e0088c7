"""The rules of Diagnosing & Re-learning written out naively, in numpy and loops."""

from __future__ import annotations

import math

import numpy as np


def nearest(x: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Eq. 1."""
    return np.array([np.argmin([((row - c) ** 2).sum() for c in centroids]) for row in x])


def lloyd(x: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eq. 1 and 2 until no assignment changes; no cluster may lose all its rows."""
    labels = np.full(len(x), -1)
    while True:
        previous, labels = labels, nearest(x, centroids)
        if (labels == previous).all():
            return labels, centroids
        centroids = np.stack([x[labels == m].mean(0) for m in range(len(centroids))])


def purity(assignments: list[int], labels: list[int]) -> float:
    """Eq. 3."""
    hits = 0
    for cluster in set(assignments):
        classes = [y for a, y in zip(assignments, labels, strict=True) if a == cluster]
        hits += max(classes.count(y) for y in set(classes))
    return hits / len(labels)


def minmax(x: np.ndarray) -> np.ndarray:
    """To (-1, 1), a range of 0 taken as 1."""
    spread = x.max(0) - x.min(0)
    return 2 * (x - x.min(0)) / np.where(spread == 0, 1, spread) - 1


def strength(purity_train: float, purity_val: float, lam: float) -> float:
    """Eq. 4 and 5."""
    return math.tanh(lam * abs(purity_train - purity_val))


def reinit(current: float, initial: float, alpha: float) -> float:
    """Eq. 6."""
    return (1 - alpha) * current + alpha * initial
