"""Classes of targets that are none: bins of numbers, sets of labels. The diagnosis by purity needs classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from balanceopt._deferred import on_host
from balanceopt._options import check_count, check_tensor


@dataclass(frozen=True)
class QuantileClasses:
    """The result of `quantile_classes`; a call maps targets to classes, with the same cuts.

    Attributes:
        cuts: `(bins - 1,)` or fewer ascending limits, each the largest value of a class.
    """

    cuts: Tensor

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.cuts) + 1

    @torch.no_grad()
    def __call__(self, targets: Tensor) -> Tensor:
        """Return the class `(N,)` of targets `(N,)` or `(N, 1)`.

        Raises:
            ValueError: if `targets` has another shape, or entries that are not finite.
            TypeError: if `targets` is not a tensor.
        """
        return torch.bucketize(_numbers(targets), self.cuts.to(targets.device))


@torch.no_grad()
def quantile_classes(targets: Tensor, bins: int = 10) -> QuantileClasses:
    r"""Cut numbers into classes of equal frequency.

    $$c(y) = \#\{k : q_k < y\}, \quad q_k = y_{(\lceil k N / \text{bins} \rceil)}$$

    with the targets \(y_{(1)} \le \dots \le y_{(N)}\) in order. Equal targets are in one class, so that
    many equal ones give fewer classes.

    Args:
        targets: `(N,)` or `(N, 1)` numbers, N >= 1, such as the training targets.
        bins: number of classes, at least 2.

    Returns:
        `QuantileClasses`, a function of targets: give it the training and the validation targets.

    Raises:
        ValueError: if `targets` has another shape, is empty or not finite, or `bins` is no whole number above 1.
        TypeError: if `targets` is not a tensor.

    Example:
        >>> classes = quantile_classes(torch.arange(6.0), bins=3)
        >>> classes(torch.tensor([-1.0, 0.0, 2.0, 3.0, 9.0]))
        tensor([0, 0, 1, 1, 2])

    Reference:
        ours (docs/tasks.md).
    """
    check_count("bins", bins, at_least=2)
    numbers = _numbers(targets).sort().values
    if not len(numbers):
        raise ValueError("`targets` should hold at least one number. Found none.")
    # Cuts are targets themselves, exact in any unit, and below the largest one, above which no class would be.
    number = torch.arange(1, bins, dtype=torch.int64, device=numbers.device)
    index = (number * len(numbers) + bins - 1) // bins - 1
    cuts = numbers[index].unique()
    return QuantileClasses(cuts[cuts < numbers[-1]])


@dataclass(frozen=True)
class LabelSetClasses:
    """The result of `label_set_classes`; a call maps labels to classes, with the same sets.

    Attributes:
        sets: bool `(S, C)`, the set of labels of each class but the last, which is every other set.
    """

    sets: Tensor

    @property
    def num_classes(self) -> int:
        """Number of classes, that of all other sets included."""
        return len(self.sets) + 1

    @torch.no_grad()
    def __call__(self, multi_hot: Tensor) -> Tensor:
        """Return the class `(N,)` of labels `(N, C)`; that of all other sets is the last.

        Raises:
            ValueError: if `multi_hot` is not `(N, C)` with this number of labels.
            TypeError: if `multi_hot` is not a tensor.
        """
        labels = _labels(multi_hot)
        if labels.shape[1] != self.sets.shape[1]:
            raise ValueError(
                f"`multi_hot` should have {self.sets.shape[1]} labels a sample. Found shape {tuple(multi_hot.shape)}."
            )
        classes = torch.full((len(labels),), len(self.sets), dtype=torch.int64, device=labels.device)
        for number, members in enumerate(self.sets.to(labels.device)):
            classes = torch.where((labels == members).all(1), number, classes)
        return classes


@torch.no_grad()
def label_set_classes(multi_hot: Tensor, most: int = 10) -> LabelSetClasses:
    """Make a class of each of the most frequent sets of labels, and one class of all others.

    Args:
        multi_hot: `(N, C)` labels, N >= 1, such as those of training; a label is set above 0.5.
        most: number of sets with a class of their own, at least 1. Of equally frequent sets the one comes first that
            lacks the first label in which they differ.

    Returns:
        `LabelSetClasses`, a function of labels: give it the training and the validation labels.

    Raises:
        ValueError: if `multi_hot` has another shape or is empty, or `most` is no whole number above 0.
        TypeError: if `multi_hot` is not a tensor.

    Example:
        >>> classes = label_set_classes(torch.tensor([[1, 0], [1, 0], [1, 1], [0, 1], [0, 1]]), most=2)
        >>> classes(torch.tensor([[0, 1], [1, 0], [0, 0]]))
        tensor([0, 1, 2])

    Reference:
        ours (docs/tasks.md).
    """
    check_count("most", most, at_least=1)
    labels = _labels(multi_hot)
    if not len(labels):
        raise ValueError("`multi_hot` should hold at least one sample. Found none.")
    sets, counts = labels.unique(dim=0, return_counts=True)
    return LabelSetClasses(sets[counts.argsort(descending=True, stable=True)[:most]])


def _numbers(targets: Tensor) -> Tensor:
    """Return finite targets `(N,)`, in float64 where the device has it."""
    check_tensor("targets", targets, "(N,) or (N, 1)", dims=(1, 2))
    if targets.dim() == 2 and targets.shape[1] != 1:
        raise ValueError(
            f"`targets` should have one number a sample to be cut into bins. Found shape {tuple(targets.shape)}. "
            "For several outputs give a function of your own that makes classes of them."
        )
    numbers = targets.detach().flatten()
    numbers = numbers.float() if numbers.device.type == "mps" else numbers.double()
    seen = on_host(numbers.isfinite())
    if seen is not None and not seen.all():
        raise ValueError("`targets` should be finite. Found NaN or infinity.")
    return numbers


def _labels(multi_hot: Tensor) -> Tensor:
    check_tensor("multi_hot", multi_hot, "(N, C)", dims=(2,))
    return multi_hot.detach() > 0.5
