"""How much each row of the joint loss counts, read back from its gradient at the logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from balanceopt.functional._labels import INVALID, recover_labels
from balanceopt.functional._targets import as_targets
from balanceopt.monitor._pass import Pass
from balanceopt.monitor._settle import two_classes

# How far float32 arithmetic of the user's loss may be from ours, in parts of an entry.
_TOLERANCE = 1e-3


class Rows(NamedTuple):
    """What the gradient of a cross-entropy loss says.

    Attributes:
        labels: `(B,)` class indices; -100 where a row does not count.
        scale: `(B,)` float64, factor of each row's cross-entropy in what is differentiated: 1/B of the mean loss, times
            a loss scale, a share of accumulated batches, a weight of the row's class.
        doubtful: 0-d, rows that are not a plain cross-entropy's, or too saturated to tell.
    """

    labels: Tensor
    scale: Tensor
    doubtful: Tensor


@torch.no_grad()
def rows_of(current: Pass, logits: Tensor, gradient: Tensor, ignore_index: int, *, recover: bool) -> Rows:
    r"""Labels and scales of a pass from the gradient `(B, C)` at its logits `(B, C)`.

    $$\frac{\partial L}{\partial \text{logits}_{ic}} = r_i (p_{ic} - 1[c = y_i])$$

    so \(r_i\) is the ratio of the sums of g and of p over the classes other than the label, which stays exact for
    saturated rows. Where all rows agree they share one r, taken over all of them.

    Raises:
        RuntimeError: if there are no labels, and they may not be recovered.
        ValueError: if labels are not class indices, one for each row.
    """
    g = torch.cat([-gradient, gradient], -1) if logits.shape[-1] == 1 else gradient
    pair = two_classes(logits)
    labels, doubtful, told = _labels(current, pair, g, ignore_index, recover)
    valid = labels != INVALID
    index = torch.where(valid, labels, 0).unsqueeze(1)
    onehot = torch.zeros_like(pair, dtype=torch.float64).scatter_(1, index, 1.0)
    exact = torch.isfinite(g).all(1, keepdim=True) & valid[:, None]
    slope = torch.where(exact, g.double(), 0)
    p = torch.where(exact, pair.double().softmax(1), 0)
    off, mass = (slope * (1 - onehot)).sum(1), (p * (1 - onehot)).sum(1)
    counted = exact[:, 0]
    shared = off.sum() / mass.sum().clamp(min=1e-300)
    own = off / mass.clamp(min=1e-300)
    fits_shared = _fits(slope, shared * torch.where(exact, p - onehot, 0), shared, gradient.dtype)
    fits_own = _fits(slope, own[:, None] * torch.where(exact, p - onehot, 0), own[:, None], gradient.dtype)
    uniform = (fits_shared | ~counted).all()
    scale = torch.where(counted, torch.where(uniform, shared, own), 0)
    doubtful = doubtful | (counted & ~torch.where(uniform, fits_shared, fits_own))
    if not told:
        # A row without any gradient: ignored, unless its label was so sure that the gradient vanished.
        silent = ~valid & torch.isfinite(gradient).all(1) & (gradient == 0).all(1) & (shared > 0)
        second = pair.double().softmax(1).topk(2, 1).values[:, 1]
        floor = torch.finfo(gradient.dtype).smallest_normal * torch.finfo(gradient.dtype).eps
        doubtful = doubtful | (silent & (shared * second <= 2 * floor))
    return Rows(labels, scale, doubtful.sum())


def _labels(
    current: Pass, pair: Tensor, g: Tensor, ignore_index: int, recover: bool
) -> tuple[Tensor, Tensor, bool]:
    """Class indices with -100 for rows that don't count, doubtful rows, and whether the labels were given."""
    none = torch.zeros(len(pair), dtype=torch.bool, device=pair.device)
    if current.labels is not None:
        given = current.labels.to(pair.device)
        if given.dim() > 1 and given.shape[-1] > 1 and given.is_floating_point():
            raise ValueError(
                "inject=True without `loss=` needs labels that are class indices. Found soft labels "
                f"{tuple(given.shape)}: pass `loss=`, the loss module that your loop calls."
            )
        targets = as_targets(_flat(given, len(pair)), pair.shape[1], ignore_index)
        assert targets.index is not None
        return torch.where(targets.valid, targets.index, INVALID), none, True
    if not recover:
        raise RuntimeError(
            "inject=True needs the labels by the time of backward: call monitor.observe(labels) before it, or pass "
            "`loss=`, the loss module that your loop calls."
        )
    read = recover_labels(g, pair)
    unknown = (read.labels == INVALID) & torch.isfinite(g).all(1) & (g != 0).any(1)
    return read.labels, read.ambiguous | unknown, False


def _flat(labels: Tensor, rows: int) -> Tensor:
    flat = labels.flatten().long()
    if len(flat) != rows:
        raise ValueError(
            f"labels should have one entry for each of the {rows} rows of the logits. Found {tuple(labels.shape)}."
        )
    return flat


def _fits(slope: Tensor, model: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether rows of gradients are the model's, up to rounding `(B,)`."""
    info = torch.finfo(dtype)
    # The label's entry is p - 1, rounded where p is near 1; the smallest numbers lose digits.
    floor = 16 * torch.finfo(torch.float32).eps * scale.abs() + 4 * info.smallest_normal * info.eps
    allowed = max(_TOLERANCE, 4 * info.eps) * model.abs() + floor
    return ((slope - model).abs() <= allowed).all(1)
