"""Diagnosis of how well each modality's features separate the classes, on training and validation samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from balanceopt._options import (
    check_choice,
    check_count,
    check_flag,
    check_function,
    check_kind,
    check_number,
)
from balanceopt._pooling import Pool, check_pool
from balanceopt._warnings import warn_user
from balanceopt.distributed import (
    Group,
    active_group,
    check_group,
    concatenate_over_ranks,
    of_first_rank,
    shared_seed,
)
from balanceopt.functional import kmeans, minmax_scale, purity, reinit_strength
from balanceopt.monitor import ModalityMonitor
from balanceopt.relearn._classes import Classes, check_classes, fit_classes
from balanceopt.relearn._features import Forward, Samples, Source, Split, collect_samples, is_given

Normalize = Literal["minmax", "none"]
Gap = Literal["absolute", "one-sided"]

# Upper limit of the clustered parts of the larger split, which bounds the time of a diagnosis.
_PARTS = 5

# Number of shuffles of the labels, and the index of the sorted gaps that bounds 95 % of the gaps of noise.
_SHUFFLES, _WITHIN = 40, 37

# Attributes of a Diagnosis with a value for each modality, beside the strength.
_PURITIES = ("train_purity", "val_purity", "gap", "noise_gap")
_COUNTS = ("train_count", "val_count")

_COLUMNS = ("modality", "train purity", "val purity", "gap", "strength", "samples (train + val)")


@dataclass(frozen=True)
class Options:
    """Checked options of a diagnosis, as `diagnose` describes them, with the seed that all ranks share."""

    lam: float
    normalize: Normalize
    forward: Forward | None
    classes: Classes | None
    max_samples: int
    equal_counts: bool
    gap: Gap
    pool: Pool
    n_init: int
    progress: bool | None
    seed: int
    group: Group

    def __post_init__(self) -> None:
        check_number("lam", self.lam, at_least=0)
        check_choice("normalize", self.normalize, get_args(Normalize))
        check_function("forward", self.forward, "(model, batch)")
        check_classes(self.classes)
        check_count("max_samples", self.max_samples, at_least=1)
        check_flag("equal_counts", self.equal_counts)
        check_choice("gap", self.gap, get_args(Gap))
        check_pool(self.pool)
        check_count("n_init", self.n_init, at_least=1)
        check_flag("progress", self.progress, or_none=True)

    @property
    def limit(self) -> int:
        """Upper limit of a modality's samples on this rank."""
        ranks = active_group(self.group)
        return self.max_samples if ranks is None else -(-self.max_samples // dist.get_world_size(ranks))


def options(seed: int | None, group: Group, **given: Any) -> Options:
    """Make `Options` with a seed that all ranks share."""
    check_group(group)
    return Options(seed=shared_seed(group, seed), group=group, **given)


@dataclass(frozen=True)
class Diagnosis:
    r"""Purities, purity gap and re-initialisation strength of each modality's encoder.

    The features of training and validation samples are clustered separately, into as many clusters as classes. Their
    purities \(P_D\) and \(P_V\) give the purity gap and the re-initialisation strength,

    $$g = |P_D - P_V|, \qquad \alpha = \tanh(\lambda g)$$

    An encoder with a large gap has overfitted its training samples (the dominant modality); an encoder whose purities
    are both low has learned little, or its modality says little. A gap no larger than that of noise means nothing.

    Attributes:
        train_purity: purity of the training samples by modality, in (0, 1]; nan where skipped.
        val_purity: purity of the validation samples by modality, in (0, 1]; nan where skipped.
        gap: purity gap by modality, in [0, 1); nan where skipped. A one-sided gap is 0 where validation is purer.
        strength: re-initialisation strength by modality, in [0, 1); 0 where skipped.
        train_count: training samples of one clustering by modality, over all ranks.
        val_count: validation samples of one clustering by modality, over all ranks.
        num_clusters: number of clusters, equal to the number of classes.
        skipped: the reason, for each modality without a diagnosis.
        epoch: epoch of a scheduler's diagnosis, counted from 1; None for others.
        noise_gap: mean gap by modality of features that are independent of the class, in clusters of equal sizes.
        classes: what the classes are, in words.

    Example:
        >>> purities = {"a": 0.9}, {"a": 0.8}
        >>> print(Diagnosis(*purities, {"a": 0.1}, {"a": 0.29}, {"a": 90}, {"a": 9}, num_clusters=3))
        modality  train purity  val purity     gap  strength  samples (train + val)
        a               0.9000      0.8000  0.1000    0.2900                 90 + 9
        3 classes: the labels

    Reference:
        Wei et al., Diagnosing and Re-learning for Balanced Multimodal Learning, ECCV 2024, Eq. 3-5.
    """

    train_purity: dict[str, float]
    val_purity: dict[str, float]
    gap: dict[str, float]
    strength: dict[str, float]
    train_count: dict[str, int]
    val_count: dict[str, int]
    num_clusters: int
    skipped: dict[str, str] = field(default_factory=dict)
    epoch: int | None = None
    noise_gap: dict[str, float] = field(default_factory=dict)
    classes: str = "the labels"

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities, in the order of the encoders."""
        return tuple(self.gap)

    @property
    def largest_gap(self) -> str | None:
        """The modality with the largest purity gap; None where no gap is above 0."""
        names = [name for name in self.gap if self.gap[name] > 0]
        return max(names, key=lambda name: self.gap[name]) if names else None

    def __str__(self) -> str:
        rows = [_COLUMNS, *(self._row(name) for name in self.gap)]
        widths = [max(len(row[i]) for row in rows if len(row) > 2) for i in range(len(_COLUMNS))]
        widths[0] = max(len(row[0]) for row in rows)
        lines = []
        for row in rows:
            cells = [row[0].ljust(widths[0]), *row[1:]]
            if len(row) > 2:
                cells[1:] = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            lines.append("  ".join(cells))
        lines.append(f"{self.num_clusters} classes: {self.classes}")
        if len(self.gap) > 1 and self.largest_gap is not None:
            lines.append(f"largest gap: {self.largest_gap}")
        return "\n".join(lines)

    def _row(self, name: str) -> tuple[str, ...]:
        if name in self.skipped:
            return (name, f"skipped: {self.skipped[name]}")
        values = (self.train_purity, self.val_purity, self.gap, self.strength)
        counts = f"{self.train_count[name]} + {self.val_count[name]}"
        return (name, *(f"{value[name]:.4f}" for value in values), counts)


def diagnose(
    train: Source,
    val: Source,
    *,
    monitor: ModalityMonitor | None = None,
    lam: float = 3.0,
    normalize: Normalize = "minmax",
    forward: Forward | None = None,
    classes: Classes | None = None,
    max_samples: int = 50_000,
    equal_counts: bool = True,
    gap: Gap = "absolute",
    pool: Pool = "auto",
    n_init: int = 1,
    seed: int | None = None,
    group: Group = None,
    progress: bool | None = None,
) -> Diagnosis:
    r"""Compare how well each modality's features separate the classes on training and on held-out samples.

    $$g^m = |P_D^m - P_V^m|$$

    with the purities P of k-means clusters, as many as classes. Nothing is changed: a loader is run through the model
    in eval mode, and modes, buffers and random streams are restored.

    Args:
        train: a loader, or `({modality: features (N, D)}, labels (N,))`.
        val: held-out samples, in either form.
        monitor: a `ModalityMonitor` on the model, required for loaders; `head=None` is enough.
        lam: factor of the re-initialisation strength, >= 0.
        normalize: `"minmax"` or `"none"`.
        forward: function of (model, batch) that runs the model, for other batches, and returns the labels: integers
            `(B,)`, or any targets as `{"labels": targets}`. Labels that it does not return are the batch's.
        classes: how targets become classes, whose number is the number of clusters. None for the rule of the
            monitor's loss: class indices, the most probable class of soft labels, and for other losses as follows.
            `"quantiles"` cuts numbers into ten bins, equally frequent among all training targets; `"label-set"` makes
            a class of each of the ten most frequent sets of labels in training, and one of all others; a function
            maps a batch's labels to class indices `(B,)`.
        max_samples: upper limit of each modality's samples in each split, over all ranks.
        equal_counts: cut the larger split into random parts of the smaller split's size, at most five, and average
            their purities, because fewer samples give a higher purity. False clusters all samples, as published.
        gap: `"absolute"`, as published; `"one-sided"` for $\max(0, P_D^m - P_V^m)$.
        pool: pooling rule for features of more than two dimensions.
        n_init: number of k-means starts, >= 1; the best one counts.
        seed: seed of k-means and of the choice of samples; None for `torch.initial_seed()` of the first rank.
        group: process group whose ranks hold parts of the samples; the monitor's group where one is given.
        progress: show a progress bar (tqdm); None for passes over ten seconds on a terminal where tqdm is installed.

    Returns:
        A `Diagnosis`; `print` shows a table.

    Raises:
        ValueError: for no samples, a single class, labels that do not fit the loss or `classes`, or an option outside
            its range.
        TypeError: for loaders without a monitor, and for data that is neither a loader nor features.
        KeyError: for features of a modality that the monitor does not have.

    Example:
        >>> import torch
        >>> labels = torch.arange(40) % 2
        >>> generator = torch.Generator().manual_seed(0)
        >>> sharp, blurred = labels[:, None] * 9.0, torch.randn(40, 1, generator=generator)
        >>> train, val = ({"a": sharp, "b": blurred}, labels), ({"a": blurred, "b": blurred}, labels)
        >>> result = diagnose(train, val, seed=0)
        >>> result.largest_gap, result.train_purity["a"], result.gap["b"]
        ('a', 1.0, 0.0)

    Reference:
        Wei et al., Diagnosing and Re-learning for Balanced Multimodal Learning, ECCV 2024, Eq. 1-5.
    """
    if monitor is not None:
        check_kind("`monitor`", monitor, ModalityMonitor, "a ModalityMonitor")
    chosen = options(
        seed,
        group if monitor is None else monitor.group,
        lam=lam,
        normalize=normalize,
        forward=forward,
        classes=classes,
        max_samples=max_samples,
        equal_counts=equal_counts,
        gap=gap,
        pool=pool,
        n_init=n_init,
        progress=progress,
    )
    samples = [
        collect_samples(source, split, monitor, chosen)
        for source, split in ((train, "training"), (val, "validation"))
    ]
    names = dict.fromkeys(name for source in (train, val) if is_given(source) for name in source[0])
    modalities = tuple(names) if monitor is None else monitor.modalities
    return diagnose_samples(modalities, samples[0], samples[1], chosen)


@dataclass(frozen=True)
class _Held:
    """Sizes and dtypes of one rank's samples of one modality."""

    train: int = 0
    val: int = 0
    width: int = 0
    usable: bool = True
    double: bool = False


def diagnose_samples(
    modalities: Sequence[str], training: Split, validation: Split, chosen: Options
) -> Diagnosis:
    """Diagnose each modality from collected samples, with the same result on all ranks.

    Raises:
        ValueError: if there are no training or no validation samples, only one class, or targets of several kinds.
    """
    fitted = fit_classes(training.kinds | validation.kinds, training.targets, chosen.group)
    train, val = (split.with_classes(fitted.of) for split in (training, validation))
    held, classes = _survey(modalities, train, val, chosen.group)
    counts = {name: (sum(h.train for h in held[name]), sum(h.val for h in held[name])) for name in modalities}
    _check(counts, classes)
    clusters = len(classes)
    skipped = {name: why for name in modalities if (why := _why_skipped(held[name], counts[name], clusters))}
    for name, why in skipped.items():
        warn_user(f"modality {name!r} was left out of the diagnosis: {why}.")
    ranks = active_group(chosen.group)
    compared: dict[str, dict[str, Any]] = {}
    for name in modalities:
        if name not in skipped:
            parts = (train.get(name), val.get(name))
            both = [_of_all_ranks(parts, side, held[name], chosen.group) for side in (0, 1)]
            # The first rank alone clusters the features, whose size is bounded, so that all ranks get one result.
            if ranks is None or dist.get_rank(ranks) == 0:
                compared[name] = _compare(both, clusters, chosen)
    compared = of_first_rank(compared, chosen.group)
    _warn_of_noise(compared)
    nothing: dict[str, Any] = {**dict.fromkeys(_PURITIES, math.nan), "strength": 0.0}
    # A skipped modality has the counts of all collected samples.
    rows = {
        name: compared.get(name) or {**nothing, **dict(zip(_COUNTS, counts[name], strict=True))}
        for name in modalities
    }
    columns: dict[str, Any] = {
        quantity: {name: row[quantity] for name, row in rows.items()} for quantity in (*nothing, *_COUNTS)
    }
    return Diagnosis(**columns, num_clusters=clusters, skipped=skipped, classes=fitted.name)


def _survey(
    modalities: Sequence[str], train: Mapping[str, Samples], val: Mapping[str, Samples], group: Group
) -> tuple[dict[str, list[_Held]], set[int]]:
    """Gather each rank's sizes and dtypes of each modality, and the classes of all ranks."""
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
    """Gather the training (side 0) or validation (side 1) samples of all ranks, in float32 or wider."""
    samples = parts[side]
    if samples is None:
        device = next((s.features.device for s in parts if s is not None), torch.device("cpu"))
        width = max(h.width for h in held)
        samples = Samples(
            torch.empty(0, width, dtype=torch.float32, device=device),
            torch.empty(0, dtype=torch.int64, device="cpu"),
        )
    # Scaling and clustering in half precision would be too coarse.
    features = samples.features.to(torch.float64 if any(h.double for h in held) else torch.float32)
    rows = [h.val if side else h.train for h in held]
    labels = samples.labels.to(features.device)
    return Samples(concatenate_over_ranks(features, rows, group), concatenate_over_ranks(labels, rows, group))


def _compare(both: Sequence[Samples], clusters: int, chosen: Options) -> dict[str, Any]:
    """Compare the purities of one modality's training and validation samples, and compute the gaps of noise.

    Returns the modality's entries of a `Diagnosis`, and "noise_bound", which bounds 95 % of the gaps of noise.
    """
    sizes = [len(samples) for samples in both]
    if chosen.equal_counts:
        number = min(_PARTS, max(sizes) // min(sizes))
        splits = [samples.parts(min(sizes), number, chosen.seed) for samples in both]
    else:
        splits = [[samples] for samples in both]
    clustered = [[_cluster(part, i, clusters, chosen) for i, part in enumerate(parts)] for parts in splits]
    train, val = map(_purity, clustered)
    gap = _gap(train, val, chosen.gap)
    strength = float(reinit_strength(torch.tensor(gap, dtype=torch.float64, device="cpu"), chosen.lam))
    # Shuffled labels are independent of the features, as those of noise are.
    generator = torch.Generator().manual_seed(chosen.seed)
    shuffled = (map(partial(_purity, shuffled=generator), clustered) for _ in range(_SHUFFLES))
    noise = sorted(_gap(by_chance, other, chosen.gap) for by_chance, other in shuffled)
    purities = zip(_PURITIES, (train, val, gap, sum(noise) / _SHUFFLES), strict=True)
    counts = zip(_COUNTS, (len(parts[0]) for parts in splits), strict=True)
    return {**dict(purities), **dict(counts), "strength": strength, "noise_bound": noise[_WITHIN]}


def _cluster(samples: Samples, number: int, clusters: int, chosen: Options) -> tuple[Tensor, Tensor]:
    """Cluster samples; return the index of each sample's cluster, and the labels."""
    features = minmax_scale(samples.features) if chosen.normalize == "minmax" else samples.features
    # Every modality and split has the same seed, so that equal features have no gap.
    generator = torch.Generator().manual_seed(chosen.seed + number)
    result = kmeans(features, clusters, generator=generator, n_init=chosen.n_init)
    return result.assignments, samples.labels


def _purity(parts: Sequence[tuple[Tensor, Tensor]], shuffled: torch.Generator | None = None) -> float:
    """Compute the mean purity of parts of equal size, with shuffled labels where a generator is given."""
    size = len(parts[0][1])
    order = None if shuffled is None else torch.randperm(size, generator=shuffled, device="cpu")
    shares = (
        float(purity(clusters, labels if order is None else labels[order.to(labels.device)]))
        for clusters, labels in parts
    )
    return sum(round(share * size) for share in shares) / (size * len(parts))  # without float32's rounding


def _gap(train: float, val: float, gap: Gap) -> float:
    return abs(train - val) if gap == "absolute" else max(0.0, train - val)


def _warn_of_noise(compared: Mapping[str, Mapping[str, float]]) -> None:
    """Warn of gaps that noise would give as well."""
    within = [
        f"{name!r} {row['gap']:.3f}, where noise gives {row['noise_gap']:.3f} in the mean and up to "
        f"{row['noise_bound']:.3f}"
        for name, row in compared.items()
        if 0 < row["gap"] <= row["noise_bound"]
    ]
    if within:
        warn_user(
            f"the gap between training and validation purity says nothing of these modalities: {'; '.join(within)}. "
            "More validation samples make it telling; gap='one-sided' leaves an encoder alone whose validation "
            "samples are the purer ones."
        )
