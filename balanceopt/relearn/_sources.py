"""Where samples come from: loaders, or feature matrices that the user made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor

from balanceopt._pooling import Pool, pool_features
from balanceopt.monitor import ModalityMonitor
from balanceopt.relearn._passes import collect
from balanceopt.relearn._purities import Options
from balanceopt.relearn._samples import Collector, Samples
from balanceopt.relearn._undisturbed import Forward

Features = tuple[Mapping[str, Tensor], Tensor]
Source = Iterable[Any] | Features


def is_given(source: Any) -> TypeGuard[Features]:
    """Whether these are features by modality with labels, not a loader."""
    return isinstance(source, tuple) and len(source) == 2 and isinstance(source[0], Mapping)


def samples_of(
    source: Source,
    split: str,
    monitor: ModalityMonitor | None,
    chosen: Options,
    forward: Forward | None,
    progress: bool | None,
) -> dict[str, Samples]:
    """Samples of a loader, from a pass over it, or of features given.

    Raises:
        TypeError: for a loader without a monitor.
    """
    if is_given(source):
        known = None if monitor is None else monitor.modalities
        return _given(source, split, known, chosen)
    if monitor is None:
        raise TypeError(
            f"the {split} data should be (features by modality, labels) where no monitor is given. Found "
            f"{type(source).__name__}: pass `monitor=` to take the features from a pass over a loader."
        )
    return collect(monitor, source, chosen, split=split, forward=forward, progress=progress)


def _given(
    source: Features, split: str, modalities: tuple[str, ...] | None, chosen: Options
) -> dict[str, Samples]:
    features, labels = source
    unknown = sorted(features.keys() - set(modalities or features))
    if unknown:
        raise KeyError(f"{split} features should be given by modality {modalities}. Found {unknown}.")
    collector = Collector(
        tuple(features),
        lambda _, z: _pooled(z, chosen.pool),
        limit=chosen.limit,
        seed=chosen.seed,
        ignore_index=-100,
        where=f"given with the {split} features",
    )
    collector.add({name: torch.as_tensor(z) for name, z in features.items()}, labels)
    return collector.result()


def _pooled(features: Tensor, pool: Pool) -> Tensor:
    return pool_features(features, pool)
