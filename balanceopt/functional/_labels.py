"""Recovery of labels and of each row's scale from the gradient of a cross-entropy loss at the logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from balanceopt._options import check_number, check_tensor
from balanceopt.functional._dtypes import wide
from balanceopt.functional._targets import as_targets

INVALID = -100

# Entries this much smaller than a row's largest one are rounding errors, whose sign means nothing.
_CLEAR = 1e-6
# Relative tolerance for the float32 arithmetic of the user's loss.
_TOLERANCE = 1e-3
# With fewer classes a line through the non-label entries can't identify the label.
_FEWEST_FOR_LINE = 4


class RecoveredLabels(NamedTuple):
    """The result of `recover_labels`.

    Attributes:
        labels: int64 `(B,)`; -100 where the label can't be recovered.
        ambiguous: bool `(B,)`, rows with several clearly negative entries: not a hard-label cross-entropy alone.
    """

    labels: Tensor
    ambiguous: Tensor


class RecoveredScale(NamedTuple):
    """The result of `recover_scale`.

    Attributes:
        scale: float64 `(B,)`, each row's factor; 0 where the label is -100 or the gradient is not finite.
        doubtful: bool `(B,)`, labelled rows whose gradient does not fit a plain cross-entropy.
        vanished: bool `(B,)`, unlabelled rows whose gradient is 0, perhaps by underflow alone.
    """

    scale: Tensor
    doubtful: Tensor
    vanished: Tensor


@torch.no_grad()
def recover_labels(grad: Tensor, logits: Tensor, label_smoothing: float = 0.0) -> RecoveredLabels:
    r"""Recover the labels of a batch from the gradient of the batch's cross-entropy loss.

    $$\frac{\partial L}{\partial \text{logits}_{ic}} = s_i \left(p_{ic} - 1[c = y_i]\right), \quad s_i > 0$$

    so the only negative entry of a row is the label's, whatever the loss scale, the sample's weight or the number of
    micro-batches. A row that is all zero or not finite has no label (ignored, of zero weight, or underflowed). One
    clearly negative entry is the label; without one, the most probable class is the label if its gradient is rounded
    to zero. Several negative entries mean label smoothing \(\epsilon\) or another term on the logits: the entries
    other than the label's lie on the line \(s (p - \epsilon / C)\), and the label is the class whose removal leaves
    the best line; with C <= 3 no line is determined, and the row has no label. Where \(\epsilon\) is known, the label
    is the one class for which the gradient is parallel to \(p - (1 - \epsilon) 1[c = y] - \epsilon / C\), for any C; a
    row that fits several classes has no label.

    Args:
        grad: `(B, C)`, gradient of the loss with respect to `logits`, at any positive scale.
        logits: `(B, C)`, the joint logits.
        label_smoothing: \(\epsilon\) of the loss, if known; 0 for none or an unknown one.

    Returns:
        `RecoveredLabels(labels, ambiguous)`.

    Raises:
        ValueError: if the shapes differ or are not `(B, C)` with C >= 2, the numbers are complex, or `label_smoothing`
            is not in [0, 1].
        TypeError: if `grad` or `logits` is not a tensor.

    Example:
        >>> logits = torch.tensor([[0.0, 1.0, 2.0]], requires_grad=True)
        >>> torch.nn.functional.cross_entropy(logits, torch.tensor([1])).backward()
        >>> recover_labels(logits.grad, logits).labels
        tensor([1])

    Reference:
        ours (docs/concepts.md); the papers' code needs the labels in the loop.
    """
    _check_pair(grad, logits)
    check_number("label_smoothing", label_smoothing, at_least=0, at_most=1)
    grad = grad if grad.is_floating_point() else wide(grad)
    where = _with_float64(grad.device)
    g, z, rounding = grad.to(where).double(), logits.to(where).double(), torch.finfo(grad.dtype).eps
    result = _read(g, z, rounding)
    if label_smoothing:
        result = _read_smoothed(g, z, rounding, label_smoothing, *result)
    return RecoveredLabels(*(x.to(grad.device) for x in result))


@torch.no_grad()
def recover_scale(grad: Tensor, logits: Tensor, labels: Tensor) -> RecoveredScale:
    r"""Recover each row's scale in a cross-entropy loss from the loss's gradient.

    $$\frac{\partial L}{\partial \text{logits}_{ic}} = s_i \left(p_{ic} - 1[c = y_i]\right)$$

    so \(s_i\) is the ratio of the sums of the gradient and of p over the classes other than the label, which stays
    exact for saturated rows: 1/B of the mean loss, times a loss scale, a share of accumulated batches, a weight of the
    row's class. Where all rows agree, one scale is computed from all of them.

    Args:
        grad: `(B, C)`, gradient of the loss with respect to `logits`.
        logits: `(B, C)`, the joint logits.
        labels: int64 `(B,)` class indices; -100 for rows to ignore.

    Returns:
        `RecoveredScale(scale, doubtful, vanished)`, on the device of `logits`; the scale in float32 where the device
        has no float64.

    Raises:
        ValueError: if `grad` and `logits` are not both `(B, C)` with C >= 2, `labels` are not integers `(B,)`, or lie
            outside [0, C) (checked only where that needs no device synchronisation).
        TypeError: if `grad`, `logits` or `labels` is not a tensor.

    Example:
        >>> logits = torch.tensor([[0.0, 1.0, 2.0]], requires_grad=True)
        >>> (0.5 * torch.nn.functional.cross_entropy(logits, torch.tensor([1]))).backward()
        >>> recover_scale(logits.grad, logits, torch.tensor([1])).scale
        tensor([0.5000], dtype=torch.float64)

    Reference:
        ours (docs/methods/unimodal.md).
    """
    _check_pair(grad, logits)
    check_tensor("labels", labels, f"({len(grad)},)", dims=(1,), kind="integer")
    if len(labels) != len(grad):
        raise ValueError(
            f"`labels` should have one entry for each of the {len(grad)} rows. Found {len(labels)}."
        )
    targets = as_targets(labels, grad.shape[1], INVALID)
    assert targets.index is not None
    labels = torch.where(targets.valid, targets.index, INVALID)
    grad = grad if grad.is_floating_point() else wide(grad)
    where = _with_float64(logits.device)
    info = torch.finfo(grad.dtype)
    finite = torch.isfinite(grad).all(1).to(where)
    zero = (grad == 0).all(1).to(where)
    labels = labels.to(where)
    counted = finite & (labels != INVALID)
    g = torch.where(counted[:, None], grad.to(where).double(), 0)
    probabilities = logits.to(where).double().softmax(1)
    p = torch.where(counted[:, None], probabilities, 0)
    label = torch.zeros_like(g).scatter_(1, torch.where(counted, labels, 0)[:, None], 1.0)
    off, mass = (g * (1 - label)).sum(1), (p * (1 - label)).sum(1)
    shared = off.sum() / mass.sum().clamp(min=1e-300)
    by_row = off / mass.clamp(min=1e-300)
    direction = torch.where(counted[:, None], p - label, 0)
    fits_shared, fits_by_row = (_fits(g, s * direction, s, info) for s in (shared, by_row[:, None]))
    uniform = (fits_shared | ~counted).all()
    scale = torch.where(counted, torch.where(uniform, shared, by_row), 0)
    doubtful = counted & ~torch.where(uniform, fits_shared, fits_by_row)
    # A row without a gradient was ignored, unless its label is so probable that the gradient underflowed.
    second = probabilities.topk(2, 1).values[:, 1]
    vanishing = shared * second <= 2 * info.smallest_normal * info.eps
    vanished = (labels == INVALID) & finite & zero & (shared > 0) & vanishing
    scale = scale.to(torch.float32 if where != logits.device else scale.dtype)
    return RecoveredScale(*(x.to(logits.device) for x in (scale, doubtful, vanished)))


def _check_pair(grad: Tensor, logits: Tensor) -> None:
    for name, values in (("grad", grad), ("logits", logits)):
        check_tensor(name, values, "(B, C)")
    if grad.shape != logits.shape or grad.dim() != 2 or grad.shape[1] < 2:
        raise ValueError(
            "`grad` and `logits` should have the same shape (B, C), C >= 2. "
            f"Found {tuple(grad.shape)} and {tuple(logits.shape)}."
        )


def _with_float64(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "mps" else device


def _fits(g: Tensor, model: Tensor, scale: Tensor, info: torch.finfo) -> Tensor:
    """Whether each row's gradient fits the model up to rounding, bool `(B,)`."""
    # The label's entry is p - 1, rounded where p is near 1, and subnormal numbers lose digits.
    floor = 16 * torch.finfo(torch.float32).eps * scale.abs() + 4 * info.smallest_normal * info.eps
    allowed = max(_TOLERANCE, 4 * info.eps) * model.abs() + floor
    return ((g - model).abs() <= allowed).all(1)


def _read(g: Tensor, logits: Tensor, rounding: float) -> tuple[Tensor, Tensor]:
    """Recover labels and ambiguous rows from gradients with a relative error of `rounding`."""
    largest = g.abs().amax(1, keepdim=True)
    usable = (torch.isfinite(largest) & (largest > 0)).squeeze(1)
    g = torch.where(usable.unsqueeze(1), g / largest, 0)
    p = logits.softmax(1)
    negatives = (g < -_CLEAR).sum(1)
    several = negatives > 1

    most_probable = p.argmax(1)
    memorised = g.gather(1, most_probable.unsqueeze(1)).squeeze(1).abs() <= _CLEAR
    readable = usable & ((negatives == 1) | ((negatives == 0) & memorised))
    labels = torch.where(negatives == 0, most_probable, g.argmin(1))
    if g.shape[1] >= _FEWEST_FOR_LINE:
        # Under label smoothing the only negative entry can be another class's; then the rest is not proportional to p.
        doubtful = (negatives == 1) & ~_proportional_without(labels, g, p, rounding)
        needed = several | doubtful
        if needed.device.type != "cpu" or needed.numpy().any():  # a look at a device would synchronise
            off_the_line, exact = _label_off_the_line(g, p, rounding)
            labels = torch.where(several | doubtful & exact, off_the_line, labels)
        readable |= usable & several
    return torch.where(readable, labels, INVALID), usable & several


def _read_smoothed(
    g: Tensor, logits: Tensor, rounding: float, smoothing: float, labels: Tensor, ambiguous: Tensor
) -> tuple[Tensor, Tensor]:
    """Replace labels and ambiguous flags of rows whose gradient fits a known label smoothing."""
    largest = g.abs().amax(1, keepdim=True)
    usable = (torch.isfinite(largest) & (largest > 0)).squeeze(1)
    g = torch.where(usable.unsqueeze(1), g / largest, 0)
    h = logits.softmax(1) - smoothing / g.shape[1]
    # Inner products with the residual h - (1 - smoothing) 1[c = y] of each class y in turn.
    along = (g * h).sum(1, keepdim=True) - (1 - smoothing) * g
    squares = (h * h).sum(1, keepdim=True) - 2 * (1 - smoothing) * h + (1 - smoothing) ** 2
    size = (g * g).sum(1, keepdim=True)
    across = size - along.clamp(min=0) ** 2 / squares.clamp(min=1e-300)
    parallel = across <= max(_TOLERANCE, 4 * rounding) ** 2 * size
    fits = torch.where(usable, parallel.sum(1), 0)
    labels = torch.where(fits > 0, torch.where(fits == 1, across.argmin(1), INVALID), labels)
    return labels, ambiguous & (fits == 0)


def _proportional_without(label: Tensor, g: Tensor, p: Tensor, rounding: float) -> Tensor:
    """Whether g = s p for all classes but `label`, as under plain cross-entropy, bool `(B,)`."""
    rest = torch.ones_like(p).scatter_(1, label.unsqueeze(1), 0)
    g, p = g * rest, p * rest
    s = (g * p).sum(1, keepdim=True) / (p * p).sum(1, keepdim=True).clamp(min=1e-300)
    return ((g - s * p) ** 2).sum(1) <= max(1e-9, (4 * rounding) ** 2) * (g * g).sum(1)


def _label_off_the_line(g: Tensor, p: Tensor, rounding: float) -> tuple[Tensor, Tensor]:
    """Find the class whose removal leaves a row's points (p, g) best on a line, relative to the class's distance below.

    Returns the class `(B,)` and whether the line is exact up to rounding `(B,)`.
    """
    n = g.shape[1] - 1
    # Each class in turn is left out, as a total minus one term.
    mean_p, mean_g = ((x.sum(1, keepdim=True) - x) / n for x in (p, g))
    spread_p = (p * p).sum(1, keepdim=True) - p * p - n * mean_p**2
    spread_g = (g * g).sum(1, keepdim=True) - g * g - n * mean_g**2
    both = (p * g).sum(1, keepdim=True) - p * g - n * mean_p * mean_g
    noise = n * (rounding * mean_g) ** 2 + 1e-16
    # A saturated row's probabilities are too close together for a slope in the rounded gradient.
    flat = spread_p <= noise
    slope = torch.where(flat, 0, both / spread_p.clamp(min=1e-300))
    residual = (spread_g - slope * both).clamp(min=0)
    below = (mean_g + slope * (p - mean_p) - g).clamp(min=1e-150)
    cost = torch.where(flat, residual, (residual + noise) / below**2)
    best, label = cost.min(1)
    return label, (best <= 1e-12) & ~flat.gather(1, label.unsqueeze(1)).squeeze(1)
