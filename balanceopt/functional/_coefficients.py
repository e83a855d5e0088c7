"""From discrepancy ratios to what acts on a modality: gradient coefficient, drop probability."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from balanceopt._options import check_choice, check_number, check_tensor
from balanceopt.functional._dtypes import narrowed, wide

CoefficientForm = Literal["cvpr", "cvpr_v0", "tpami"]


@torch.no_grad()
def modulation_coefficient(ratio: Tensor, alpha: float, form: CoefficientForm = "cvpr") -> Tensor:
    r"""Factor k on the gradient of each modality's encoder: below 1 where it dominates.

    With \(k = 1\) wherever \(\rho \le 1\), and for \(\rho > 1\)

    * `"cvpr"`: \(k = 1 - \tanh(\alpha \rho)\)
    * `"cvpr_v0"`: \(k = 1 - \tanh(\alpha (\rho - 1))\)
    * `"tpami"`: \(k = \max(0, 1 - \alpha \tanh(\rho - 1))\)

    Args:
        ratio: `(M,)` discrepancy ratios.
        alpha: strength, >= 0; at 0 every coefficient is 1.
        form: which of the three published forms.

    Returns:
        `(M,)` in [0, 1].

    Raises:
        ValueError: if `alpha` is negative or not finite, or `form` unknown.
        TypeError: if `ratio` is no tensor.

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
def drop_probability(ratio: Tensor, q_base: float = 0.5, lam: float = 0.5) -> Tensor:
    r"""Probability of dropping a sample's features of each modality.

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
        TypeError: if `ratio` is no tensor.

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
    # Clamped, because an infinite growth times a base of 0 is not a number.
    growth = (lam * torch.tanh(rho - 1)).clamp(max=torch.finfo(rho.dtype).max)
    q = q_base * (1 + growth)
    return narrowed(torch.where(rho > 1, q.clamp(0, 1), 0), ratio)
