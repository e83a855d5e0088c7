"""Combinations of a joint and a uni-modal loss's gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from balanceopt._options import check_number, check_tensor


@torch.no_grad()
def mixed_gradient(joint: Tensor, unimodal: Tensor | None, share: float = 1.0) -> Tensor:
    r"""Combine a share of the joint loss's gradient with the uni-modal loss's gradient.

    $$h = s \, g_{\text{joint}} + g_{\text{uni}}$$

    At a share of 1 nothing is multiplied; at 0, disentangled gradient learning (DGL), nothing of the joint gradient is
    left, not even NaN.

    Args:
        joint: gradient of the joint loss, of any shape.
        unimodal: gradient of the uni-modal loss, of the same shape; None for none.
        share: share s of the joint gradient, in [0, 1].

    Returns:
        Tensor of the shape and dtype of `joint`.

    Raises:
        ValueError: if the shapes differ, or `share` is outside [0, 1].
        TypeError: if a gradient is not a tensor.

    Example:
        >>> mixed_gradient(torch.tensor([2.0, 4.0]), torch.tensor([1.0, -1.0]), share=0.5)
        tensor([2., 1.])

    Reference:
        Wei et al., Boosting Multimodal Learning via Disentangled Gradient Learning, ICCV 2025 (share 0).
    """
    check_tensor("joint", joint, "(...)", kind="any")
    check_number("share", share, at_least=0, at_most=1)
    if unimodal is not None:
        check_tensor("unimodal", unimodal, "(...)", kind="any")
        if unimodal.shape != joint.shape:
            raise ValueError(
                f"`unimodal` should have the shape of `joint`, {tuple(joint.shape)}. Found {tuple(unimodal.shape)}."
            )
        if joint.is_floating_point() or joint.is_complex():
            unimodal = unimodal.to(joint.dtype)
    if share == 0:
        return torch.zeros_like(joint) if unimodal is None else unimodal.clone()
    part = joint if share == 1 else share * joint
    return part.clone() if unimodal is None else part + unimodal
