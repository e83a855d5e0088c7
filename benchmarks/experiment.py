"""Train one model in several ways on the same data and seeds, and keep what a reader wants to know."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

import balanceopt as bo
from benchmarks.data import MultimodalData
from benchmarks.methods import Build
from benchmarks.models import classifier_for
from benchmarks.training import Recipe, evaluate, fit, linear_probe, train_alone

Curves = dict[str, dict[str, np.ndarray]]


@dataclass(frozen=True)
class Outcome:
    """One training: accuracies in percent on the test samples.

    Args:
        accuracy: of the model.
        probes: of a linear probe on each modality's encoder.
        curves: quantity -> modality -> value at each step (score, ratio, coefficient).
    """

    accuracy: float
    probes: dict[str, float]
    curves: Curves

    def mean(self, quantity: str, modality: str) -> float:
        """Mean over the whole training, nan if it was not recorded."""
        values = self.curves.get(quantity, {}).get(modality)
        return float("nan") if values is None else float(values.mean())


@dataclass(frozen=True)
class Comparison:
    """What came out, one entry a seed.

    Args:
        data: those of the first seed.
        recipe: how each model was trained.
        alone: modality -> outcomes of its encoder trained by itself.
        methods: method -> outcomes.
    """

    data: MultimodalData
    recipe: Recipe
    alone: dict[str, list[Outcome]]
    methods: dict[str, list[Outcome]]

    @property
    def seeds(self) -> int:
        """How many seeds were run."""
        return len(next(iter(self.methods.values())))


def compare(
    load: Callable[[int], MultimodalData],
    methods: Mapping[str, Build],
    recipe: Recipe,
    seeds: Sequence[int] = (0,),
    on_epoch: Callable[[str], object] = lambda what: None,
) -> Comparison:
    """Train each modality alone and the whole model with each method, for each seed.

    Args:
        load: the data of a seed.
        methods: name -> what puts it around the loop.
        recipe: the same for all.
        seeds: of data, initial weights, batches and noise.
        on_epoch: told what is being trained, after each epoch.
    """
    sets = {seed: load(seed) for seed in seeds}
    first = next(iter(sets.values()))
    alone: dict[str, list[Outcome]] = {name: [] for name in first.modalities}
    together: dict[str, list[Outcome]] = {name: [] for name in methods}
    for seed, data in sets.items():
        for modality, found in alone.items():
            found.append(_alone(data, modality, recipe, seed, partial(on_epoch, f"{modality} alone")))
        for name, build in methods.items():
            together[name].append(_together(data, build, recipe, seed, partial(on_epoch, name)))
    return Comparison(first, recipe, alone, together)


def runs(data: MultimodalData, methods: Mapping[str, Build], seeds: Sequence[int]) -> int:
    """How many models `compare` trains."""
    return (len(data.modalities) + len(methods)) * len(seeds)


def _alone(
    data: MultimodalData, modality: str, recipe: Recipe, seed: int, on_epoch: Callable[[], object]
) -> Outcome:
    model = train_alone(data, modality, recipe, seed=seed, on_epoch=on_epoch)
    probe = linear_probe(model.encoders[modality], data, modality)
    return Outcome(evaluate(model, data.test), {modality: probe}, {})


def _together(
    data: MultimodalData, build: Build, recipe: Recipe, seed: int, on_epoch: Callable[[], object]
) -> Outcome:
    torch.manual_seed(seed)
    model = classifier_for(data)
    recorder = fit(model, build, data, recipe, seed=seed, on_epoch=on_epoch)
    probes = {name: linear_probe(encoder, data, name) for name, encoder in model.encoders.items()}
    return Outcome(evaluate(model, data.test), probes, _curves(recorder))


def _curves(recorder: bo.Recorder | None) -> Curves:
    """What was recorded as arrays; the only place that knows the recorder's form."""
    if recorder is None:
        return {}
    # Two methods on one monitor tell the same ratio of the same step: once is enough.
    at: dict[str, dict[str, dict[int, float]]] = {}
    for row in recorder.rows():
        at.setdefault(row.quantity, {}).setdefault(row.modality, {})[row.step] = row.value
    return {
        quantity: {name: np.array(list(values.values())) for name, values in series.items()}
        for quantity, series in at.items()
    }
