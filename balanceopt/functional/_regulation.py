"""InfoReg's rules: how strongly a modality that is ahead is held back, and while which epochs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from balanceopt._options import check_number, check_tensor, shown
from balanceopt.functional._dtypes import narrowed, wide
from balanceopt.functional._scores import present_or_all


@torch.no_grad()
def regulation_strength(cross_entropy: Tensor, beta: float = 0.9, present: Tensor | None = None) -> Tensor:
    r"""Compute InfoReg's strength a, above 1 for modalities that are ahead of the others, 0 for all others.

    $$a^m = \exp(\beta \tanh \Delta^m) \text{ if } \Delta^m > 0, \text{ else } 0, \qquad
    \Delta^m = \frac{1}{M-1} \sum_{j \ne m} c^j - c^m$$

    Args:
        cross_entropy: `(M,)` mean uni-modal cross-entropies, nats.
        beta: growth with the lead, >= 0.
        present: bool `(M,)`; False leaves a modality out of every mean, with a = 0. None for all True.

    Returns:
        `(M,)`, 0 or in (1, exp(beta)]; never above 0 for all modalities.

    Raises:
        ValueError: if `cross_entropy` or `present` has another shape or dtype, or `beta` is negative or not finite.
        TypeError: if `cross_entropy` or `present` is not a tensor.

    Example:
        >>> regulation_strength(torch.tensor([0.5, 1.5]))
        tensor([1.9846, 0.0000])

    Reference:
        Huang et al., Adaptive Unimodal Regulation for Balanced Multimodal Information Acquisition, CVPR 2025, Eq. 8-10,
        with losses in place of the sums of scores.
    """
    check_tensor("cross_entropy", cross_entropy, "(M,)", dims=(1,), empty=False)
    check_number("beta", beta, at_least=0)
    c = wide(cross_entropy)
    here = present_or_all(present, c)
    # Differences first, which are exactly 0 for equal losses.
    lead = torch.where(here, c - c.unsqueeze(1), 0).sum(1) / (here.sum() - 1).clamp(min=1)
    a = torch.where(here & (lead > 0), torch.exp(beta * torch.tanh(lead)), 0)
    return narrowed(a, cross_entropy)


@torch.no_grad()
def in_prime_window(trace: Tensor, threshold: float = 0.04) -> Tensor:
    r"""Compute whether the prime learning window is open: while the squared gradient norm still grows.

    $$(F_T - F_{T-1}) / F_T > K$$

    for the means F of the squared gradient norm (the trace of the Fisher information) over each past epoch. With fewer
    than two past epochs the window is open, unless the threshold is infinite.

    Args:
        trace: `(T,)` or `(T, M)` means over each of T past epochs, the latest last, >= 0.
        threshold: growth K in an epoch, relative to the latest mean; infinite for a window that is never open.

    Returns:
        bool, 0-d or `(M,)`.

    Raises:
        ValueError: if `trace` has another shape or dtype, or `threshold` is NaN.
        TypeError: if `trace` is not a tensor.

    Example:
        >>> in_prime_window(torch.tensor([[1.0, 1.0], [2.0, 1.01]]))
        tensor([ True, False])

    Reference:
        Huang et al., CVPR 2025, Eq. 6-7.
    """
    check_tensor("trace", trace, "(T,) or (T, M)", dims=(1, 2))
    check_threshold(threshold)
    if len(trace) < 2:
        return torch.full(trace.shape[1:], threshold < math.inf, dtype=torch.bool, device=trace.device)
    before, latest = wide(trace[-2]), wide(trace[-1])
    return latest - before > threshold * latest  # without a division by a latest mean of 0


def check_threshold(threshold: object) -> None:
    """Check that a threshold is a number; it may be infinite.

    Raises:
        ValueError: naming the given value.
    """
    if threshold != math.inf:
        try:
            check_number("threshold", threshold)
        except ValueError:
            raise ValueError(
                f"`threshold` should be a number, or infinite. Found threshold = {shown(threshold)}."
            ) from None
