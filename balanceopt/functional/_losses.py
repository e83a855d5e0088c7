"""Losses as scores of uni-modal predictions: per-sample losses, the loss of the best constant prediction, likelihoods.

A prediction has samples in its first dimension, classes, labels or outputs in the next one, and positions (pixels,
tokens) in the rest, as torch's losses have it. A sample counts once, whatever its number of positions.
"""

from __future__ import annotations

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from balanceopt._deferred import on_host
from balanceopt._options import check_number, check_tensor, shown
from balanceopt._torch import compiled_module
from balanceopt.functional._dtypes import narrowed, wide
from balanceopt.functional._scores import label_entropy, row_scores
from balanceopt.functional._targets import Targets, as_targets

TargetKind = Literal["class indices", "probabilities", "multi-hot", "numbers"]
AnswerKind = Literal["classes", "labels", "numbers"]
LossFunction = Callable[[Tensor, Tensor], Tensor]

# Relative variance at which rounding makes all of an equal target's variance.
_ROUNDING = 16
_LOSSES = (
    "cross-entropy, nn.BCEWithLogitsLoss, nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, or a function "
    "(prediction, target) -> (B,)"
)
_SCORELESS = re.compile(
    r"triplet|contrastive|nt_?xent|info_?nce|sup_?con|clip_?loss|sig_?lip|cosine_?embedding|hinge_?embedding"
    r"|margin_?ranking|ctc",
    re.I,
)
_WITHOUT_SCORES = (
    "What works there: re-learning where samples have labels too, fixed coefficients, dropout, or the monitor's "
    "`scores=function` with a prediction of your own."
)
_OF_LOGITS = {
    "NLLLoss": "log-probabilities, where a score is computed from the head's logits: pass nn.CrossEntropyLoss(), "
    "which is nn.NLLLoss after log_softmax",
    "BCELoss": "probabilities, where a score is computed from the head's logits: pass nn.BCEWithLogitsLoss(), which "
    "is nn.BCELoss after sigmoid",
}


@dataclass(frozen=True)
class SampleLosses:
    """Losses of a micro-batch's samples, for M modalities.

    Attributes:
        values: `(M, B)`, float32 or wider; 0 where not valid.
        valid: bool `(B,)`, False for samples without any position that counts.
        parts: what the loss of the best constant prediction is computed from (`Loss.merge`, `Loss.baseline`).
    """

    values: Tensor
    valid: Tensor
    parts: Tensor


class Loss(ABC):
    """A loss as the scores need it: per-sample losses, the best constant prediction's loss, the scale.

    Free of gradients and of device synchronisation. The options of a module (`weight`, `beta`, ...) are read at each
    call, since users may change them.

    Attributes:
        answers: what a prediction answers: one class for each sample or position, labels that may hold together, or
            numbers.
        recovers: whether hard labels can be read from the gradient at the logits.
        scale_free: whether the loss has no scale of its own, so that a step's scores need the baseline of all of the
            step's samples first (`KeptPredictions`); False for likelihoods in nats, whose scores can be summed at once.
        adds: whether parts of the baseline add over micro-batches and ranks; False where they are rows that have to
            be concatenated.
        rowwise: whether predictions and targets may be reshaped, with positions last; False for a user's function,
            which takes them as the loop has them.
        label_smoothing: that of a cross-entropy; 0 for other losses.
    """

    answers: AnswerKind = "numbers"
    recovers = False
    scale_free = False
    adds = True
    rowwise = True
    label_smoothing = 0.0

    @property
    def has_classes(self) -> bool:
        """Whether a target is one class for each sample or position."""
        return self.answers == "classes"

    @abstractmethod
    def kind(self, target: Tensor) -> TargetKind:
        """Tell what a target's numbers are."""

    @abstractmethod
    def leading(self, predictions: Tensor, target: Tensor) -> int:
        """Return the number of dimensions of `predictions` before the samples'.

        Raises:
            ValueError: if the shapes do not fit.
        """

    @abstractmethod
    def measure(self, predictions: Tensor, target: Tensor, present: Tensor | None = None) -> SampleLosses:
        """Compute the losses `(M, B)` of predictions `(M, B, ...)`.

        Args:
            predictions: uni-modal predictions, in any floating dtype.
            target: the loss's target.
            present: bool `(M, B)`, False where a sample lacks a modality; None for all True.

        Raises:
            ValueError: if the target does not fit the predictions or the loss.
        """

    @abstractmethod
    def baseline(self, parts: Tensor) -> Tensor:
        """Compute the loss of the best constant prediction, 0-d; NaN where the samples can't tell it."""

    def residual(self, prediction: Tensor, target: Tensor) -> Tensor | None:
        """Return numbers with the sign of the gradient at a prediction of the target's shape; None if unknown."""
        return None

    def centred(self, target: Tensor) -> bool:
        """Whether parts of a linear head are predictions only once centred, as in regression."""
        return self.kind(target) == "numbers"

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        """Combine the parts of several micro-batches or ranks into those of one batch.

        Raises:
            ValueError: if the targets of the micro-batches have other numbers of outputs.
        """
        if len({p.shape[1:] if not self.adds else p.shape for p in parts}) > 1:
            raise ValueError(
                "`target` should have the same number of outputs in all micro-batches of a step. Found parts of shapes "
                f"{[tuple(p.shape) for p in parts]}. For outputs that vary, pass a function."
            )
        return torch.stack(tuple(parts)).sum(0) if self.adds else torch.cat(tuple(parts))

    def scale(self, baseline: Tensor) -> Tensor:
        """Return tau, by which losses are divided: 1 for nats, else the baseline; NaN for a baseline of 0."""
        return (
            torch.where(baseline > 0, baseline, torch.nan) if self.scale_free else torch.ones_like(baseline)
        )


class CrossEntropy(Loss):
    r"""Cross-entropy with class indices or class probabilities, one for each sample or position.

    The baseline is the entropy of the mean label. `label_smoothing` makes soft labels of class indices; `weight` tells
    how much a position of each class counts among the sample's positions, so that only ratios of weights matter.
    """

    answers: AnswerKind = "classes"
    recovers = True

    def __init__(self, module: nn.CrossEntropyLoss | None, ignore_index: int = -100) -> None:
        """Read options from `module`; None for plain cross-entropy, where one logit stands for two classes."""
        self.module = module
        self._ignore_index = ignore_index

    @property
    def ignore_index(self) -> int:
        """Label of positions that do not count."""
        return self._ignore_index if self.module is None else self.module.ignore_index

    @property
    def label_smoothing(self) -> float:  # type: ignore[override]
        """Label smoothing of the module; 0 for plain cross-entropy."""
        return 0.0 if self.module is None else self.module.label_smoothing

    def kind(self, target: Tensor) -> TargetKind:
        return "probabilities" if target.is_floating_point() else "class indices"

    def leading(self, predictions: Tensor, target: Tensor) -> int:
        shape, soft = tuple(target.shape), target.is_floating_point()
        first = predictions.dim() - target.dim() - (not soft)
        given = tuple(predictions.shape[first:]) if first >= 0 else ()
        if not given or (given if soft else given[:1] + given[2:]) != shape or len(given) < 2:
            raise ValueError(
                "`predictions` should have shape (..., B, C, ...) with `target` class indices (B, ...) or class "
                f"probabilities (B, C, ...). Found {tuple(predictions.shape)} and {shape} of dtype {target.dtype}."
            )
        return first

    @torch.no_grad()
    def measure(self, predictions: Tensor, target: Tensor, present: Tensor | None = None) -> SampleLosses:
        _expect_modalities(predictions, self.leading(predictions, target))
        if self.module is None and predictions.shape[2] == 1:
            predictions = torch.cat([torch.zeros_like(predictions), predictions], 2)
        samples, classes = predictions.shape[1:3]
        labels = _rows(target, 0) if target.is_floating_point() else target.flatten()
        targets = as_targets(labels, classes, self.ignore_index)
        if predictions.dim() == 3 and targets.index is not None and self._is_plain:
            return SampleLosses(-row_scores(predictions, targets)[1], targets.valid, targets.class_counts())
        targets, weights = self._weighted(targets, wide(predictions).dtype)
        positions = weights.reshape(samples, _positions(predictions.shape[3:]))
        total = positions.sum(1)
        # Divided first, because a share of exactly 1 leaves a sample with a single position as it is, bit for bit.
        share = torch.where(positions > 0, positions / total.unsqueeze(1), 0)
        losses = -row_scores(_rows(predictions, 1), targets)[1]
        values = (share * losses.unflatten(1, positions.shape)).sum(-1)
        return SampleLosses(values, total > 0, _class_shares(targets, share.flatten()))

    @property
    def _is_plain(self) -> bool:
        """Whether each label counts alike and is hard."""
        return self.module is None or (self.module.weight is None and not self.label_smoothing)

    def _weighted(self, targets: Targets, dtype: torch.dtype) -> tuple[Targets, Tensor]:
        """Return smoothed, weighted labels with rows that sum to 1, and how much each row counts, `(N,)`."""
        smoothing = self.label_smoothing
        weight = None if self.module is None else self.module.weight
        if weight is not None:
            weight = weight.detach().to(targets.valid.device, dtype)
            if len(weight) != targets.num_classes:
                raise ValueError(
                    f"`loss.weight` should have one entry for each of the {targets.num_classes} classes. "
                    f"Found {len(weight)}."
                )
        if targets.index is not None and not smoothing:
            weights = torch.ones_like(targets.index, dtype=dtype) if weight is None else weight[targets.index]
            weights = torch.where(targets.valid, weights, 0)
            return replace(targets, valid=weights > 0), weights
        probabilities = targets.probabilities
        if probabilities is None:
            assert targets.index is not None
            index = targets.index.unsqueeze(1)
            probabilities = torch.zeros(
                len(index), targets.num_classes, dtype=dtype, device=index.device
            ).scatter_(1, index, 1.0)
        probabilities = (1 - smoothing) * probabilities + smoothing / targets.num_classes
        weighted = probabilities if weight is None else probabilities * weight
        weights = torch.where(targets.valid, weighted.sum(1), 0)
        valid = weights > 0
        probabilities = torch.where(valid.unsqueeze(1), weighted / weights.unsqueeze(1), 0)
        return replace(targets, valid=valid, index=None, probabilities=probabilities), weights

    @torch.no_grad()
    def baseline(self, parts: Tensor) -> Tensor:
        return label_entropy(parts)


class BinaryCrossEntropy(Loss):
    r"""Binary cross-entropy of logits, for any number of labels.

    The baseline is the mean Bernoulli entropy of the labels' frequencies. `weight` and `pos_weight` tell how much each
    label counts among the sample's labels, so that only ratios of weights matter, and a single logit has the
    probability of its true side as its score.
    """

    answers: AnswerKind = "labels"
    recovers = True

    def __init__(self, module: nn.BCEWithLogitsLoss) -> None:
        """Read options from `module`."""
        self.module = module

    def kind(self, target: Tensor) -> TargetKind:
        return "multi-hot"

    def leading(self, predictions: Tensor, target: Tensor) -> int:
        return _leading_of_numbers(predictions, target)

    @torch.no_grad()
    def measure(self, predictions: Tensor, target: Tensor, present: Tensor | None = None) -> SampleLosses:
        y = wide(target.detach()).to(wide(predictions).dtype)
        missing = y.isnan()
        y = torch.where(missing, 0, y)
        seen = on_host(y)
        if seen is not None and seen.size and not (seen.min() >= 0 and seen.max() <= 1):
            raise ValueError(
                f"`target` of nn.BCEWithLogitsLoss should lie in [0, 1]. Found entries from {seen.min():g} to "
                f"{seen.max():g}. Labels that do not count are NaN here, or have a `weight` of 0."
            )
        # In the target's shape, to which the user's loss broadcasts them.
        positive, negative = self._weight("pos_weight", y) * y, 1 - y
        weight = torch.where(missing, 0, self._weight("weight", y))
        positive, negative = (_as_outputs(x * weight, predictions) for x in (positive, negative))
        total = (positive + negative).sum((1, 2))
        valid = total > 0
        # Divided first, because shares add up to 1 for any scale of the weights.
        positive, negative = (
            torch.where(valid[:, None, None], x / total[:, None, None], 0) for x in (positive, negative)
        )
        logits = by_output(wide(predictions), 1)
        losses = _times(positive, F.softplus(-logits)) + _times(negative, F.softplus(logits))
        parts = torch.cat([positive.sum((0, 2)), negative.sum((0, 2))])
        return SampleLosses(losses.sum((2, 3)), valid, parts)

    def residual(self, prediction: Tensor, target: Tensor) -> Tensor | None:
        return wide(prediction).sigmoid() - wide(target)

    def _weight(self, name: str, target: Tensor) -> Tensor:
        """Return a weight of the module in the target's shape."""
        given: Tensor | None = getattr(self.module, name)
        if given is None:
            return torch.ones_like(target)
        weight = wide(given.detach()).to(target.device)
        shape = (1,) * (target.dim() - weight.dim()) + tuple(weight.shape)
        if len(shape) != target.dim() or any(
            n not in (1, m) for n, m in zip(shape, target.shape, strict=True)
        ):
            raise ValueError(
                f"`loss.{name}` should have a shape that broadcasts to the target's, {tuple(target.shape)}. "
                f"Found {tuple(weight.shape)}."
            )
        return weight.expand(target.shape)

    @torch.no_grad()
    def baseline(self, parts: Tensor) -> Tensor:
        positive, negative = parts.chunk(2)
        total = positive + negative
        p = torch.where(total > 0, positive / total, 0)
        entropy = torch.special.entr(p) + torch.special.entr(1 - p)
        mean: Tensor = (total * entropy).sum() / total.sum()
        return mean


class Regression(Loss):
    r"""A loss of the differences between outputs and numbers: MSE, L1, smooth L1, Huber.

    The baseline of MSE is that of the targets' mean, their variance, from sums that add. That of the others is the
    loss of the targets' median (the mean of the two middle ones), which no sums tell: their parts are the targets
    themselves, each with its weight. Entries whose target is NaN do not count; the others of a sample count alike.
    """

    scale_free = True

    def __init__(self, module: nn.Module) -> None:
        """Read options from `module`, one of torch's."""
        self.module = module
        self.adds = isinstance(module, nn.MSELoss)

    def kind(self, target: Tensor) -> TargetKind:
        return "numbers"

    def leading(self, predictions: Tensor, target: Tensor) -> int:
        return _leading_of_numbers(predictions, target)

    @torch.no_grad()
    def measure(self, predictions: Tensor, target: Tensor, present: Tensor | None = None) -> SampleLosses:
        f, y = wide(predictions), _as_outputs(wide(target.detach()), predictions)
        counts = ~y.isnan()
        y = torch.where(counts, y, 0)
        total = counts.sum((1, 2))
        weight = counts / total.clamp(min=1)[:, None, None].to(y.dtype)
        values = _times(weight, self._elementwise(by_output(f, 1), y.unsqueeze(0))).sum((2, 3))
        parts = self._moments(y, weight) if self.adds else self._target_rows(y, weight)
        return SampleLosses(values, total > 0, parts)

    def residual(self, prediction: Tensor, target: Tensor) -> Tensor | None:
        return wide(prediction) - wide(target)

    def _elementwise(self, f: Tensor, y: Tensor) -> Tensor:
        f, y = torch.broadcast_tensors(f, y)
        if isinstance(self.module, nn.MSELoss):
            return (f - y) ** 2
        if isinstance(self.module, nn.HuberLoss):
            return F.huber_loss(f, y, reduction="none", delta=self.module.delta)
        if isinstance(self.module, nn.SmoothL1Loss):
            return F.smooth_l1_loss(f, y, reduction="none", beta=self.module.beta)
        return (f - y).abs()

    def _moments(self, y: Tensor, weight: Tensor) -> Tensor:
        """Sum each output, its square, and the weights, `(3 outputs,)`; the weights of a sample sum to 1."""
        y, weight = precise(y), precise(weight)
        return torch.cat([(weight * x).sum((0, 2)) for x in (y, y * y, torch.ones_like(y))])

    def _target_rows(self, y: Tensor, weight: Tensor) -> Tensor:
        """Return outputs and weights of each position, `(N, 2 outputs)`; the weights of a sample sum to 1."""
        # In one dtype on all ranks, whatever their targets'.
        return torch.cat([precise(x).movedim(1, 2).flatten(0, 1) for x in (y, weight)], 1)

    @torch.no_grad()
    def baseline(self, parts: Tensor) -> Tensor:
        if self.adds:
            sums, squares, weight = parts.chunk(3)
            mean, square = sums / weight, squares / weight
            variance = square - mean**2
            exact = variance > _ROUNDING * torch.finfo(parts.dtype).eps * square
            variance = torch.where(exact | variance.isnan(), variance, 0)
            return _mean_loss(torch.where(weight > 0, weight * variance, 0), weight)
        y, weight = parts.chunk(2, 1)
        if not len(y):
            return parts.new_full((), torch.nan)
        ordered = torch.where(weight > 0, y, torch.inf).sort(0).values
        count = (weight > 0).sum(0)
        middle = torch.stack([(count - 1).clamp(min=0) // 2, (count // 2).clamp(max=len(y) - 1)])
        median = ordered.gather(0, middle).mean(0)
        return _mean_loss(_times(weight, self._elementwise(median.unsqueeze(0), y)), weight)


class FunctionLoss(Loss):
    r"""The user's function of a prediction and its target, 0 for a perfect prediction.

    Without a given `baseline` the scale is the mean loss over all modalities.
    """

    scale_free = True
    rowwise = False

    def __init__(self, function: LossFunction) -> None:
        """Call `function(prediction (B, ...), target)` once for each modality."""
        self.function = function

    def kind(self, target: Tensor) -> TargetKind:
        return "numbers" if target.is_floating_point() else "class indices"

    def leading(self, predictions: Tensor, target: Tensor) -> int:
        samples = target.shape[:1]
        for inner in (target.dim() + (not target.is_floating_point()), target.dim(), target.dim() + 1):
            first = predictions.dim() - inner
            if target.dim() and first >= 0 and predictions.shape[first : first + 1] == samples:
                return first
        raise ValueError(
            "`predictions` should have shape (..., B, ...) with one sample for each of the target's. "
            f"Found {tuple(predictions.shape)} and {tuple(target.shape)}."
        )

    @torch.no_grad()
    def measure(self, predictions: Tensor, target: Tensor, present: Tensor | None = None) -> SampleLosses:
        values = torch.stack([self._of_one(f, target) for f in predictions])
        counted = torch.ones_like(values, dtype=torch.bool) if present is None else present
        seen = on_host(torch.where(counted, values, 0))
        if seen is not None and seen.size and seen.min() < 0:
            raise ValueError(
                f"`loss` should return losses of at least 0, 0 for a perfect prediction. Found {seen.min():g}. "
                "Subtract the smallest value that it can take."
            )
        values = torch.where(values < 0, torch.nan, values)
        parts = torch.stack([torch.where(counted, values, 0).sum(), counted.sum().to(values.dtype)])
        return SampleLosses(values, torch.ones_like(values[0], dtype=torch.bool), precise(parts))

    def _of_one(self, prediction: Tensor, target: Tensor) -> Tensor:
        if not len(prediction):  # a rank without samples knows neither shape nor dtype of the target
            return wide(prediction.detach()).new_zeros(0)
        result = self.function(prediction.detach(), target.detach())
        if not (isinstance(result, Tensor) and result.dim() and result.shape[0] == len(prediction)):
            raise ValueError(
                f"`loss` should return one loss for each of the {len(prediction)} samples, (B,) or (B, ...). Found "
                f"{shown(result)}. A loss of torch does with reduction='none'."
            )
        return wide(result.detach()).flatten(1).mean(1) if result.dim() > 1 else wide(result.detach())

    @torch.no_grad()
    def baseline(self, parts: Tensor) -> Tensor:
        return parts[0] / parts[1]


_MODULES: dict[type[nn.Module], Callable[[Any], Loss]] = {
    nn.CrossEntropyLoss: CrossEntropy,
    nn.BCEWithLogitsLoss: BinaryCrossEntropy,
    nn.MSELoss: Regression,
    nn.L1Loss: Regression,
    nn.SmoothL1Loss: Regression,
    nn.HuberLoss: Regression,
}
_FUNCTIONS: list[tuple[object, type[nn.Module]]] = [
    (F.cross_entropy, nn.CrossEntropyLoss),
    (F.binary_cross_entropy_with_logits, nn.BCEWithLogitsLoss),
    (F.mse_loss, nn.MSELoss),
    (F.l1_loss, nn.L1Loss),
    (F.smooth_l1_loss, nn.SmoothL1Loss),
    (F.huber_loss, nn.HuberLoss),
]
_FUNCTIONS_OF_LOGITS: list[tuple[object, str]] = [
    (F.nll_loss, "NLLLoss"),
    (F.binary_cross_entropy, "BCELoss"),
]


def as_loss(criterion: nn.Module | LossFunction | Loss | None, ignore_index: int = -100) -> Loss:
    """Return a criterion's loss.

    Args:
        criterion: a loss module of torch or a subclass that changes options alone, a function of
            `torch.nn.functional` with its defaults, or any function `(prediction (B, ...), target) -> (B,)` or
            `(B, ...)`; of another module that has a `reduction`, a copy with `reduction="none"` is called. None for
            cross-entropy.
        ignore_index: label that does not count, for `criterion=None` alone.

    Raises:
        ValueError: for a loss that tells no uni-modal prediction of a target (contrastive and metric losses, CTC), for
            one of probabilities, or for a value that is no loss.
    """
    if isinstance(criterion, Loss):
        return criterion
    if criterion is None:
        return CrossEntropy(None, ignore_index)
    if isinstance(criterion, type) or not callable(criterion):
        raise ValueError(f"`loss` should be {_LOSSES}, or None. Found {shown(criterion)}.")
    for function, kind in _FUNCTIONS:
        if criterion is function:
            return _MODULES[kind](kind())
    for function, name in _FUNCTIONS_OF_LOGITS:
        if criterion is function:
            _refuse_probabilities(name)
    if isinstance(criterion, nn.Module):
        return _of_module(compiled_module(criterion) or criterion)
    if getattr(criterion, "__module__", None) == F.__name__:
        _refuse_scoreless(getattr(criterion, "__name__", ""))
    return FunctionLoss(criterion)


def _of_module(module: nn.Module) -> Loss:
    for base, build in _MODULES.items():
        if isinstance(module, base):
            if type(module).forward is not base.forward:
                raise ValueError(
                    f"`loss` of type {type(module).__name__} should compute what nn.{base.__name__} does, or be a "
                    "function (prediction, target) -> (B,). Found a forward of its own."
                )
            return build(module)
    for base in (nn.NLLLoss, nn.BCELoss):
        if isinstance(module, base):
            _refuse_probabilities(base.__name__)
    for kind in type(module).__mro__:
        _refuse_scoreless(kind.__name__)
    if isinstance(getattr(module, "reduction", None), str):
        return FunctionLoss(_Unreduced(module))
    return FunctionLoss(module)


class _Unreduced:
    """A module's per-sample values, from a copy with `reduction="none"` that is up to date at each call."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        unreduced: Any = copy.copy(self.module)
        unreduced.reduction = "none"
        # Past __call__, because the copy shares the module's hooks.
        result: Tensor = unreduced.forward(prediction, target)
        return result


def _refuse_scoreless(name: str) -> None:
    if _SCORELESS.search(name):
        raise ValueError(
            f"`loss` should compare a prediction with a target: {_LOSSES}. Found {name}, in which no modality predicts "
            f"a target alone, so that it has no uni-modal score. {_WITHOUT_SCORES}"
        )


def _refuse_probabilities(name: str) -> None:
    raise ValueError(f"`loss` should take logits. Found nn.{name}, of {_OF_LOGITS[name]}.")


@torch.no_grad()
def likelihood_score(
    predictions: Tensor,
    target: Tensor,
    loss: nn.Module | LossFunction | Loss | None,
    baseline: float | Tensor | None = None,
) -> Tensor:
    r"""Compute the score of each prediction: how well would the modality alone have answered?

    $$s_i^m = \exp(-l_i^m / \tau)$$

    with sample i's loss \(l_i^m\) under the uni-modal prediction, averaged over the labels, outputs or positions of the
    sample that count. The scale \(\tau\) is 1 for likelihoods in nats and \(l_0\), the loss of the best constant
    prediction for these samples, for losses without a scale of their own:

    | loss | \(s_i\) |
    |---|---|
    | cross-entropy, class indices | softmax probability of the class: Eq. 8 |
    | cross-entropy, soft labels or smoothing | geometric mean of the probabilities, by label |
    | cross-entropy, positions in the last dimensions | geometric mean over the positions with a label |
    | `BCEWithLogitsLoss` | geometric mean of the labels' probabilities; of one logit, sigmoid of the true side |
    | `MSELoss`, `L1Loss`, `SmoothL1Loss`, `HuberLoss` | 1 if perfect, \(e^{-1}\) where the loss is \(l_0\) |
    | any function `(prediction, target) -> (B,)` or `(B, ...)` | as for regression |

    `weight` and `pos_weight` say how much a label or position counts in its sample's mean.

    Args:
        predictions: `(..., B, ...)`, logits or outputs, with any leading dimensions, such as modalities. Classes are in
            the dimension after the samples'. Without the leading dimensions the shape is the target's (with class
            indices, the target's with the classes inserted); a last dimension of 1 may be missing in the target.
        target: `(B, ...)`, what the loss takes. For a function, integers are class indices. Entries that are NaN do not
            count in binary cross-entropy and regression.
        loss: a loss module of torch, its function, or any function; None for cross-entropy.
        baseline: \(l_0 > 0\), of the losses that are scaled by it; None for that of the target (the loss of its mean
            for MSE, of its median for L1, smooth L1 and Huber), or for a function the mean loss of the predictions.

    Returns:
        Scores `(..., B)` in [0, 1]; 0 for samples without any position that counts. NaN where \(l_0\) is 0 or unknown,
        as for a regression of one sample.

    Raises:
        ValueError: if shapes do not fit, the target does not fit the loss, a function returns another shape or negative
            losses, `baseline` is not positive, or the loss has no score (contrastive and metric losses).
        TypeError: if `predictions` or `target` is not a tensor.

    Example:
        >>> predictions = torch.tensor([[0.0, 4.0], [2.0, 2.0]])
        >>> likelihood_score(predictions, torch.tensor([0.0, 4.0]), torch.nn.MSELoss())
        tensor([[1.0000, 1.0000],
                [0.3679, 0.3679]])

    Reference:
        ours; reduces to Peng et al., OGM-GE (CVPR 2022), Eq. 8, for cross-entropy.
    """
    check_tensor("predictions", predictions, "(..., B, ...)")
    check_tensor("target", target, "(B, ...)")
    form = as_loss(loss)
    first = form.leading(predictions, target)
    f = predictions.detach()
    f = f.flatten(0, first - 1) if first else f.unsqueeze(0)
    measured = form.measure(f, target)
    l_0 = form.baseline(measured.parts) if baseline is None else _checked_baseline(baseline, f.device)
    score = torch.exp(-(measured.values / form.scale(l_0).to(measured.values.dtype)))
    score = torch.where(measured.valid, score, 0)
    return narrowed(score.reshape(predictions.shape[: first + 1]), predictions)


def precise(values: Tensor) -> Tensor:
    """Convert values to float64, whose sums of squares keep their digits, where the device has it."""
    return wide(values) if values.device.type == "mps" else values.double()


def by_output(values: Tensor, first: int) -> Tensor:
    """View values `(..., B, outputs, positions...)` as `(..., B, K, P)`, with B in dimension `first`."""
    shape = values.shape[first + 1 :]
    return values.reshape(*values.shape[: first + 1], *(shape[:1] or (1,)), _positions(shape[1:]))


def _checked_baseline(baseline: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(baseline, Tensor):
        check_tensor("baseline", baseline, "()", dims=(0,))
        seen = on_host(baseline)
        if seen is not None and not seen > 0:
            raise ValueError(f"`baseline` should be a number above 0. Found {float(seen):g}.")
        return wide(baseline.detach()).to(device)
    check_number("baseline", baseline, above=0)
    return torch.full(
        (), baseline, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device
    )


def _expect_modalities(predictions: Tensor, first: int) -> None:
    if first != 1:
        raise ValueError(
            "`predictions` should have shape (M, B, ...), one leading dimension before the target's. "
            f"Found {tuple(predictions.shape)}."
        )


def _leading_of_numbers(predictions: Tensor, target: Tensor) -> int:
    """Return the number of leading dimensions where the target has the shape of a prediction, or lacks a last 1."""
    for last in ((), (1,)):
        shape = (*target.shape, *last)
        first = predictions.dim() - len(shape)
        if target.dim() and first >= 0 and tuple(predictions.shape[first:]) == shape:
            return first
    raise ValueError(
        "`predictions` should have shape (..., B, ...) with a `target` in the shape of one prediction, (B, ...). "
        f"Found {tuple(predictions.shape)} and {tuple(target.shape)}."
    )


def _as_outputs(target: Tensor, predictions: Tensor) -> Tensor:
    """View a target as `(B, K, P)` in the shape of predictions `(M, B, ...)`, which differ in dimensions of 1 alone."""
    shape = tuple(predictions.shape[1:])
    same = [n for n in shape[1:] if n != 1] == [n for n in target.shape[1:] if n != 1]
    if not (target.dim() and shape[:1] == tuple(target.shape[:1]) and same):
        raise ValueError(
            f"`target` should have the shape of one modality's predictions, {shape}. Found {tuple(target.shape)}."
        )
    return by_output(target.reshape(shape), 0)


def _positions(shape: Sequence[int]) -> int:
    """Return the product of some sizes."""
    return int(torch.Size(shape).numel())


def _rows(values: Tensor, first: int) -> Tensor:
    """View values `(..., B, C, positions...)`, B in dimension `first`, as rows of positions `(..., B P, C)`."""
    if values.dim() == first + 2:
        return values
    return values.flatten(first + 2).movedim(first + 1, -1).flatten(first, first + 1)


def _times(share: Tensor, losses: Tensor) -> Tensor:
    """Multiply losses by shares; 0 at a share of 0, where an infinite loss does not count."""
    return torch.where(share > 0, share * losses, 0)


def _mean_loss(losses: Tensor, weight: Tensor) -> Tensor:
    """Divide the sum of weighted losses by the number of samples, whose weights sum to 1; NaN for fewer than two."""
    samples = weight.sum()
    return torch.where(samples > 1.5, losses.sum() / samples, torch.nan)


def _class_shares(targets: Targets, share: Tensor) -> Tensor:
    """Sum the rows' labels, each by its share, `(C,)`; the number of samples of each class for class indices."""
    share = torch.where(targets.valid, share, 0).float()
    if targets.index is None:
        assert targets.probabilities is not None
        return share @ targets.probabilities.float()
    counts = torch.zeros(targets.num_classes, dtype=torch.float32, device=share.device)
    return counts.index_add_(0, targets.index, share)
