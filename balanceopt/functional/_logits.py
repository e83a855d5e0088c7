"""Uni-modal logits of a linear head over concatenated features."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from balanceopt._options import check_kind, check_tensor
from balanceopt.functional._dtypes import wide


@torch.no_grad()
def linear_logits(features: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""Split the logits of a linear head over concatenated features by modality.

    $$\text{logits}^m = z^m {W^m}^\top + b / M$$

    so that the uni-modal logits add up to the joint logits.

    Args:
        features: M tensors `(B, D_m)`, in the order of concatenation; dimensions between the two stay.
        weight: `(C, D_1 + ... + D_M)`, the head's weight.
        bias: `(C,)`, the head's bias; None for no bias.

    Returns:
        Uni-modal logits `(M, B, C)`, in the widest dtype of the features.

    Raises:
        ValueError: if the features have other shapes, or their widths do not add up to the width of `weight`.
        TypeError: if `features` is not a sequence of tensors, or `weight` or `bias` not a tensor.

    Example:
        >>> z = [torch.ones(1, 2), torch.ones(1, 1)]
        >>> linear_logits(z, torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([2.0]))
        tensor([[[4.]],
        <BLANKLINE>
                [[5.]]])

    Reference:
        Peng et al., Balanced Multimodal Learning via On-the-fly Gradient Modulation, CVPR 2022, Eq. 8.
    """
    check_kind("`features`", features, (list, tuple), "a list of tensors (B, D_m), one for each modality")
    if len(features) == 0:
        raise ValueError("`features` should hold one tensor per modality. Found none.")
    for index, z in enumerate(features):
        check_tensor(f"features[{index}]", z, "(B, D_m)")
    check_tensor("weight", weight, "(C, D_1 + ... + D_M)", dims=(2,))
    if bias is not None:
        check_tensor("bias", bias, f"({len(weight)},)")
    shapes = {tuple(z.shape[:-1]) for z in features}
    if len(shapes) > 1 or () in shapes or not (bias is None or bias.shape == weight.shape[:1]):
        raise ValueError(
            "`features` should have shapes (B, D_m) and `bias` one entry for each row of `weight`. Found features of "
            f"shapes {[tuple(z.shape) for z in features]}, weight {tuple(weight.shape)}"
            f"{'' if bias is None else f', bias {tuple(bias.shape)}'}."
        )
    widths = [z.shape[-1] for z in features]
    if sum(widths) != weight.shape[1]:
        raise ValueError(
            f"`features` should have widths that add up to the {weight.shape[1]} columns of `weight`. "
            f"Found widths {widths}."
        )
    dtype = reduce(torch.promote_types, ((z if z.is_floating_point() else wide(z)).dtype for z in features))
    share = None if bias is None else (bias / len(features)).to(dtype)
    blocks = weight.to(dtype).split(widths, dim=1)
    return torch.stack(
        [torch.nn.functional.linear(z.to(dtype), w, share) for z, w in zip(features, blocks, strict=True)]
    )
