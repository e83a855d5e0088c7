"""From samples to a diagnosis: cluster, count, compare; over the ranks that hold a part of the samples each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist

from balanceopt._pooling import Pool, check_pool
from balanceopt._warnings import warn_user
from balanceopt.distributed import (
    Group,
    active_group,
    concatenate_over_ranks,
    of_first_rank,
    shared_seed,
)
from balanceopt.functional import kmeans, minmax_scale, purity, reinit_strength
from balanceopt.relearn._diagnosis import Diagnosis, assemble
from balanceopt.relearn._samples import Samples, random_rows

Normalize = Literal["minmax", "none"]


@dataclass(frozen=True)
class Options:
    """How to diagnose.

    Args:
        lam: of the strength tanh(lam * gap).
        normalize: `"minmax"` or `"none"`, before clustering.
        n_init: starts of k-means, the best of which counts.
        num_classes: C; None for as many as there are different labels.
        max_samples: most samples of each modality to keep, of training and of validation, over all ranks.
        equal_counts: cluster a random part of the training samples, as many as there are for validation.
        pool: makes `(B, D)` of features with more dimensions.
        seed: of k-means and of any choice of samples.
        group: whose ranks hold a part of the samples each.
    """

    lam: float
    normalize: Normalize
    n_init: int
    num_classes: int | None
    max_samples: int
    equal_counts: bool
    pool: Pool
    seed: int
    group: Group

    def __post_init__(self) -> None:
        reinit_strength(0.0, self.lam)  # refuses a lam outside its range
        if self.normalize not in get_args(Normalize):
            raise ValueError(f"`normalize` should be one of {get_args(Normalize)}. Found {self.normalize!r}.")
        if self.n_init < 1:
            raise ValueError(f"`n_init` should be at least 1. Found {self.n_init}.")
        if self.num_classes is not None and self.num_classes < 2:
            raise ValueError(f"`num_classes` should be at least 2. Found {self.num_classes}.")
        if self.max_samples < 1:
            raise ValueError(f"`max_samples` should be at least 1. Found {self.max_samples}.")
        check_pool(self.pool)

    @property
    def limit(self) -> int:
        """Most samples of a modality on this rank."""
        ranks = active_group(self.group)
        return self.max_samples if ranks is None else -(-self.max_samples // dist.get_world_size(ranks))


def options(seed: int | None, group: Group, **given: Any) -> Options:
    """`Options` with a seed that all ranks share."""
    return Options(seed=shared_seed(group) if seed is None else seed % 2**63, group=group, **given)


@dataclass(frozen=True)
class _Held:
    """What one rank holds of one modality."""

    train: int = 0
    val: int = 0
    width: int = 0
    usable: bool = True
    double: bool = False


def diagnose_samples(
    modalities: Sequence[str], train: Mapping[str, Samples], val: Mapping[str, Samples], chosen: Options
) -> Diagnosis:
    """Cluster and compare each modality's samples; the same result on all ranks.

    Raises:
        ValueError: if there are no training or no validation samples, or only one class.
    """
    if chosen.equal_counts:
        train = {
            name: random_rows(s, len(val[name]), chosen.seed) for name, s in train.items() if name in val
        }
    held, classes = _survey(modalities, train, val, chosen.group)
    counts = {name: (sum(h.train for h in held[name]), sum(h.val for h in held[name])) for name in modalities}
    _check(counts, classes)
    clusters = chosen.num_classes or len(classes)
    skipped = {name: why for name in modalities if (why := _why_skipped(held[name], counts[name], clusters))}
    for name, why in skipped.items():
        warn_user(f"modality {name!r} was left out of the diagnosis: {why}.")
    ranks = active_group(chosen.group)
    first = ranks is None or dist.get_rank(ranks) == 0
    purities = {}
    for name in modalities:
        if name not in skipped:
            parts = (train.get(name), val.get(name))
            both = [_of_all_ranks(parts, side, held[name], chosen.group) for side in (0, 1)]
            # Bounded features, clustered once: the other ranks wait for the answer.
            if first:
                purities[name] = (_purity(both[0], clusters, chosen), _purity(both[1], clusters, chosen))
    purities = of_first_rank(purities, chosen.group)
    return assemble(modalities, purities, counts, skipped, lambda gap: _strength(gap, chosen), clusters)


def _survey(
    modalities: Sequence[str], train: Mapping[str, Samples], val: Mapping[str, Samples], group: Group
) -> tuple[dict[str, list[_Held]], set[int]]:
    """What each rank holds of each modality, and the classes that all hold together."""
    here = {name: _held(train.get(name), val.get(name)) for name in modalities}
    labels = {int(c) for part in (train, val) for s in part.values() for c in s.labels.unique()}
    everyone: list[Any] = [(here, labels)]
    ranks = active_group(group)
    if ranks is not None:
        everyone = [None] * dist.get_world_size(ranks)
        dist.all_gather_object(everyone, (here, labels), group=ranks)
    held = {name: [part[name] for part, _ in everyone] for name in modalities}
    return held, set().union(*(classes for _, classes in everyone))


def _held(train: Samples | None, val: Samples | None) -> _Held:
    features = [s.features for s in (train, val) if s is not None and len(s)]
    widths = {z.shape[1] for z in features}
    finite = all(z.is_floating_point() and bool(torch.isfinite(z).all()) for z in features)
    return _Held(
        len(train or ()),
        len(val or ()),
        max(widths, default=0),
        finite and len(widths) < 2 and 0 not in widths,
        any(z.dtype == torch.float64 for z in features),
    )


def _check(counts: Mapping[str, tuple[int, int]], classes: set[int]) -> None:
    for side, hint in enumerate(("training", "validation")):
        if not any(both[side] for both in counts.values()):
            raise ValueError(
                f"there are no {hint} features: the {hint} data yielded no sample, or the passes over it called none "
                f"of the encoders {list(counts)}."
            )
    if len(classes) < 2:
        raise ValueError(f"labels should be of two classes or more. Found only {sorted(classes)}.")


def _why_skipped(held: Sequence[_Held], counts: tuple[int, int], clusters: int) -> str | None:
    if not all(h.usable for h in held) or len({h.width for h in held if h.width}) > 1:
        return "its features are not finite floating numbers, or of more than one width"
    if min(counts) < clusters:
        return (
            f"it has {counts[0]} training and {counts[1]} validation samples, fewer than the {clusters} clusters "
            "in one of them"
        )
    return None


def _of_all_ranks(
    parts: tuple[Samples | None, Samples | None], side: int, held: Sequence[_Held], group: Group
) -> Samples:
    """The training (side 0) or validation samples of all ranks, in float32 or wider; this rank's may be missing."""
    own = parts[side]
    if own is None:
        like = next((s.features for s in parts if s is not None), torch.empty(0))
        own = Samples(like.new_empty(0, max(h.width for h in held)), torch.empty(0, dtype=torch.int64))
    # Half precision would be too coarse for the scaling too.
    features = own.features.to(torch.float64 if any(h.double for h in held) else torch.float32)
    rows = [h.val if side else h.train for h in held]
    labels = own.labels.to(features.device)
    return Samples(concatenate_over_ranks(features, rows, group), concatenate_over_ranks(labels, rows, group))


def _purity(samples: Samples, clusters: int, chosen: Options) -> float:
    features = minmax_scale(samples.features) if chosen.normalize == "minmax" else samples.features
    # The same start for every modality and split: equal features then have no gap.
    generator = torch.Generator().manual_seed(chosen.seed)
    found = kmeans(features, clusters, generator=generator, n_init=chosen.n_init)
    share = float(purity(found.assignments, samples.labels))
    return round(share * len(samples)) / len(samples)  # of integers: without float32's rounding


def _strength(gap: float, chosen: Options) -> float:
    return float(reinit_strength(torch.tensor(gap, dtype=torch.float64), chosen.lam))
