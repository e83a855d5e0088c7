"""Labels of a pass: observed, from a loss module or the model's arguments, or read from the gradient at the logits.

Labels are copied on arrival, since the loop may reuse its buffers before the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from balanceopt._deferred import DeferredCounts, on_host
from balanceopt._warnings import WarnOnce
from balanceopt.functional import INVALID, recover_labels
from balanceopt.monitor._forward import Observed, Pass
from balanceopt.monitor._outputs import first_tensor

LabelSource = Literal["auto", "observe", "loss", "model", "gradient"]

_KEYS = ("labels", "label")


class Labels:
    """Assign labels to passes, from the most trusted source that the user allows."""

    def __init__(self, allowed: LabelSource, ignore_index: int) -> None:
        """Allow labels from one source, or all (`"auto"`); `ignore_index` labels samples that do not count."""
        self.allowed: LabelSource = allowed
        self.ignore_index = ignore_index
        self._next: Observed | None = None

    @property
    def recovers(self) -> bool:
        """Whether labels may be read from the gradient at the joint logits."""
        return self.allows("gradient")

    def allows(self, source: LabelSource) -> bool:
        """Tell whether labels may come from `source`."""
        return self.allowed in ("auto", source)

    def observe(self, latest: Pass | None, labels: Tensor, present: dict[str, Tensor]) -> None:
        """Record the user's labels for the latest pass without observed labels, else for the next pass."""
        if latest is not None and not latest.closed and latest.observed is None:
            self._give(latest, (labels, present))
        else:
            self._next = labels, present

    def begin(self, current: Pass) -> None:
        """Give a new pass the labels observed before the pass."""
        if self._next is not None:
            self._give(current, self._next)
            self._next = None

    def take_back(self, current: Pass) -> None:
        """Return the labels observed for a dropped pass to the next pass."""
        if self._next is None:
            self._next = current.observed

    def from_call(self, current: Pass, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Read the labels among the model's arguments."""
        if current.labels is None and self.allows("model"):
            labels = labels_of_call(args, kwargs)
            if labels is not None:
                current.labels, current.label_source = labels, "model"

    def from_loss(
        self,
        current: Pass | None,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        reduce: str | None,
    ) -> None:
        """Read labels and `ignore_index` from a loss module's call on the pass's logits."""
        if current is None or current.closed or not self.allows("loss"):
            return
        logits = first_tensor((args, kwargs))
        if logits is not None and current.logits is not None and logits.numel() != current.logits.numel():
            return  # the loss of an auxiliary head, which has other labels
        if current.label_source in ("gradient", "model"):
            labels = labels_of_loss(args, kwargs, reduce)
            if labels is not None:
                current.labels, current.label_source = labels, "loss"
            current.ignore_index = getattr(module, "ignore_index", None)

    def forget(self) -> None:
        """Forget observed labels that no pass has received."""
        self._next = None

    def _give(self, current: Pass, observed: Observed) -> None:
        labels, present = current.observed = observed
        current.present.update(present)
        if self.allows("observe"):
            current.labels, current.label_source = labels, "observe"


# Losses of torch whose targets are no class for each sample.
_OTHER_TARGETS = (
    nn.MSELoss,
    nn.L1Loss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.PoissonNLLLoss,
    nn.GaussianNLLLoss,
    nn.KLDivLoss,
    nn.MultiLabelMarginLoss,
    nn.MultiLabelSoftMarginLoss,
    nn.SoftMarginLoss,
    nn.MarginRankingLoss,
    nn.HingeEmbeddingLoss,
    nn.CosineEmbeddingLoss,
    nn.TripletMarginLoss,
    nn.TripletMarginWithDistanceLoss,
    nn.CTCLoss,
)


def refuse_loss(module: nn.Module) -> None:
    """Raise for a loss whose targets are known to be no classes.

    Raises:
        ValueError: for such a loss; the message names the alternatives.
    """
    if isinstance(module, _OTHER_TARGETS):
        raise ValueError(
            f"the loss to take labels from should have a class for each sample as its target, as nn.CrossEntropyLoss "
            f"has. Found {type(module).__name__}. {NO_CLASSES}"
        )


def labels_of_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the class indices given to the model as `labels=`, or under "labels" in a batch that is a mapping."""
    batches = [kwargs, *(value for value in args[:1] if isinstance(value, Mapping))]
    for batch in batches:
        for key in _KEYS:
            value = batch.get(key)
            if isinstance(value, Tensor) and not value.is_floating_point() and value.dtype != torch.bool:
                return value.detach().clone()
    return None


def labels_of_loss(args: tuple[Any, ...], kwargs: Mapping[str, Any], reduce: str | None) -> Tensor | None:
    """Return the target of a loss call `(logits, target)`.

    Raises:
        ValueError: for soft targets, unless `reduce` is "argmax".
    """
    target = args[1] if len(args) > 1 else kwargs.get("target", kwargs.get("labels"))
    if not isinstance(target, Tensor):
        return None
    several = target.dim() > 1 and target.shape[-1] > 1 and target.is_floating_point()
    if not several:
        return target.detach().clone()
    if reduce == "argmax":
        return target.detach().argmax(-1)
    raise ValueError(
        "the watched loss needs class indices as its target. Found soft targets of shape "
        f"{tuple(target.shape)}: pass reduce='argmax' to watch_loss, or monitor.observe(labels)."
    )


# Under plain cross-entropy no row has two negative gradients; this part of the rows may have by rounding.
_AMBIGUOUS_PART = 0.01
# Part of the rows that may by rounding look unlike a loss on a softmax (for one logit, binary cross-entropy).
_FOREIGN_PART = 0.1
# Largest relative distance of a row's gradient from that of such a loss (of the squares for a line).
_OFF_SUM, _OFF_RESIDUAL, _OFF_LINE = 0.05, 0.005, 1e-3
# Under plain cross-entropy every row with a gradient shows its label.
_TOLD_PART = 0.5
_FEWEST_CLASSES_FOR_LINE = 4

_CURE = "Pass labels via monitor.observe(labels) or monitor.watch_loss(loss)."
CHANGED_AFTER = (
    "logits that are changed between head and loss (upsampled, as in DeepLab and SegFormer): give as `head=` what "
    "makes those of the loss, such as the model itself"
)
NO_CLASSES = (
    "Regression and several labels a sample have no uni-modal score. What works there: UnimodalObjective(..., "
    "loss=...) called in the loop, and re-learning where samples have a class too."
)


class Recovery:
    """Recovery of labels from gradients, with counts of doubtful rows, without device synchronisation."""

    def __init__(self, *, strict: bool) -> None:
        """Start with no rows; `strict` raises where labels are doubtful."""
        self.strict = strict
        self._counts = DeferredCounts(("rows", "ambiguous", "told", "foreign"), self._judge)
        self._classes = 2
        self._single = False
        self._warn = WarnOnce()

    def labels(self, gradients: Sequence[Tensor], logits: Tensor) -> Tensor:
        """Recover labels `(N,)`, each from the first backward that shows the row's label; -100 if no backward does.

        Raises:
            RuntimeError: if the loss is no cross-entropy, or too many rows are doubtful, under `strict` or with too
                few classes for a further test.
        """
        labels = torch.full(logits.shape[:1], INVALID, dtype=torch.int64, device=logits.device)
        ambiguous, graded, foreign = (torch.zeros_like(labels, dtype=torch.bool) for _ in range(3))
        pairs, single = two_classes(logits), logits.shape[-1] == 1
        for gradient in gradients:
            g = of_two_classes(gradient)
            read = recover_labels(g, pairs)
            unknown = labels == INVALID
            labels = torch.where(unknown, read.labels, labels)
            ambiguous |= unknown & read.ambiguous
            largest = g.abs().amax(1)
            usable = torch.isfinite(largest) & (largest > 0)
            graded |= usable
            if single:
                foreign |= unknown & usable & off_residual(gradient, logits, read.labels)
            else:
                foreign |= unknown & usable & _off_softmax(g, logits, read.labels, read.ambiguous)
        self._classes, self._single = pairs.shape[-1], single
        self._counts.add(
            rows=graded.sum(),
            ambiguous=ambiguous.sum(),
            told=(labels != INVALID).sum(),
            foreign=foreign.sum(),
        )
        return labels

    def counts(self) -> dict[str, int]:
        """Return the number of rows with a gradient, and of rows that look unlike hard-label cross-entropy."""
        found = self._counts.read()
        return {"rows": found["rows"], "ambiguous": found["ambiguous"]}

    def _judge(self, counts: dict[str, int]) -> None:
        foreign = counts["foreign"] > _FOREIGN_PART * counts["rows"]
        if foreign and self._single:
            raise RuntimeError(
                "labels are read from the gradient at the logits, which should be that of one logit's binary "
                f"cross-entropy: a common factor times sigmoid(logit) - label. {counts['foreign']} of {counts['rows']} "
                f"rows are not: another loss (regression), soft labels or sample weights. {_CURE} {NO_CLASSES}"
            )
        if counts["ambiguous"] > _AMBIGUOUS_PART * counts["rows"] or foreign:
            message = (
                f"{counts['ambiguous']} of {counts['rows']} rows have several negative gradients at the logits: soft "
                "targets, label smoothing, an auxiliary loss on the logits, several labels a sample, regression, or "
                f"{CHANGED_AFTER}. Labels recovered from them may be wrong. {_CURE} {NO_CLASSES}"
            )
            if self.strict or foreign or self._classes < _FEWEST_CLASSES_FOR_LINE:
                raise RuntimeError(message)
            self._warn("ambiguous", message)
        elif counts["told"] < _TOLD_PART * counts["rows"]:
            message = (
                f"the gradients of only {counts['told']} of {counts['rows']} rows at the logits tell a label: the loss "
                "is not cross-entropy. " + _CURE
            )
            if self.strict:
                raise RuntimeError(message)
            self._warn("told", message)


def _off_softmax(g: Tensor, logits: Tensor, labels: Tensor, ambiguous: Tensor) -> Tensor:
    """Mark the rows `(N,)` of a gradient `(N, C)` that come through no softmax and show no single label.

    Through a softmax the entries of a row sum to 0. Under a further loss on all logits alike, the entries except the
    label's are linear in the probabilities.
    """
    size = g.abs().sum(1, dtype=torch.float32)
    off = (g.sum(1, dtype=torch.float32).abs() > _OFF_SUM * size) & (ambiguous | (labels == INVALID))
    seen = on_host(off)
    if g.shape[1] < _FEWEST_CLASSES_FOR_LINE or (seen is not None and not seen.any()):
        return off
    others = torch.ones_like(g, dtype=torch.float32).scatter_(1, labels.clamp(min=0).unsqueeze(1), 0)
    p, g = logits.float().softmax(1), g.float() / size.clamp(min=1e-30).unsqueeze(1)
    p, g = ((x - (x * others).sum(1, keepdim=True) / (g.shape[1] - 1)) * others for x in (p, g))
    both, spread = (p * g).sum(1), (p * p).sum(1)
    rest = (g * g).sum(1) - both**2 / spread.clamp(min=1e-30)
    return off & (rest > _OFF_LINE * (g * g).sum(1))


def of_two_classes(gradient: Tensor) -> Tensor:
    """Convert the gradient at a single logit z to the gradient at the pair (0, z), up to a factor."""
    return torch.cat([-gradient, gradient], -1) if gradient.shape[-1] == 1 else gradient


def off_residual(gradient: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Mark the rows `(N,)` of a gradient `(N, 1)` unlike `s (sigmoid(logit) - label)` with one s for each class.

    A regression loss, whose residual has no sigmoid, and soft labels give such rows.
    """
    z, size = logits[:, 0].float(), gradient[:, 0].float().abs()
    residual = torch.where(labels == 1, -z, z).sigmoid()
    info, counted = torch.finfo(gradient.dtype), (labels != INVALID) & torch.isfinite(size)
    off = torch.zeros_like(counted)
    for label in (0, 1):
        own = counted & (labels == label)
        factor = torch.where(own, size, 0).sum() / torch.where(own, residual, 0).sum().clamp(min=1e-30)
        allowed = (
            max(_OFF_RESIDUAL, 8 * info.eps) * factor * residual + 1e-5 * factor + 2 * info.smallest_normal
        )
        off |= own & ((size - factor * residual).abs() > allowed)
    return off


def two_classes(logits: Tensor) -> Tensor:
    """Convert a single logit z to the pair (0, z), whose softmax is the sigmoid of z."""
    return torch.cat([torch.zeros_like(logits), logits], -1) if logits.shape[-1] == 1 else logits
