"""Features on a common scale before clustering."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from balanceopt.functional._rows import Ranks, check_features, column_range, row_blocks
from balanceopt.functional._together import Steps, run_together, to_host


@torch.no_grad()
def minmax_scale(features: Tensor, *, group: dist.ProcessGroup | None = None) -> Tensor:
    r"""Scale each feature to the range from -1 to 1, as the published code does before clustering.

    $$x' = 2 (x - \min x) / (\max x - \min x) - 1$$

    with a range of 0 taken as 1, so that a constant feature becomes -1.

    Args:
        features: `(N, D)`.
        group: process group whose ranks hold a part of the rows each; the extrema are shared. None: this
            process holds all rows.

    Returns:
        `(N, D)`, in the dtype of `features` (computed in float32 or wider).

    Raises:
        ValueError: if `features` is not a floating `(N, D)` tensor, is empty, or a feature's range is not
            finite.

    Example:
        >>> minmax_scale(torch.tensor([[0.0, 7.0], [1.0, 7.0], [4.0, 7.0]]))
        tensor([[-1.0000, -1.0000],
                [-0.5000, -1.0000],
                [ 1.0000, -1.0000]])

    Reference:
        Wei et al., Diagnosing and Re-learning for Balanced Multimodal Learning, ECCV 2024: the authors'
        published code (`code/ours.py`).
    """
    (scaled,) = run_together([minmax_scale_steps(features, group)], group)
    return scaled


def minmax_scale_steps(features: Tensor, group: dist.ProcessGroup | None) -> Steps[Tensor]:
    """`minmax_scale` as a computation beside others."""
    check_features(features)
    low, high = yield from column_range(features, Ranks(group))
    spread = high - low
    if not (yield from to_host(torch.isfinite(spread).all())):
        raise ValueError(
            "`features` should be finite with at least one row. Found an entry or range that is not."
        )
    factor = torch.where(spread < torch.finfo(spread.dtype).tiny, 2.0, 2 / spread)
    scaled = torch.empty_like(features, memory_format=torch.contiguous_format)
    for block, target in zip(row_blocks(features), row_blocks(scaled), strict=True):
        if block.dtype == low.dtype:
            torch.sub(block, low, out=target).mul_(factor).sub_(1)
        else:
            target.copy_((block - low).mul_(factor).sub_(1))
    return scaled
