"""Targets and the gradient at the logits: labels recovered from the gradient, and given targets checked against it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from balanceopt._deferred import DeferredCounts, on_host
from balanceopt._warnings import WarnOnce, warn_user
from balanceopt.functional import INVALID, recover_labels

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
    "For regression, several labels a sample and other losses build the monitor with `loss=`, the loss of your loop "
    "(docs/tasks.md)."
)
# Fewer rows may come from one mixed batch (mixup); a loss inside the model mixes no samples.
_FEWEST_ROWS, _FEWEST_ROWS_OF_MODEL = 32, 4
# Under cross-entropy no row contradicts its label, so half of the rows is far above rounding.
_REFUTED_PART = 0.5
# Of numbers no clear entry contradicts; among targets of another batch half of the entries on one side do, or more.
_REFUTED_PART_OF_NUMBERS = 0.25
# Largest difference by rounding, in bfloat16 too, between labels smoothed by the same amount.
_ALIKE = 0.01


class Recovery:
    """Recovery of labels from gradients, with counts of doubtful rows, without device synchronisation."""

    def __init__(self, *, strict: bool) -> None:
        """Start with no rows; `strict` raises where labels are doubtful."""
        self.strict = strict
        self._counts = DeferredCounts(("rows", "ambiguous", "told", "foreign"), self._judge)
        self._classes = 2
        self._single = False
        self._warn = WarnOnce()

    def labels(self, gradients: Sequence[Tensor], logits: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Recover labels `(N,)`, each from the first backward that shows the row's label; -100 if no backward does.

        Args:
            gradients: gradients at the logits, one for each backward.
            logits: joint logits `(N, C)`.
            label_smoothing: that of the loss, if known.

        Raises:
            RuntimeError: if the loss is no cross-entropy, or too many rows are doubtful, under `strict` or with too
                few classes for a further test.
        """
        labels = torch.full(logits.shape[:1], INVALID, dtype=torch.int64, device=logits.device)
        ambiguous, graded, foreign = (torch.zeros_like(labels, dtype=torch.bool) for _ in range(3))
        pairs, single = two_classes(logits), logits.shape[-1] == 1
        for gradient in gradients:
            g = of_two_classes(gradient)
            read = recover_labels(g, pairs, label_smoothing)
            unknown = labels == INVALID
            labels = torch.where(unknown, read.labels, labels)
            ambiguous |= unknown & read.ambiguous
            largest = g.abs().amax(1)
            usable = torch.isfinite(largest) & (largest > 0)
            graded |= usable
            if single:
                foreign |= (
                    unknown & usable & off_residual(gradient, logits, read.labels.unsqueeze(1)).squeeze(1)
                )
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
        counts = self._counts.read()
        return {"rows": counts["rows"], "ambiguous": counts["ambiguous"]}

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
    """Mark the entries `(N, L)` of a gradient unlike `s (sigmoid(logit) - label)` with one s for each logit and class.

    A regression loss, whose residual has no sigmoid, and soft labels give such entries.
    """
    z, size = logits.float(), gradient.float().abs()
    residual = torch.where(labels == 1, -z, z).sigmoid()
    info, counted = torch.finfo(gradient.dtype), (labels != INVALID) & torch.isfinite(size)
    off = torch.zeros_like(counted)
    for label in (0, 1):
        of_label = counted & (labels == label)
        factor = torch.where(of_label, size, 0).sum(0) / torch.where(of_label, residual, 0).sum(0).clamp(
            min=1e-30
        )
        allowed = (
            max(_OFF_RESIDUAL, 8 * info.eps) * factor * residual + 1e-5 * factor + 2 * info.smallest_normal
        )
        off |= of_label & ((size - factor * residual).abs() > allowed)
    return off


def two_classes(logits: Tensor) -> Tensor:
    """Convert a single logit z to the pair (0, z), whose softmax is the sigmoid of z."""
    return torch.cat([torch.zeros_like(logits), logits], -1) if logits.shape[-1] == 1 else logits


class Agreement:
    """Count by label source the rows whose gradient contradicts their label, without device synchronisation.

    A row is informative if its label is not the most probable class: a classification loss, smoothed or not, then
    raises the label's logit and lowers the logit of the most probable class.

    Attributes:
        refuted: whether the gradient has refuted the `labels=` given to the model.
        shift: whether the model compares each position with the label of the next one, as causal language models do.
    """

    def __init__(self, *, recovers: bool) -> None:
        """Accept labels from any source; with `recovers` the gradient may replace the labels given to the model."""
        self.refuted = self.shift = False
        self._recovers = recovers
        self._counts: dict[str, DeferredCounts] = {}
        self._graded = DeferredCounts(("graded",), _refuse_graded)

    def binary(self, labels: Tensor, ignore_index: int) -> Tensor:
        """Return the labels of a single logit, often floats for BCEWithLogitsLoss, as class indices.

        Raises:
            ValueError: if the labels are neither 0 and 1 nor smoothed by one amount for each class.
        """
        if labels.is_floating_point() and labels.numel():
            valid = labels != ignore_index
            graded = (valid & ~((labels >= 0) & (labels <= 1))).any()
            for side in (valid & (labels > 0.5), valid & (labels <= 0.5)):
                most, least = (torch.where(side, x, -torch.inf).max() for x in (labels, -labels))
                graded |= most + least > _ALIKE
            self._graded.add(graded=graded)
            labels = labels.round()
        return labels.long()

    def compare(
        self,
        source: str,
        labels: Tensor,
        valid: Tensor,
        gradients: Sequence[Tensor],
        logits: Tensor,
        *,
        positions: bool,
    ) -> None:
        """Count the rows `(N,)` of a pass whose class indices contradict the gradients `(N, C)`.

        Args:
            source: source of the labels.
            labels: class indices `(N,)`.
            valid: bool `(N,)`, rows that count.
            gradients: gradients at the logits, one for each backward.
            logits: joint logits `(N, C)`.
            positions: whether neighbouring rows are positions of one sample.

        Raises:
            RuntimeError: if most rows so far contradict their labels, and neither a shift nor the gradient may replace
                the labels.
        """
        top = two_classes(logits).argmax(1, keepdim=True)
        index = labels.clamp(0, max(logits.shape[1], 2) - 1).unsqueeze(1)
        following = index.roll(-1, 0)
        pulled, pulled_most, following_most, graded = (torch.zeros_like(valid) for _ in range(4))
        for gradient in gradients:
            g = of_two_classes(gradient)
            pulled |= (g.gather(1, index) < 0).squeeze(1)
            if positions:  # under label smoothing other classes than the label may be pulled too, but less
                least = g.amin(1, keepdim=True)
                pulled_most |= ((g.gather(1, index) == least) & (least < 0)).squeeze(1)
                following_most |= ((g.gather(1, following) == least) & (least < 0)).squeeze(1)
            at_top = g.gather(1, top)
            graded |= (torch.isfinite(at_top) & (at_top != 0)).squeeze(1)
        tells = valid & graded & (index != top).squeeze(1)
        differs = (tells if logits.shape[1] < 3 else valid) & (index != following).squeeze(1)
        refuted = tells & ~pulled
        first = source not in self._counts
        if first:
            self._counts[source] = DeferredCounts(
                ("rows", "refuted", "shifted", "unshifted"), partial(self._judge, source)
            )
        counts = self._counts[source]
        counts.add(
            rows=tells.sum(),
            refuted=refuted.sum(),
            shifted=(differs & following_most).sum(),
            unshifted=(differs & pulled_most).sum(),
        )
        if (
            first
            and source == "model"
            and positions
            and logits.device.type != "cpu"
            and source in self._counts
        ):
            # A device synchronisation once in a run, so that no step of a causal language model uses shifted labels.
            self._judge(source, counts.read())

    def _judge(self, source: str, counts: dict[str, int]) -> None:
        rows, refuted = counts["rows"], counts["refuted"]
        of_model = source == "model" and not self.shift
        shift = counts["shifted"] > counts["unshifted"]
        if (
            shift and of_model
        ):  # one row is enough, since a cross-entropy pulls no other label more than its own
            self.shift = True
            del self._counts[source]  # counts of the labels as they were given
            return
        fewest = _FEWEST_ROWS_OF_MODEL if of_model else _FEWEST_ROWS
        if self.refuted or rows < fewest or refuted <= _REFUTED_PART * rows:
            return
        message = (
            f"the labels from {_WORDS[source]} are not those of the loss: the gradient at the logits contradicts them "
            f"in {refuted} of {rows} rows"
            + (
                " and fits the next position's label: the model shifts its labels, as causal language models do. "
                if shift
                else " (another task's labels, a second loss, mixed samples). "
            )
        )
        if source == "model" and self._recovers:
            self.refuted = True
            warn_user(message + "From now on labels are read from the gradient.")
            return
        raise RuntimeError(
            message
            + "Give the label of each row of the logits by monitor.observe(labels), -100 where none counts"
            + (" (logits[:, t] goes with labels[:, t + 1])" if shift else "")
            + ", or build the monitor with labels='gradient'."
        )


def _refuse_graded(counts: dict[str, int]) -> None:
    if counts["graded"]:
        raise ValueError(
            "labels of a single logit should be 0 or 1, or those of a class all smoothed by one amount. Found others: "
            f"a regression's targets? {NO_CLASSES} Of probabilities of two classes give "
            "monitor.observe(labels.round())."
        )


def refuse_contradicted(source: str, counts: dict[str, int]) -> None:
    """Raise where the gradient contradicts the targets of a `source` in many entries above or below them.

    Each side counts by itself, since of labels that are mostly 0 the few others tell the batch.

    Raises:
        RuntimeError: naming the source and the number of entries.
    """
    for side in ("above", "below"):
        rows, refuted = counts[side], counts[f"{side} refuted"]
        if rows >= _FEWEST_ROWS and refuted > _REFUTED_PART_OF_NUMBERS * rows:
            raise RuntimeError(
                f"the targets from {_WORDS[source]} are not those of the loss: the gradient at the logits has the "
                f"other sign than prediction - target in {refuted} of {rows} entries {side} their target (another "
                "batch's or task's targets, a second loss, a loss that is maximised). Give the targets of the head's "
                "output by monitor.observe(targets)."
            )


def refuse_foreign(counts: dict[str, int]) -> None:
    """Raise where too many rows of a gradient are not those of hard labels under a binary cross-entropy.

    Raises:
        RuntimeError: naming the number of rows.
    """
    if counts["foreign"] > _FOREIGN_PART * counts["rows"]:
        raise RuntimeError(
            "labels are read from the gradient at the logits, which should be that of a binary cross-entropy of hard "
            f"labels: for each label a common factor times sigmoid(logit) - label. {counts['foreign']} of "
            f"{counts['rows']} rows are not: soft labels, sample weights, a second loss, or {CHANGED_AFTER}. {_CURE}"
        )


_WORDS = {
    "observe": "monitor.observe",
    "loss": "the watched loss",
    "model": "the model's own `labels=`",
}
