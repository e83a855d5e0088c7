"""Cheap signals of what an encoder's features and uni-modal predictions hold."""

from __future__ import annotations

import torch
from torch import Tensor

from balanceopt._options import check_choice, check_tensor
from balanceopt.functional._dtypes import wide
from balanceopt.functional._losses import AnswerKind


@torch.no_grad()
def effective_rank(features: Tensor) -> Tensor:
    r"""Compute the participation ratio of features, the number of directions over which their variance spreads.

    $$\frac{(\sum_i \lambda_i)^2}{\sum_i \lambda_i^2}$$

    with the eigenvalues of the features' covariance, by traces, so that no eigenvalue is computed.

    Args:
        features: `(B, D)`, one row for each sample.

    Returns:
        0-d, from 1 to min(B - 1, D); 0 where all rows are equal.

    Raises:
        ValueError: if `features` has another shape or dtype.
        TypeError: if `features` is not a tensor.

    Example:
        >>> effective_rank(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
        tensor(2.)

    Reference:
        Gao et al., A theory of multineuronal dimensionality, dynamics and measurement, 2017.
    """
    check_tensor("features", features, "(B, D)", dims=(2,))
    x = wide(features)
    x = x - x.mean(0)
    # Scaled first, because a fourth power of small features would underflow.
    x = x / x.abs().amax().clamp(min=torch.finfo(x.dtype).tiny) if x.numel() else x
    products = x @ x.T if len(x) < x.shape[1] else x.T @ x
    squares = products.square().sum()
    return torch.where(squares == 0, 0, products.diagonal().sum().square() / squares)


@torch.no_grad()
def agreement(logits: Tensor, joint: Tensor, kind: AnswerKind = "classes") -> Tensor:
    """Compute how often each modality's own answer is the joint one.

    Args:
        logits: uni-modal logits `(M, B, C)`.
        joint: joint logits `(B, C)`.
        kind: `"classes"` for the share of samples with the same largest logit (one logit: the same sign), `"labels"`
            for the share of entries with the same sign, `"numbers"` for the correlation over the samples, averaged
            over outputs.

    Returns:
        `(M,)`, in [0, 1], or in [-1, 1] for `"numbers"`; NaN without samples, or where predictions do not vary.

    Raises:
        ValueError: for another shape or `kind`.
        TypeError: if an argument is not a tensor.

    Example:
        >>> joint = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> agreement(torch.stack([joint, joint.flip(1)]), joint)
        tensor([1., 0.])
    """
    check_tensor("logits", logits, "(M, B, C)", dims=(3,))
    check_tensor("joint", joint, "(B, C)", dims=(2,))
    check_choice("kind", kind, ("classes", "labels", "numbers"))
    if logits.shape[1:] != joint.shape:
        raise ValueError(
            f"`joint` should have the shape of each modality's logits, {tuple(logits.shape[1:])}. "
            f"Found {tuple(joint.shape)}."
        )
    if kind == "numbers":
        x, y = (wide(values) - wide(values).mean(-2, keepdim=True) for values in (logits, joint))
        correlation = (x * y).sum(1) / (x.square().sum(1) * y.square().sum(0)).sqrt()
        return correlation.mean(-1)
    if kind == "classes" and joint.shape[1] > 1:
        same = logits.argmax(2) == joint.argmax(1)
    else:
        same = ((logits > 0) == (joint > 0)).flatten(1)
    return same.to(wide(joint).dtype).mean(1)
