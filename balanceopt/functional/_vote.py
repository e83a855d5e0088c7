"""Vote of several predictions of one target: their logarithmic opinion pool."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from balanceopt._options import check_choice, check_tensor
from balanceopt.functional._dtypes import narrowed, wide

VoteKind = Literal["classes", "labels"]


@torch.no_grad()
def vote(logits: Tensor, present: Tensor | None = None, answers: VoteKind = "classes") -> Tensor:
    r"""Compute the vote of K predictions: their normalised geometric mean, each with the same weight.

    $$p_i(c) \propto \prod_{k} p_i^k(c)^{1/n_i}$$

    over the \(n_i\) predictions that sample i has. Its logarithm is the mean of the logits up to a constant, so that a
    vote of unsure predictions is as sure as they are on average, where the arithmetic mean of probabilities, which is
    less sure than its parts, would answer far below its accuracy.

    Args:
        logits: `(K, B, ..., C)`, the classes' or labels' logits of K predictions; -inf for an excluded class.
        present: bool `(K, B)`, False leaves a prediction out of a sample's vote; None for all True.
        answers: `"classes"` for a softmax over C classes, or `"labels"` for C labels that may hold together, each with
            a sigmoid (a single logit of two classes is one label).

    Returns:
        `(B, ..., C)`: the classes' log-probabilities, or the labels' logits. NaN for a sample without any prediction.

    Raises:
        ValueError: if `logits` or `present` has another shape or dtype, or `answers` is unknown.
        TypeError: if `logits` or `present` is not a tensor.

    Example:
        >>> logits = torch.tensor([[[0.0, 0.0]], [[2.0, 0.0]]])
        >>> vote(logits).exp()
        tensor([[0.7311, 0.2689]])

    Reference:
        Genest and Zidek, Combining Probability Distributions, Statistical Science 1986: the logarithmic opinion pool;
        its use for uni-modal heads is ours.
    """
    check_tensor("logits", logits, "(K, B, ..., C)", kind="real")
    check_choice("answers", answers, get_args(VoteKind))
    if logits.dim() < 3 or not len(logits):
        raise ValueError(
            "`logits` should have shape (K, B, ..., C), of at least one prediction. "
            f"Found shape {tuple(logits.shape)}."
        )
    x = wide(logits)
    if present is None:
        mean = x.mean(0)
    else:
        check_tensor("present", present, "(K, B)", dims=(2,), kind="bool")
        if present.shape != logits.shape[:2]:
            raise ValueError(
                f"`present` should have a flag for each of {len(logits)} predictions and {logits.shape[1]} samples. "
                f"Found shape {tuple(present.shape)}."
            )
        here = present.to(x.device).view(*present.shape, *[1] * (x.dim() - 2))
        mean = torch.where(here, x, 0).sum(0) / here.sum(0)
    return narrowed(mean.log_softmax(-1) if answers == "classes" else mean, logits)
