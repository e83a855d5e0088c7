"""The samples of a split, taken from a pass over a loader or from given features."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, TypeGuard

from torch import Tensor

from balanceopt._options import names_of, shown, to_tensor
from balanceopt._pooling import pool_features
from balanceopt.monitor import ModalityMonitor
from balanceopt.relearn._features import Collector, Forward, Samples, collect
from balanceopt.relearn._options import Options

Features = tuple[Mapping[str, Tensor], Tensor]
Source = Iterable[Any] | Features


def is_given(source: Any) -> TypeGuard[Features]:
    """Whether a source is features by modality with labels, not a loader."""
    return isinstance(source, tuple) and len(source) == 2 and isinstance(source[0], Mapping)


def check_loader(role: str, loader: object) -> None:
    """Check that a loader can yield batches.

    Raises:
        TypeError: if `loader` is not iterable, or a class, string or tensor.
    """
    iterable = isinstance(loader, Iterable) or hasattr(loader, "__getitem__")
    if not iterable or isinstance(loader, (type, str, Tensor)):
        raise TypeError(
            f"{role} should be a loader that yields batches: (*inputs, labels), or mappings with 'labels'. "
            f"Found {shown(loader)}."
        )


def collect_samples(
    source: Source,
    split: str,
    monitor: ModalityMonitor | None,
    chosen: Options,
    forward: Forward | None,
    progress: bool | None,
) -> dict[str, Samples]:
    """Collect each modality's samples from a pass over a loader, or from given features.

    Raises:
        TypeError: for a loader without a monitor, and for a source that is neither a loader nor features.
        KeyError: for features of a modality that the monitor does not have.
        ValueError: for features that are not real numbers.
    """
    collector_of = partial(Collector, limit=chosen.limit, seed=chosen.seed, classes=chosen.classes)
    if is_given(source):
        features, labels = source
        modalities = tuple(features) if monitor is None else monitor.modalities
        unknown = features.keys() - set(modalities)
        if unknown:
            raise KeyError(
                f"{split} features should be given by modality {modalities}. Found {names_of(unknown)}."
            )
        tensors = {name: _numbers(f"the {split} features of {name!r}", z) for name, z in features.items()}
        collector = collector_of(
            modalities,
            lambda _, z, samples: pool_features(z, chosen.pool, samples=samples),
            ignore_index=-100,
            where=f"given with the {split} features",
        )
        collector.add(tensors, labels)
        return collector.samples()
    if monitor is None:
        raise TypeError(
            f"the {split} data should be (features by modality, labels) where no monitor is given. Found "
            f"{shown(source)}: pass `monitor=` to take the features from a pass over a loader."
        )
    check_loader(f"the {split} data", source)
    projections = monitor.features.projections
    collector = collector_of(
        monitor.modalities,
        lambda name, z, samples: pool_features(z, chosen.pool, projections.get(name), samples),
        ignore_index=monitor.labels.ignore_index,
        where=f"from the {split} loader",
        has_frames=lambda name: projections.get(name) is not None,
    )
    collect(monitor, source, collector, split, forward, progress)
    return collector.samples()


def _numbers(role: str, features: Any) -> Tensor:
    """Check given features and convert integers to float32."""
    z = to_tensor(role, features, "a tensor (N, D)")
    if z.is_complex() or z.dim() == 0:
        raise ValueError(
            f"{role} should be real numbers (N, D). Found shape {tuple(z.shape)}, dtype {z.dtype}."
        )
    return z if z.is_floating_point() else z.float()
