"""Modulation coefficients and drop probabilities from discrepancy ratios or cross-entropies."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from balanceopt._options import check_choice, check_number, check_tensor
from balanceopt.functional._dtypes import narrowed, wide
from balanceopt.functional._scores import present_or_all

CoefficientForm = Literal["cvpr", "cvpr_v0", "tpami"]

# exp of a larger number overflows in float32.
_LARGEST_EXPONENT = 80.0


@torch.no_grad()
def modulation_coefficient(ratio: Tensor, alpha: float, form: CoefficientForm = "cvpr") -> Tensor:
    r"""Compute the coefficient k on each encoder's gradient, below 1 where the modality dominates.

    With \(k = 1\) wherever \(\rho \le 1\), and for \(\rho > 1\)

    * `"cvpr"`: \(k = 1 - \tanh(\alpha \rho)\)
    * `"cvpr_v0"`: \(k = 1 - \tanh(\alpha (\rho - 1))\)
    * `"tpami"`: \(k = \max(0, 1 - \alpha \tanh(\rho - 1))\)

    Args:
        ratio: `(M,)` discrepancy ratios.
        alpha: strength, >= 0; at 0 every coefficient is 1.
        form: one of the three published forms.

    Returns:
        `(M,)` in [0, 1].

    Raises:
        ValueError: if `alpha` is negative or not finite, or `form` unknown.
        TypeError: if `ratio` is not a tensor.

    Example:
        >>> modulation_coefficient(torch.tensor([2.0, 0.5]), alpha=0.5)
        tensor([0.2384, 1.0000])

    Reference:
        CVPR 2022, Eq. 10 and the official code ("cvpr"), its first release ("cvpr_v0"); TPAMI 2024, Eq. 11 ("tpami").
    """
    check_tensor("ratio", ratio, "(M,)")
    check_number("alpha", alpha, at_least=0)
    check_choice("form", form, get_args(CoefficientForm))
    rho = wide(ratio)
    if form == "cvpr":
        k = 1 - torch.tanh(alpha * rho)
    elif form == "cvpr_v0":
        k = 1 - torch.tanh(alpha * (rho - 1))
    else:
        k = 1 - alpha * torch.tanh(rho - 1)
    return narrowed(torch.where(rho > 1, k.clamp(0, 1), 1), ratio)


@torch.no_grad()
def priority_coefficients(accuracy: Tensor, boost: float = 1.5, damp: float = 0.5) -> Tensor:
    r"""Compute coefficients that speed up the modality that is best alone, and slow the others (PDMP).

    $$k^m = \text{boost} \text{ if } m = \operatorname{argmax}_j a^j, \text{ else } \text{damp}$$

    Args:
        accuracy: `(M,)` accuracies, or other scores, of models trained on each modality alone.
        boost: coefficient of the best modality, the first of several equal ones; >= 0.
        damp: coefficient of the others, >= 0.

    Returns:
        `(M,)` coefficients; 1 for all where an accuracy is NaN.

    Raises:
        ValueError: if `accuracy` is not a real tensor `(M,)`, or an option is negative or not finite.
        TypeError: if `accuracy` is not a tensor.

    Example:
        >>> priority_coefficients(torch.tensor([0.6, 0.8, 0.7]))
        tensor([0.5000, 1.5000, 0.5000])

    Reference:
        Wei et al., Rethinking Balanced Multimodal Learning via Performance-Dominant Modality Prioritization, 2026; the
        form of its coefficients is ours.
    """
    check_tensor("accuracy", accuracy, "(M,)", dims=(1,), empty=False)
    check_number("boost", boost, at_least=0)
    check_number("damp", damp, at_least=0)
    a = wide(accuracy)
    best = torch.arange(len(a), dtype=torch.int64, device=a.device) == a.argmax()
    k = torch.where(best, boost, torch.full_like(a, damp))
    return narrowed(torch.where(a.isnan().any(), 1, k), accuracy)


@torch.no_grad()
def balance_coefficient(
    score: Tensor, alpha: float = 0.5, beta: float = 2.0, present: Tensor | None = None
) -> Tensor:
    r"""Compute MLB's coefficient k on each modality's gradient: above 1 for the weaker ones, below 1 for the stronger.

    $$r^m = \frac{1}{M-1} \sum_{j \ne m} s^j / s^m, \qquad
    k^m = 1 + (\beta - 1) \tanh(\alpha (r^m - 1)) \text{ if } r^m > 1, \text{ else } 1 + \tanh(\alpha (r^m - 1))$$

    Equal scores, and a single modality, have k = 1 exactly.

    Args:
        score: `(M,)` mean scores, >= 0.
        alpha: strength, >= 0; at 0 every coefficient is 1.
        beta: largest coefficient, >= 1; 2 is the symmetric form.
        present: bool `(M,)`; False leaves a modality out of every mean, with k = 1. None for all True.

    Returns:
        `(M,)` in [1 - tanh(alpha), beta].

    Raises:
        ValueError: if `score` or `present` has another shape or dtype, or an option is outside its range.
        TypeError: if `score` or `present` is not a tensor.

    Example:
        >>> balance_coefficient(torch.tensor([0.8, 0.2]), alpha=0.5, beta=10.0)
        tensor([0.6416, 9.1463])

    Reference:
        Kontras et al., Improving Multimodal Learning with Multi-Loss Gradient Modulation, BMVC 2024.
    """
    check_tensor("score", score, "(M,)", dims=(1,), empty=False)
    check_number("alpha", alpha, at_least=0)
    check_number("beta", beta, at_least=1)
    s = wide(score)
    here = present_or_all(present, s)
    # r - 1 from differences, which are exactly 0 for equal scores.
    ahead = torch.where(here, s - s.unsqueeze(1), 0).sum(1)
    excess = torch.where(ahead == 0, 0, ahead / (s * (here.sum() - 1)))
    excess = excess.clamp(max=torch.finfo(s.dtype).max)  # an infinite one times an alpha of 0 is NaN
    largest = torch.where(excess > 0, beta - 1, torch.ones_like(s))
    k = (1 + largest * torch.tanh(alpha * excess)).clamp(max=beta)
    return narrowed(torch.where(here, k, 1), score)


@torch.no_grad()
def drop_probability(ratio: Tensor, q_base: float = 0.5, lam: float = 0.5) -> Tensor:
    r"""Compute the probability of dropping a sample's features of each modality.

    $$q = q_{base} (1 + \lambda \tanh(\rho - 1)) \text{ if } \rho > 1, \text{ else } 0$$

    clipped to [0, 1].

    Args:
        ratio: `(M,)` discrepancy ratios.
        q_base: probability just above \(\rho = 1\), in [0, 1].
        lam: growth with the ratio, >= 0.

    Returns:
        `(M,)` in [0, 1].

    Raises:
        ValueError: if `q_base` lies outside [0, 1], or `lam` is negative or not finite.
        TypeError: if `ratio` is not a tensor.

    Example:
        >>> drop_probability(torch.tensor([2.0, 0.5]))
        tensor([0.6904, 0.0000])

    Reference:
        Wei et al., On-the-fly Modulation for Balanced Multimodal Learning, TPAMI 2024, Eq. 8.
    """
    check_tensor("ratio", ratio, "(M,)")
    check_number("q_base", q_base, at_least=0, at_most=1)
    check_number("lam", lam, at_least=0)
    rho = wide(ratio)
    # Clamped, because an infinite growth times a base of 0 is NaN.
    growth = (lam * torch.tanh(rho - 1)).clamp(max=torch.finfo(rho.dtype).max)
    q = q_base * (1 + growth)
    return narrowed(torch.where(rho > 1, q.clamp(0, 1), 0), ratio)


@torch.no_grad()
def adaptive_coefficient(
    cross_entropy: Tensor,
    running: Tensor,
    alpha: float = 1.0,
    cap: float = 10.0,
    present: Tensor | None = None,
) -> Tensor:
    r"""Compute AGM's coefficient k on each modality's gradient, below 1 where the modality's lead exceeds its past one.

    $$r^m(c) = \exp\left(\frac{M}{M-1} (\bar c - c^m)\right), \qquad
    k^m = \exp(\alpha \min(r^m(\text{running}) - r^m(\text{CE}), \text{cap}))$$

    with \(\bar c\) the mean over modalities. A single modality has k = 1. Exponents of r and of k are clamped to 80, so
    that float32 can hold both.

    Args:
        cross_entropy: `(M,)` mean uni-modal cross-entropies of this step, nats.
        running: `(M,)` means of the cross-entropies over all steps so far, this one included, nats.
        alpha: strength, >= 0; at 0 every coefficient is 1.
        cap: upper limit of the difference of the two r, >= 0.
        present: bool `(M,)`; False leaves a modality out of every mean, with k = 1. None for all True.

    Returns:
        `(M,)` in [0, exp(alpha cap)].

    Raises:
        ValueError: if the tensors are not real of the same shape `(M,)`, or an option is outside its range.
        TypeError: if `cross_entropy`, `running` or `present` is not a tensor.

    Example:
        >>> adaptive_coefficient(torch.tensor([0.5, 1.5]), torch.tensor([1.0, 1.0]))
        tensor([0.1794, 1.8816])

    Reference:
        Li et al., Boosting Multi-modal Model Performance with Adaptive Gradient Modulation, ICCV 2023, and its
        published code.
    """
    check_tensor("cross_entropy", cross_entropy, "(M,)", dims=(1,), empty=False)
    check_tensor("running", running, "(M,)", dims=(1,), empty=False)
    if running.shape != cross_entropy.shape:
        raise ValueError(
            f"`running` should have one entry for each of the {len(cross_entropy)} modalities. "
            f"Found {len(running)}."
        )
    check_number("alpha", alpha, at_least=0)
    check_number("cap", cap, at_least=0)
    here = present_or_all(present, cross_entropy)
    difference = _lead(wide(running), here) - _lead(wide(cross_entropy), here)
    k = torch.exp((alpha * difference.clamp(max=cap)).clamp(max=_LARGEST_EXPONENT))
    return narrowed(torch.where(here, k, 1), cross_entropy)


def _lead(cross_entropy: Tensor, here: Tensor) -> Tensor:
    """Compute r `(M,)`, how far each modality is ahead of the mean over the modalities that are `here`."""
    count = here.sum()
    mean = torch.where(here, cross_entropy, 0).sum() / count.clamp(min=1)
    # A single modality has no other to compare with, so its exponent is 0.
    exponent = torch.where(count > 1, count / (count - 1).clamp(min=1) * (mean - cross_entropy), 0)
    return exponent.clamp(max=_LARGEST_EXPONENT).exp()
