"""MLB: speed up the encoders of the weaker modalities, and slow those of the stronger ones."""

from __future__ import annotations

from torch import Tensor

from balanceopt._method import Unit
from balanceopt._options import check_number
from balanceopt.functional import balance_coefficient
from balanceopt.modulation._base import StepContext
from balanceopt.modulation._scaling import ApplyTo, GradientScaling


class MLB(GradientScaling):
    r"""Multi-loss balanced modulation: coefficients above 1 for the weaker modalities, below 1 for the stronger ones.

    $$g^m \leftarrow k^m g^m, \qquad
    k^m = 1 + (\beta - 1) \tanh(\alpha (r^m - 1)) \text{ if } r^m > 1, \text{ else } 1 + \tanh(\alpha (r^m - 1))$$

    with \(r^m\) the mean score of the other modalities over that of modality m (`functional.balance_coefficient`). In
    the paper the encoders have uni-modal losses, whose heads give the scores: see docs/methods/mlb.md. Coefficients
    reach `beta`: clip gradients before the step.

    Args:
        alpha: strength, >= 0 (published: 0.5 CREMA-D, 2 AVE and UCF).
        beta: largest coefficient, >= 1 (published: 10 CREMA-D); 2 is the symmetric form.
        apply_to: `"grad"` to scale gradients, or `"update"` to scale the base optimizer's update (Adam and similar).
        min_ndim: least number of dimensions of the encoders' tensors that are scaled.
        start: first step or epoch of the window, counted from 0.
        end: last step or epoch of the window, inclusive; None for no end.
        unit: unit of the window: `"step"`, or `"epoch"`, set by `set_epoch`.

    Raises:
        ValueError: for an option outside its range.

    Example:
        >>> MLB(alpha=0.5, beta=10)
        MLB(alpha=0.5, beta=10, apply_to='grad', min_ndim=0, start=0, end=None, unit='step')

    Reference:
        Kontras et al., Improving Multimodal Learning with Multi-Loss Gradient Modulation, BMVC 2024.
    """

    def __init__(
        self,
        alpha: float = 0.5,
        *,
        beta: float = 2.0,
        apply_to: ApplyTo = "grad",
        min_ndim: int = 0,
        start: int = 0,
        end: int | None = None,
        unit: Unit = "step",
    ) -> None:
        super().__init__(apply_to=apply_to, min_ndim=min_ndim, start=start, end=end, unit=unit)
        check_number("alpha", alpha, at_least=0)
        check_number("beta", beta, at_least=1)
        self.alpha = alpha
        self.beta = beta

    def coefficients(self, step: StepContext) -> Tensor:
        """Return the step's `(M,)` coefficients."""
        return balance_coefficient(step.scores.mean_score, self.alpha, self.beta, step.scores.present)
