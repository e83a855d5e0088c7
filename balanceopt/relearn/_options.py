"""Checked options of a diagnosis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch.distributed as dist

from balanceopt._options import (
    check_choice,
    check_count,
    check_flag,
    check_function,
    check_number,
    check_seed,
)
from balanceopt._pooling import Pool, check_pool
from balanceopt.distributed import Group, active_group, check_group, shared_seed
from balanceopt.relearn._features import Classes

Normalize = Literal["minmax", "none"]
Gap = Literal["absolute", "one-sided"]


@dataclass(frozen=True)
class Options:
    """Checked options of a diagnosis.

    Args:
        lam: factor of the strength tanh(lam * gap), >= 0.
        normalize: `"minmax"` or `"none"`, the scaling before clustering.
        n_init: number of k-means starts, >= 1; the best one counts.
        classes: function from a batch's labels to class indices `(B,)`; None for labels that are class indices.
        max_samples: upper limit of each modality's samples in each split, over all ranks.
        equal_counts: whether to cut the larger split into random parts of the smaller split's size.
        gap: `"absolute"` or `"one-sided"`.
        pool: pooling rule for features of more than two dimensions.
        seed: seed of k-means and of the choice of samples.
        group: process group whose ranks hold parts of the samples.
    """

    lam: float
    normalize: Normalize
    n_init: int
    classes: Classes | None
    max_samples: int
    equal_counts: bool
    gap: Gap
    pool: Pool
    seed: int
    group: Group

    def __post_init__(self) -> None:
        check_number("lam", self.lam, at_least=0)
        check_choice("normalize", self.normalize, get_args(Normalize))
        check_count("n_init", self.n_init, at_least=1)
        check_function("classes", self.classes, "a batch's labels that returns class indices")
        check_count("max_samples", self.max_samples, at_least=1)
        check_flag("equal_counts", self.equal_counts)
        check_choice("gap", self.gap, get_args(Gap))
        check_pool(self.pool)

    @property
    def limit(self) -> int:
        """Upper limit of a modality's samples on this rank."""
        ranks = active_group(self.group)
        return self.max_samples if ranks is None else -(-self.max_samples // dist.get_world_size(ranks))


def options(seed: int | None, group: Group, **given: Any) -> Options:
    """Make `Options` with a seed that all ranks share."""
    check_group(group)
    check_seed(seed)
    chosen = shared_seed(group) if seed is None else int(seed) % 2**63
    return Options(seed=chosen, group=group, **given)
