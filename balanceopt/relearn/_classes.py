"""Classes of a diagnosis: class indices of a batch's targets, at once or by cuts made of all training targets."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from balanceopt._options import check_function, to_tensor
from balanceopt.distributed import Group, active_group
from balanceopt.functional import Loss, as_targets, label_set_classes, quantile_classes

Classes = Literal["quantiles", "label-set"] | Callable[[Any], Any]

_CHOICES = ("quantiles", "label-set")
_FUNCTION = "`classes=`, a function from a batch's labels to class indices"


class Kind(NamedTuple):
    """Kind of targets, by which they become classes.

    Attributes:
        rule: `"labels"`, `"soft labels"`, `"binary"`, `"function"` (classes at once), `"quantiles"` or `"label-set"`.
        labels: number of labels of a sample for `"label-set"`, else 0.
    """

    rule: str
    labels: int = 0

    def __str__(self) -> str:
        return f"{self.rule} of {self.labels} labels" if self.labels else self.rule


def check_classes(classes: object) -> None:
    """Check the option `classes`.

    Raises:
        ValueError: if it is neither a function, one of the choices nor None.
    """
    if not (isinstance(classes, str) and classes in _CHOICES):
        check_function("classes", classes, f"a batch's labels that returns class indices, one of {_CHOICES}")


class TargetReader:
    """Reader of one split's targets, batch by batch.

    Attributes:
        kinds: kinds of targets read so far.
    """

    def __init__(self, classes: Classes | None, loss: Loss, where: str, ignore_index: int) -> None:
        """Read by `classes`, or for None by the targets of `loss`; `where` is the source of targets, for messages."""
        self.kinds: set[Kind] = set()
        self._classes = classes
        self._loss = loss
        self._where = where
        self._ignore_index = ignore_index

    def read(self, targets: Any) -> tuple[Tensor, Tensor]:
        """Read a batch's targets.

        Returns:
            Class indices int64 `(B,)`, numbers float64 `(B,)` for bins, or bool `(B, C)` for label sets; and flags bool
            `(B,)` of the samples that count, none of whose targets is missing; on the CPU.

        Raises:
            ValueError: if the targets have another shape or dtype than their kind.
            TypeError: if the targets are not numbers.
        """
        given = self._classes(targets) if callable(self._classes) else targets
        values = to_tensor(f"labels {self._where}", given, "integers (N,), a class index each").detach().cpu()
        rule = self._rule(values)
        if rule == "quantiles":
            rows = self._numbers(values)
        elif rule == "label-set":
            rows = self._sets(values)
        elif rule == "binary":
            rows = (values.flatten() > 0.5).long()
        elif rule == "soft labels":
            rows = self._most_probable(values)
        else:
            rows = self._indices(values)
        if rule in ("labels", "function"):
            counts = rows != self._ignore_index
        elif rule == "soft labels":
            counts = values.sum(1) > 0
        else:  # NaN is a missing target, as for the scores
            counts = (
                ~values.isnan().reshape(len(values), -1).any(1) if len(values) else rows.new_empty(0).bool()
            )
        self.kinds.add(Kind(rule, rows.shape[1] if rule == "label-set" else 0))
        return rows, counts

    def _rule(self, values: Tensor) -> str:
        if isinstance(self._classes, str):
            return self._classes
        if self._classes is not None:
            return "function"
        kind = self._loss.kind(values)
        if kind == "multi-hot":
            return "binary" if values.dim() == 1 or values.shape[1:] == (1,) else "label-set"
        if kind == "probabilities":
            return "soft labels" if values.dim() == 2 and values.shape[1] > 1 else "labels"
        return "quantiles" if kind == "numbers" else "labels"

    def _indices(self, values: Tensor) -> Tensor:
        if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise ValueError(
                f"labels {self._where} should be integers, a class index each. Found dtype {values.dtype}: pass "
                f'{_FUNCTION}, "quantiles" for numbers or "label-set" for several labels a sample (a monitor with the '
                "loop's loss as `loss=` needs none of them); or, where labels stand elsewhere in the batch, "
                "`forward=`, a function of (model, batch) that returns them."
            )
        if values.dim() == 2 and values.shape[1] == 1:
            values = values[:, 0]
        if values.dim() != 1:
            raise ValueError(
                f"labels {self._where} should have shape (N,). Found {tuple(values.shape)}: pass {_FUNCTION}, a single "
                "one for each sample also where its positions (tokens, pixels) have labels."
            )
        return values.long()

    def _most_probable(self, values: Tensor) -> Tensor:
        try:
            as_targets(values, values.shape[1], self._ignore_index)
        except ValueError as error:
            raise ValueError(
                f"labels {self._where} should be integers, a class index each, or class probabilities (N, C): {error} "
                f'For several labels a sample pass `classes="label-set"`, else {_FUNCTION}.'
            ) from None
        return values.argmax(1)

    def _numbers(self, values: Tensor) -> Tensor:
        if values.dim() == 2 and values.shape[1] == 1:
            values = values[:, 0]
        if values.dim() != 1 or values.is_complex():
            raise ValueError(
                f"targets {self._where} should be one number a sample to be cut into bins. Found shape "
                f"{tuple(values.shape)}, dtype {values.dtype}: with several outputs or positions no bins are the right "
                f"ones. Pass {_FUNCTION}, such as bins of the output that matters: "
                "`classes=lambda y: torch.bucketize(y[:, 0].contiguous(), cuts)`."
            )
        if bool(values.isinf().any()):
            raise ValueError(
                f"targets {self._where} should be finite, or NaN for those that do not count. Found infinity."
            )
        return values.double()

    def _sets(self, values: Tensor) -> Tensor:
        if values.dim() != 2 or values.is_complex():
            raise ValueError(
                f"labels {self._where} should be (N, C), 0 or 1 for each of C labels, to make a class of each set of "
                f"labels. Found shape {tuple(values.shape)}, dtype {values.dtype}. Pass {_FUNCTION}."
            )
        return values > 0.5


class FittedClasses(NamedTuple):
    """Classes of a diagnosis.

    Attributes:
        name: what the classes are, for the printed diagnosis.
        of: function from a split's targets, as `TargetReader` reads them, to class indices `(N,)`.
    """

    name: str
    of: Callable[[Tensor], Tensor]


def fit_classes(kinds: Iterable[Kind], targets: Tensor | None, group: Group) -> FittedClasses:
    """Make the classes of a diagnosis, the same on all ranks; a collective.

    Args:
        kinds: kinds of targets that this rank has read, of both splits.
        targets: this rank's training targets, if bins or label sets are to be made of them; None without such.
        group: process group whose ranks hold parts of the samples.

    Raises:
        ValueError: if the targets are of several kinds.
    """
    everyone: list[Any] = [(set(kinds), targets)]
    ranks = active_group(group)
    if ranks is not None:
        here = everyone[0]
        everyone = [None] * dist.get_world_size(ranks)
        dist.all_gather_object(everyone, here, group=ranks)
    seen = sorted(set().union(*(part for part, _ in everyone)))
    if len(seen) > 1:
        raise ValueError(
            "targets should be of one kind in all training and validation batches. Found "
            f"{', '.join(map(str, seen))}. Pass {_FUNCTION}."
        )
    rows = [part for _, part in everyone if part is not None]
    rule = seen[0].rule if seen else "labels"
    if rule in _CHOICES and not rows:
        return FittedClasses(rule, lambda values: torch.zeros(len(values), dtype=torch.int64, device="cpu"))
    if rule == "quantiles":
        return FittedClasses("quantile bins of the training targets", quantile_classes(torch.cat(rows)))
    if rule == "label-set":
        labels = torch.cat(rows)
        sets = label_set_classes(labels)
        rest = float((sets(labels) == len(sets.sets)).double().mean())
        others = f", and one of all other sets ({rest:.0%} of the samples)" if rest else ""
        return FittedClasses(f"the most frequent label sets of the training samples{others}", sets)
    return FittedClasses(_NAMES[rule], lambda values: values)


_NAMES = {
    "labels": "the labels",
    "soft labels": "the most probable class of soft labels",
    "binary": "a label above 0.5 or not",
    "function": "of the function `classes=`",
}
