"""Losses of a whole step, for losses whose scale is known once the step's samples are: regression, user functions.

The scale l_0 and the centre of uni-modal predictions are statistics of all samples of a step, over micro-batches and
ranks, while a score is not linear in them. So predictions and targets are kept until the step, as many numbers as the
loop's own targets times the number of modalities plus one, and micro-batches and ranks equal a single batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from balanceopt._options import check_tensor
from balanceopt.functional._dtypes import narrowed, wide
from balanceopt.functional._losses import Loss, by_output, precise


def _same(values: Tensor) -> Tensor:
    return values


@dataclass(frozen=True)
class StepLosses:
    """Losses of all samples of a step on this rank.

    Attributes:
        losses: `(M, N)`, in the loss's own unit.
        counted: bool `(M, N)`, samples that have the modality and a valid target.
        baseline: 0-d, the loss of the best constant prediction for the samples of all ranks.
        scale: 0-d, tau, by which losses are divided; NaN where the step can't tell it, so that its scores are unusable.
    """

    losses: Tensor
    counted: Tensor
    baseline: Tensor
    scale: Tensor

    @property
    def in_units(self) -> Tensor:
        """`(M, N)` losses over tau; 0 where not counted."""
        return torch.where(self.counted, self.losses / self.scale.to(self.losses.dtype), 0)

    @property
    def score(self) -> Tensor:
        """`(M, N)` scores `exp(-l / tau)`; 0 where not counted."""
        return torch.where(self.counted, torch.exp(-self.in_units), 0)


@dataclass(frozen=True)
class KeptPredictions:
    """Uni-modal predictions and targets of a step's micro-batches, kept until the step; `+` joins micro-batches.

    Attributes:
        unimodal: `(M, B, ...)` predictions of each micro-batch.
        targets: `(B, ...)` targets of each micro-batch.
        present: bool `(M, B)` flags of each micro-batch, samples that have the modality.
        centre: sums from which the predictions are centred, which add; None for predictions that are no parts.
        outputs_last: whether outputs are in the last dimension, after the positions.
    """

    unimodal: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]
    present: tuple[Tensor, ...]
    centre: Tensor | None
    outputs_last: bool = False

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        unimodal: Tensor,
        target: Tensor,
        joint: Tensor | None = None,
        present: Tensor | None = None,
        *,
        outputs_last: bool = False,
    ) -> KeptPredictions:
        """Keep a micro-batch; no tensor is copied.

        Args:
            unimodal: `(M, B, ...)` predictions, without a gradient.
            target: `(B, ...)`, of which the caller has a copy if its buffer may be reused.
            joint: `(B, ...)` joint prediction, to centre uni-modal ones as `centred_predictions` does; None not to.
            present: bool `(M, B)`, samples that have the modality; None for all True.
            outputs_last: whether outputs are in the last dimension, not in the one after the samples'.
        """
        if present is None:
            present = torch.ones(unimodal.shape[:2], dtype=torch.bool, device=unimodal.device)
        centre = None
        if joint is not None:
            parts, whole = (
                (unimodal.movedim(-1, 2), joint.movedim(-1, 1)) if outputs_last else (unimodal, joint)
            )
            centre = _centre_sums(parts, whole, present)
        return cls((unimodal.detach(),), (target.detach(),), (present,), centre, outputs_last)

    def without_centring(self) -> KeptPredictions:
        """Return the predictions with a centre of no samples, which moves none and adds to those of other ranks."""
        return self if self.centre is None else replace(self, centre=torch.zeros_like(self.centre))

    def __add__(self, other: KeptPredictions) -> KeptPredictions:
        if (self.centre is None) != (other.centre is None):
            raise ValueError("micro-batches of a step should all be centred, or none.")
        both = self.centre is not None and other.centre is not None
        return KeptPredictions(
            self.unimodal + other.unimodal,
            self.targets + other.targets,
            self.present + other.present,
            self.centre + other.centre if both else None,  # type: ignore[operator]
            self.outputs_last,
        )

    @torch.no_grad()
    def losses(
        self,
        loss: Loss,
        sum_over_ranks: Callable[[Tensor], Tensor] = _same,
        concatenate_over_ranks: Callable[[Tensor], Tensor] = _same,
        baseline: Tensor | None = None,
    ) -> StepLosses:
        """Compute the losses of the step's samples.

        Every rank calls the functions over ranks in the same order: `sum_over_ranks` for the centre and for parts of
        the baseline that add, `concatenate_over_ranks` for parts that do not (`Loss.adds`). A rank without samples
        takes part with tensors of no rows.

        Args:
            loss: the loss.
            sum_over_ranks: sums a tensor over ranks; the identity for one process.
            concatenate_over_ranks: concatenates rows `(n, K)` of all ranks, n being different among them.
            baseline: 0-d l_0 that the user gives; None for that of the step's targets.

        Raises:
            ValueError: if targets do not fit the predictions or the loss, or differ in their number of outputs.
        """
        centre = None if self.centre is None else sum_over_ranks(self.centre)
        parts, values, counted = [], [], []
        for unimodal, target, present in zip(self.unimodal, self.targets, self.present, strict=True):
            predictions = unimodal
            if centre is not None and self.outputs_last:
                predictions = _moved(unimodal.movedim(-1, 2), centre).movedim(2, -1)
            elif centre is not None:
                predictions = _moved(unimodal, centre)
            measured = loss.measure(predictions, target, present)
            parts.append(measured.parts)
            values.append(measured.values)
            counted.append(measured.valid & present)
        if baseline is None:
            merged = loss.merge(parts)
            baseline = loss.baseline(sum_over_ranks(merged) if loss.adds else concatenate_over_ranks(merged))
        return StepLosses(torch.cat(values, 1), torch.cat(counted, 1), baseline, loss.scale(baseline))


@torch.no_grad()
def centred_predictions(unimodal: Tensor, joint: Tensor, present: Tensor | None = None) -> Tensor:
    r"""Turn the parts of an additive prediction into predictions, as a regression's parts are none by themselves.

    $$\hat f^m_i = f^m_i - \bar f^m + \bar f$$

    with means over the batch, and over positions: what is left of the joint prediction f when the other modalities are
    at their mean. For a linear head, \(W^m (z^m - \bar z^m) + \bar f\).

    Args:
        unimodal: `(M, B, ...)` parts of the prediction, outputs in the dimension after the samples'.
        joint: `(B, ...)` joint prediction.
        present: bool `(M, B)`, samples over which a modality's means are taken; None for all.

    Returns:
        Centred predictions `(M, B, ...)`.

    Raises:
        ValueError: if the shapes do not fit.
        TypeError: if an argument is not a tensor.

    Example:
        >>> parts = torch.tensor([[[1.0], [3.0]], [[4.0], [4.0]]])
        >>> centred_predictions(parts, parts.sum(0)).squeeze(-1)
        tensor([[5., 7.],
                [6., 6.]])

    Reference:
        ours (docs/tasks.md).
    """
    check_tensor("unimodal", unimodal, "(M, B, ...)")
    check_tensor("joint", joint, "(B, ...)")
    if unimodal.dim() < 2 or unimodal.shape[1:] != joint.shape:
        raise ValueError(
            "`unimodal` should have shape (M, B, ...) and `joint` (B, ...). "
            f"Found {tuple(unimodal.shape)} and {tuple(joint.shape)}."
        )
    if present is None:
        present = torch.ones(unimodal.shape[:2], dtype=torch.bool, device=unimodal.device)
    check_tensor("present", present, "(M, B)", kind="bool")
    if present.shape != unimodal.shape[:2]:
        raise ValueError(
            f"`present` should have shape {tuple(unimodal.shape[:2])}, a flag for each modality and sample. "
            f"Found {tuple(present.shape)}."
        )
    return narrowed(_moved(unimodal, _centre_sums(unimodal, joint, present)), unimodal)


def _centre_sums(unimodal: Tensor, joint: Tensor, present: Tensor) -> Tensor:
    """Sum each output of the other modalities' part over the samples with a modality, `(M, K + 1)`, a count last."""
    rest = precise(by_output(joint, 0)) - precise(by_output(unimodal, 1))
    sums = torch.where(present.unsqueeze(2), rest.mean(3), 0).sum(1)
    return torch.cat([sums, present.sum(1, keepdim=True).to(sums.dtype)], 1)


def _moved(unimodal: Tensor, centre: Tensor) -> Tensor:
    """Add the other modalities' mean part to predictions, in float32 or wider."""
    sums, count = centre[:, :-1], centre[:, -1:]
    mean = torch.where(count > 0, sums / count, 0)
    f = wide(unimodal)
    outputs = by_output(f, 1)
    moved = outputs + mean[:, None, :, None].to(f.dtype)
    return moved.reshape(unimodal.shape)
