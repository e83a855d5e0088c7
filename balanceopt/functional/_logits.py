"""Uni-modal logits of a linear head over concatenated features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def linear_logits(features: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""Split the logits of a linear head over concatenated features by modality.

    $$\text{logits}^m = z^m {W^m}^\top + b / M$$

    so that the uni-modal logits add up to the joint logits.

    Args:
        features: M tensors `(B, D_m)`, in the order in which they were concatenated.
        weight: `(C, D_1 + ... + D_M)`, the head's weight.
        bias: `(C,)`, the head's bias, or None.

    Returns:
        `(M, B, C)`, in the dtype of the features.

    Raises:
        ValueError: if the widths of the features do not add up to the width of `weight`.

    Example:
        >>> z = [torch.ones(1, 2), torch.ones(1, 1)]
        >>> linear_logits(z, torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([2.0]))
        tensor([[[4.]],
        <BLANKLINE>
                [[5.]]])

    Reference:
        Peng et al., Balanced Multimodal Learning via On-the-fly Gradient Modulation, CVPR 2022, Eq. 8.
    """
    if len(features) == 0:
        raise ValueError("`features` should hold one tensor per modality. Found none.")
    widths = [z.shape[-1] for z in features]
    if sum(widths) != weight.shape[1]:
        raise ValueError(
            f"`features` should have widths that add up to the {weight.shape[1]} columns of `weight`. "
            f"Found widths {widths}."
        )
    share = None if bias is None else (bias / len(features)).to(features[0].dtype)
    blocks = weight.to(features[0].dtype).split(widths, dim=1)
    return torch.stack(
        [torch.nn.functional.linear(z, w, share) for z, w in zip(features, blocks, strict=True)]
    )
