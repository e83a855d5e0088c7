"""From samples to a diagnosis: cluster, count, compare; over the ranks that hold a part of the samples each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from balanceopt._pooling import Pool, check_pool
from balanceopt._warnings import warn_user
from balanceopt.distributed import Group, active_group, shared_seed
from balanceopt.functional import reinit_strength
from balanceopt.functional._kmeans import full_precision, kmeans_steps
from balanceopt.functional._purity import purity_steps
from balanceopt.functional._scaling import minmax_scale_steps
from balanceopt.functional._together import Steps, run_together, to_host
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
class _Found:
    """What one rank holds of one modality, or all ranks together."""

    train: int = 0
    val: int = 0
    width: int = 0
    usable: bool = True


def diagnose_samples(
    modalities: Sequence[str], train: Mapping[str, Samples], val: Mapping[str, Samples], chosen: Options
) -> Diagnosis:
    """Cluster and compare each modality's samples; the same result on all ranks.

    Raises:
        ValueError: if there are no training or no validation samples, or only one class.
    """
    ranks = active_group(chosen.group)
    if chosen.equal_counts:
        train = {
            name: random_rows(s, len(val[name]), chosen.seed) for name, s in train.items() if name in val
        }
    found, classes = _survey(modalities, train, val, ranks)
    _check(found, classes)
    clusters = chosen.num_classes or len(classes)
    skipped = {name: why for name in modalities if (why := _why_skipped(found[name], clusters))}
    for name, why in skipped.items():
        warn_user(f"modality {name!r} was left out of the diagnosis: {why}.")
    known = [name for name in modalities if name not in skipped]
    computations = []
    for name in known:
        both = (train.get(name), val.get(name))
        for own, total in zip(both, (found[name].train, found[name].val), strict=True):
            part = _on_this_rank(own, found[name].width, both)
            computations.append(_purity_steps(part, total, clusters, chosen, ranks))
    devices = {s.features.device.type for part in (train, val) for s in part.values()}
    with full_precision(devices):
        values = run_together(computations, ranks)
    purities = dict(zip(known, zip(values[::2], values[1::2], strict=True), strict=True))
    counts = {name: (f.train, f.val) for name, f in found.items()}
    return assemble(modalities, purities, counts, skipped, lambda gap: _strength(gap, chosen), clusters)


def _survey(
    modalities: Sequence[str],
    train: Mapping[str, Samples],
    val: Mapping[str, Samples],
    ranks: dist.ProcessGroup | None,
) -> tuple[dict[str, _Found], set[int]]:
    """What all ranks hold together, and the classes among it; only counts and labels' values are exchanged."""
    own = {name: _found(train.get(name), val.get(name)) for name in modalities}
    labels = {int(c) for part in (train, val) for s in part.values() for c in s.labels.unique()}
    everyone: list[Any] = [(own, labels)]
    if ranks is not None:
        everyone = [None] * dist.get_world_size(ranks)
        dist.all_gather_object(everyone, (own, labels), group=ranks)
    together = {}
    for name in modalities:
        parts = [found[name] for found, _ in everyone]
        widths = {part.width for part in parts if part.width}
        together[name] = _Found(
            sum(part.train for part in parts),
            sum(part.val for part in parts),
            max(widths, default=0),
            all(part.usable for part in parts) and len(widths) < 2,
        )
    return together, set().union(*(classes for _, classes in everyone))


def _found(train: Samples | None, val: Samples | None) -> _Found:
    held = [s for s in (train, val) if s is not None and len(s)]
    widths = {s.features.shape[1] for s in held}
    finite = all(s.features.is_floating_point() and bool(torch.isfinite(s.features).all()) for s in held)
    usable = finite and len(widths) < 2 and 0 not in widths
    return _Found(len(train or ()), len(val or ()), max(widths, default=0), usable)


def _check(found: Mapping[str, _Found], classes: set[int]) -> None:
    for part, hint in (("train", "training"), ("val", "validation")):
        if not any(getattr(f, part) for f in found.values()):
            raise ValueError(
                f"there are no {hint} features: the {hint} data yielded no sample, or the passes over it called none "
                f"of the encoders {list(found)}."
            )
    if len(classes) < 2:
        raise ValueError(f"labels should be of two classes or more. Found only {sorted(classes)}.")


def _why_skipped(found: _Found, clusters: int) -> str | None:
    if not found.usable:
        return "its features are not finite floating numbers, or of more than one width"
    if min(found.train, found.val) < clusters:
        return (
            f"it has {found.train} training and {found.val} validation samples, fewer than the {clusters} clusters "
            "in one of them"
        )
    return None


def _on_this_rank(own: Samples | None, width: int, both: Sequence[Samples | None]) -> Samples:
    """This rank's samples, perhaps none: it takes part in the sums all the same."""
    if own is not None:
        return own
    like = next((s.features for s in both if s is not None), torch.empty(0))
    return Samples(like.new_empty(0, width), torch.empty(0, dtype=torch.int64))


def _purity_steps(
    samples: Samples, total: int, clusters: int, chosen: Options, ranks: dist.ProcessGroup | None
) -> Steps[float]:
    features: Tensor = samples.features
    if features.dtype != torch.float64:
        features = features.float()  # half precision would be too coarse for the scaling too
    if chosen.normalize == "minmax":
        features = yield from minmax_scale_steps(features, ranks)
    # The same start for every modality and split: equal features then have no gap.
    generator = torch.Generator().manual_seed(chosen.seed)
    steps = kmeans_steps(features, clusters, generator=generator, n_init=chosen.n_init, group=ranks)
    device = features.device
    del features  # the scaled copy goes as soon as k-means has its own
    result = yield from steps
    share = yield from purity_steps(result.assignments, samples.labels.to(device), ranks)
    return (
        round(float((yield from to_host(share))) * total) / total
    )  # of integers: without float32's rounding


def _strength(gap: float, chosen: Options) -> float:
    return float(reinit_strength(torch.tensor(gap, dtype=torch.float64), chosen.lam))
