"""Uni-modal predictions of a model, from its parameters and inputs alone, one number at a time, and their scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from tests.reference import losses as naive
from tests.reference.ogm import softmax

Vector = list[float]
Rows = list[Vector]
# A prediction of each sample: (C,) numbers, or those of each position.
Answers = list[Any]


def affine(weight: Tensor, bias: Sequence[float] | None, x: Vector) -> Vector:
    totals = [0.0] * len(weight) if bias is None else list(bias)
    for c, row in enumerate(weight.tolist()):
        for w, z in zip(row, x, strict=True):
            totals[c] += w * z
    return totals


def layers(module: nn.Module, x: Vector) -> Vector:
    """What linear layers and tanh make of one vector."""
    if isinstance(module, nn.Sequential):
        for layer in module:
            x = layers(layer, x)
        return x
    if isinstance(module, nn.Linear):
        return affine(module.weight, None if module.bias is None else module.bias.tolist(), x)
    assert isinstance(module, nn.Tanh)
    return [math.tanh(z) for z in x]


def joined(parts: Sequence[Vector]) -> Vector:
    return [x for part in parts for x in part]


def split(head: nn.Linear, features: Sequence[Rows]) -> list[Rows]:
    """`W^m z^m + b / M` for features that stand in the head's input in this order."""
    found, start = [], 0
    share = None if head.bias is None else [b / len(features) for b in head.bias.tolist()]
    for rows in features:
        width = len(rows[0])
        weight = head.weight[:, start : start + width]
        found.append([affine(weight, share, z) for z in rows])
        start += width
    return found


def per_head(heads: Sequence[nn.Module], features: Sequence[Rows]) -> list[Rows]:
    return [[layers(head, z) for z in rows] for head, rows in zip(heads, features, strict=True)]


def mean_row(rows: Rows) -> Vector:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def zero_out(fuse: Callable[[Sequence[Vector]], Vector], features: Sequence[Rows], fill: str) -> list[Rows]:
    """What the fusion makes of each modality, beside zeros or the others' mean over the batch."""
    others = [mean_row(rows) if fill == "mean" else [0.0] * len(rows[0]) for rows in features]
    return [
        [
            fuse([z if n == m else other for n, other in enumerate(others)])
            for z in rows
        ]
        for m, rows in enumerate(features)
    ]  # fmt: skip


def centred(
    unimodal: Sequence[Rows], joint: Rows, present: Sequence[Sequence[bool]] | None = None
) -> list[Rows]:
    """Each part beside the mean of the others' parts, over the samples that have the modality."""
    found = []
    for m, rows in enumerate(unimodal):
        having = [i for i in range(len(rows)) if present is None or present[m][i]]
        rest = [[f - own for f, own in zip(joint[i], rows[i], strict=True)] for i in having]
        shift = mean_row(rest) if rest else [0.0] * len(rows[0])
        found.append([[own + s for own, s in zip(row, shift, strict=True)] for row in rows])
    return found


def entropy_of(z: Vector) -> float:
    return naive.entropy(softmax(z))


def sums(
    unimodal: Sequence[Answers],
    targets: Sequence[Any],
    loss_of: Callable[[Any, Any], float | None],
    scale: float | None = 1.0,
    present: Sequence[Sequence[bool]] | None = None,
) -> dict[str, Vector]:
    """The sums over samples of score, count and loss of each modality; without a `scale` it is the mean loss."""
    found = [[loss_of(f, y) for f, y in zip(rows, targets, strict=True)] for rows in unimodal]
    counted = [
        [x for i, x in enumerate(row) if x is not None and (present is None or present[m][i])]
        for m, row in enumerate(found)
    ]
    if scale is None:
        scale = sum(map(sum, counted)) / sum(map(len, counted))
    return {
        "score": [sum(naive.score(x, scale) for x in row) for row in counted],
        "count": [float(len(row)) for row in counted],
        "cross_entropy": [sum(x / scale for x in row) for row in counted],
    }
