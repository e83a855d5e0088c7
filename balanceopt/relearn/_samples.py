"""Features with their labels, by modality, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Samples:
    """One modality's samples.

    Attributes:
        features: `(N, D)`.
        labels: `(N,)` int64, on the CPU.
    """

    features: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def nbytes(self) -> int:
        """Memory of the features."""
        return self.features.numel() * self.features.element_size()

    def at(self, rows: Tensor) -> Samples:
        """The samples of some rows, given as indices on the CPU."""
        return Samples(self.features[rows.to(self.features.device)], self.labels[rows])


def checked_labels(labels: Any, where: str) -> Tensor:
    """Class indices `(N,)` int64 on the CPU.

    Raises:
        ValueError: if they are not integers, or not one for each sample.
    """
    values = torch.as_tensor(labels).detach()
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise ValueError(
            f"labels {where} should be integers, a class index each. Found dtype {values.dtype}."
        )
    if values.dim() == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.dim() != 1:
        raise ValueError(f"labels {where} should have shape (N,). Found {tuple(values.shape)}.")
    return values.to("cpu", torch.int64)


def balanced(labels: Tensor, keys: Tensor, limit: int) -> Tensor:
    """Indices, in order, of at most `limit` samples: as equal a number of each class as there are.

    Within a class those of the smallest keys stay, so what is dropped from a part of the samples would be dropped from
    all of them too.
    """
    order = torch.argsort(keys, stable=True)
    order = order[torch.argsort(labels[order], stable=True)]
    counts = torch.unique_consecutive(labels[order], return_counts=True)[1]
    first = counts.cumsum(0) - counts
    # Its place among its own class. Of all samples in order of that place, keys breaking ties, the first ones stay.
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order)) - first.repeat_interleave(counts)
    by_key = torch.argsort(keys, stable=True)
    kept = by_key[torch.argsort(place[by_key], stable=True)][:limit]
    return kept.sort().values


class Reservoir:
    """Samples of one modality, at most `limit` of them and an eighth more while they come in."""

    def __init__(self, limit: int) -> None:
        """Hold at most `limit` samples."""
        self.limit = limit
        self._features: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._keys: list[Tensor] = []
        self._rows = 0

    def add(self, features: Tensor, labels: Tensor, keys: Tensor) -> None:
        """Take `(B, D)` features with their labels and random keys `(B,)`."""
        if self._features and features.shape[1] != self._features[0].shape[1]:
            raise ValueError(
                f"features should have the same width in every batch. Found {self._features[0].shape[1]} and "
                f"{features.shape[1]}."
            )
        self._features.append(features)
        self._labels.append(labels)
        self._keys.append(keys)
        self._rows += len(labels)
        if self._rows > self.limit + self.limit // 8:
            self._prune()

    def samples(self) -> Samples:
        """What is held."""
        if self._rows > self.limit:
            self._prune()
        return Samples(torch.cat(self._features), torch.cat(self._labels))

    def _prune(self) -> None:
        labels, keys = torch.cat(self._labels), torch.cat(self._keys)
        kept = balanced(labels, keys, self.limit)
        features = torch.cat(self._features)
        self._features = [features[kept.to(features.device)]]
        self._labels, self._keys, self._rows = [labels[kept]], [keys[kept]], len(kept)


class Collector:
    """Take the features of batches, by modality.

    Args:
        modalities: names.
        as_vectors: makes `(B, D)` of a modality's features.
        limit: most samples to keep of each modality.
        seed: of the choice among more.
        ignore_index: label of samples to leave out.
        where: where the samples come from, for messages.
    """

    def __init__(
        self,
        modalities: tuple[str, ...],
        as_vectors: Callable[[str, Tensor], Tensor],
        *,
        limit: int,
        seed: int,
        ignore_index: int,
        where: str,
    ) -> None:
        self.modalities = modalities
        self.where = where
        self._as_vectors = as_vectors
        self._ignore = ignore_index
        self._generator = torch.Generator().manual_seed(seed)
        self._held = {name: Reservoir(limit) for name in modalities}

    def add(self, features: Mapping[str, Tensor], labels: Any) -> None:
        """Take one batch; a modality that it lacks is left out.

        Raises:
            ValueError: if labels are not integers, or not one for each row of features.
        """
        classes = checked_labels(labels, self.where)
        keys = torch.rand(len(classes), generator=self._generator, dtype=torch.float64)
        counted = (classes != self._ignore).nonzero()[:, 0]
        for name, z in features.items():
            if len(z) != len(classes):
                raise ValueError(
                    f"the encoder of {name!r} returned {len(z)} rows for {len(classes)} labels {self.where}. Pass "
                    "`select=` to the monitor: a function from the encoder's output to one row for each sample."
                )
            vectors = self._as_vectors(name, z.detach())
            if len(counted) < len(classes):
                vectors = vectors[counted.to(vectors.device)]
            if len(counted):
                self._held[name].add(vectors, classes[counted], keys[counted])

    def result(self) -> dict[str, Samples]:
        """Each modality's samples; modalities without any are left out."""
        return {name: held.samples() for name, held in self._held.items() if held._rows}


def random_rows(samples: Samples, count: int, seed: int) -> Samples:
    """A random part of `count` samples, in their order."""
    if len(samples) <= count:
        return samples
    generator = torch.Generator().manual_seed(seed)
    return samples.at(torch.randperm(len(samples), generator=generator)[:count].sort().values)
