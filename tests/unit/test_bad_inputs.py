"""Bad input of every public call is refused by a sentence of this package that names the argument; nothing is changed.

Each row of the table is a call with good arguments and, by argument, bad ones; each bad one is given alone.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import balanceopt as bo
from balanceopt import functional
from balanceopt.integrations._callback import Balance
from balanceopt.plotting import plot_rows
from tests.models import CLASSES, batch, train_step, watch
from tests.relearning import samples
from tests.training import groups_of, sgd, small_model

PACKAGE = Path(bo.__file__).parent

NAN, INF = math.nan, math.inf
NO_NUMBER: list[Any] = [NAN, INF, -INF, "0.1", None, True, [0.1], 1j, torch.tensor(0.1), float]
NEGATIVE: list[Any] = [*NO_NUMBER, -0.1]
NO_PART: list[Any] = [*NEGATIVE, 1.1]
NO_COUNT: list[Any] = [NAN, INF, 1.5, 2.0, "2", True, [2], 1j, torch.tensor(2), -1, int]
NO_SIZE: list[Any] = [*NO_COUNT, None, 0]
NO_SEED: list[Any] = [NAN, 1.5, "a", True, [1], torch.tensor(1), torch.Generator()]
NO_FLAG: list[Any] = [None, "yes", 1, 0.0, [], torch.tensor(True)]
NO_CHOICE: list[Any] = ["other", "", 3, None, NAN, ["cvpr"], torch.tensor(1)]
NO_FUNCTION: list[Any] = [3, "mean", [len], nn.Module]
NO_TENSOR: list[Any] = [None, 3, "a", [1.0, 2.0], {}, Tensor]
NO_REAL: list[Any] = [*NO_TENSOR, torch.ones(2, dtype=torch.cfloat), torch.ones(2).to_sparse()]
NO_VECTOR: list[Any] = [*NO_REAL, torch.ones(2, 2), torch.tensor(1.0)]
NO_MODULE: list[Any] = [None, 3, nn.Linear, "model", torch.ones(2)]
NO_MONITOR: list[Any] = [None, 3, bo.ModalityMonitor, nn.Linear(1, 1), "monitor"]
NO_OPTIMIZER: list[Any] = [None, 3, torch.optim.SGD, [nn.Linear(1, 1)], "adam"]
NO_MODULATION: list[Any] = [3, bo.OGM, "OGM", [], [bo.OGM], [bo.OGM(), None], {}]
NO_MAPPING: list[Any] = [3, "a", ["audio"], dict]
NO_GROUP: list[Any] = [3, "world", True]
NO_PATH: list[Any] = [3, [], b"a"]
NO_LOADER: list[Any] = [3, "train", torch.utils.data.DataLoader, torch.ones(2, 2)]
NO_LABELS: list[Any] = [None, "a", [None], 3, {}, torch.zeros(8, dtype=torch.cfloat)]
NO_STATE: list[Any] = [None, 3, {}, [], "state"]
NO_THRESHOLD: list[Any] = [value for value in NO_NUMBER if value != INF]
NO_PRESENT: list[Any] = [3, "a", [True, False], torch.ones(2), torch.ones(3).bool(), torch.tensor(True)]
NO_FLAGS: list[Any] = [3, "a", [True], torch.ones(2, 4), torch.ones(2).bool(), torch.ones(3, 4).bool()]
LOSSES = ("train_before", "train_after", "val_before", "val_after")
NO_GENERATOR: list[Any] = [3, "cpu", torch.Generator]


# Stands for what the model returns.
JOINT = object()


class World:
    """What a call can change: a model, its monitor, an optimizer, a watched pass."""

    def __init__(self) -> None:
        self.model = small_model()
        self.monitor = watch(self.model)
        self.optimizer: torch.optim.Optimizer = sgd(groups_of(self.model))
        self.inputs, self.labels = batch()

    @cached_property
    def wrapper(self) -> bo.ModulatedOptimizer:
        return bo.ModulatedOptimizer(self.optimizer, self.monitor, bo.OGM(noise=False))

    def fingerprint(self) -> list[Any]:
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        modules = [[len(getattr(m, kind)) for kind in kinds] + [m.training] for m in self.model.modules()]
        parameters = [
            (len(p._backward_hooks or ()), len(p._post_accumulate_grad_hooks or ()), p.grad is None)
            for p in self.model.parameters()
        ]
        monitor = self.monitor
        hooks_of = monitor.hooks
        heard = hooks_of.outputs, hooks_of.transforms, hooks_of.links, hooks_of.gradients
        listeners = [len(x) for x in heard]
        waiting = [len(monitor._scorer.buffers), monitor.labels._next is None]
        attributes = {name: id(value) for name, value in vars(self.optimizer).items()}
        hooks = [len(v) for name, v in vars(self.optimizer).items() if name.endswith("_hooks")]
        groups = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self.optimizer.param_groups
        ]
        stream = torch.get_rng_state().tolist()
        return [modules, parameters, listeners, waiting, attributes, hooks, groups, stream]


@dataclass
class Row:
    """A public call.

    Attributes:
        call: is given a world and keyword arguments.
        good: arguments that are taken, made for a world.
        bad: by argument, values that are refused.
        of: what the docstring with `Raises:` belongs to.
        named: what a message names where that is not the argument, by argument.
    """

    call: Callable[..., Any]
    of: Any
    bad: dict[str, Sequence[Any]]
    good: Callable[[World], dict[str, Any]] = lambda world: {}
    named: dict[str, str] = field(default_factory=dict)


def function(
    of: Callable[..., Any], good: dict[str, Any], bad: dict[str, Sequence[Any]], **named: str
) -> Row:
    return Row(lambda world, **given: of(**given), of, bad, lambda world: dict(good), named)


def wrapped(world: World, **given: Any) -> bo.ModulatedOptimizer:
    return bo.ModulatedOptimizer(**{"optimizer": world.optimizer, "monitor": world.monitor, **given})


def scheduler(world: World, **given: Any) -> bo.ReLearnScheduler:
    loader = torch.utils.data.DataLoader(samples(20), batch_size=10)
    defaults = {"optimizer": world.optimizer, "monitor": world.monitor, "every": 1, "epochs": 9, "seed": 0}
    return bo.ReLearnScheduler(**{**defaults, "train_loader": loader, "val_loader": loader, **given})


def composed(world: World, **given: Any) -> None:
    loader = torch.utils.data.DataLoader(samples(20), batch_size=10)
    options = {"train_loader": loader, "val_loader": loader, "epochs": 5, "seed": 0}
    parts = {"model": world.model, "encoders": world.model.modalities, "optimizer": world.optimizer}
    bo.balance(**{**parts, "out_features": CLASSES, **options, **given}).remove()


def objective(world: World, **given: Any) -> bo.UnimodalObjective:
    return bo.UnimodalObjective(**{"monitor": world.monitor, "out_features": CLASSES, **given})


def blending(world: World, **given: Any) -> bo.BlendScheduler:
    with objective(world) as part, bo.ProbeMonitor(world.monitor, losses=True) as probes:
        return bo.BlendScheduler(**{"objective": part, "probes": probes, **given})


def prediction_of(world: World, logits: Any, **given: Any) -> Tensor:
    with objective(world) as part:
        world.model(*world.inputs)
        part(world.labels)
        try:
            world.model.eval()
            with torch.no_grad():
                joint = world.model(*world.inputs)
            return part.predict(joint if logits is JOINT else logits, **given)
        finally:
            world.model.train()


def loss_of(world: World, labels: Any, **given: Any) -> Tensor:
    with objective(world, **given) as part:
        world.model(*world.inputs)
        result: Tensor = part(labels)
        return result


def correlation_of(world: World, labels: Any) -> Tensor:
    with bo.TotalCorrelationLoss(world.monitor) as part:
        world.model(*world.inputs)
        result: Tensor = part(labels)
        return result


def watched(world: World, **given: Any) -> bo.ModalityMonitor:
    model = world.model
    defaults: dict[str, Any] = {"model": model, "encoders": model.modalities, "head": model.heads}
    return bo.ModalityMonitor(**{**defaults, **given})


def observed(world: World, **given: Any) -> None:
    train_step(world.model, world.inputs, world.labels)
    world.model.zero_grad()
    world.monitor.observe(**given)


@cache
def recorded() -> bo.Recorder:
    """A recorder of one training step, taken off again."""
    world = World()
    with bo.Recorder(world.monitor) as recorder:
        train_step(world.model, world.inputs, world.labels)
        world.optimizer.step()
        train_step(world.model, world.inputs, world.labels)
    return recorder


def masked(world: World, **given: Any) -> bo.MaskedSubnetworkSGD:
    defaults = {"params": world.model.parameters(), "monitor": world.monitor, "lr": 0.1}
    return bo.MaskedSubnetworkSGD(**{**defaults, **given})


FEATURES = {"a": torch.randn(20, 3), "b": torch.randn(20, 2)}
TWENTY = torch.arange(20) % 2
ONES, FOUR = torch.ones(2), torch.zeros(4, 3)
WINDOW: dict[str, Sequence[Any]] = {"start": [*NO_COUNT, None], "end": NO_COUNT, "unit": NO_CHOICE}
ENCODERS: list[Any] = [
    *(None, 3, "audio", {}, [nn.Linear(1, 1)], {"audio": 3}, {"audio": None}, {"audio": nn.Linear}),
    *({None: "encoders.audio"}, {"": "encoders.audio"}, {3: "encoders.audio"}, {"audio": "nowhere"}),
    {"audio": nn.Linear(2, 2)},
]
SLICES: list[Any] = [
    *(3, [slice(0, 4)], {"audio": (0, 4)}, {"audio": 3}, {"audio": slice(0.0, 4)}, {"audio": slice("a", 4)}),
    *({"audio": slice(0, 4, 2)}, {"smell": slice(0, 4)}, {3: slice(0, 4)}, {"audio": slice(0, 99)}),
    {"audio": slice(4, 4)},
]
DIAGNOSIS: dict[str, Sequence[Any]] = {
    "lam": NEGATIVE,
    "normalize": NO_CHOICE,
    "forward": NO_FUNCTION,
    "classes": NO_FUNCTION,
    "max_samples": NO_SIZE,
    "equal_counts": NO_FLAG,
    "gap": NO_CHOICE,
    "pool": [3, "median", None],
    "n_init": NO_SIZE,
    "seed": NO_SEED,
    "progress": ["yes", 1],
}

ROWS: dict[str, Row] = {
    # functional
    "true_class_score": function(
        functional.true_class_score,
        {"logits": FOUR, "labels": torch.tensor([0, 1, 2, -100])},
        {
            "logits": [*NO_REAL, torch.ones(3), torch.ones(5, 3)],
            "labels": [
                *NO_TENSOR,
                *NO_LABELS[5:],
                torch.zeros(3).long(),
                torch.tensor([0, 1, 2, 3]),
                FOUR + 7,
            ],
            "ignore_index": [1.5, "a", None],
        },
    ),
    "likelihood_score": function(
        functional.likelihood_score,
        {"predictions": FOUR, "target": torch.tensor([0, 1, 2, -100]), "loss": None},
        {
            "predictions": [*NO_REAL, torch.ones(3), torch.ones(5, 3)],
            "target": [*NO_REAL, torch.zeros(3).long(), torch.tensor([0, 1, 2, 3]), FOUR + 7, torch.zeros(4)],
            "loss": [3, "mse", nn.MSELoss, nn.TripletMarginLoss(), nn.NLLLoss()],
            "baseline": [NAN, 0, -1.0, "1", torch.tensor(0.0), ONES],
        },
        target="(target|labels|predictions)",
        predictions="(predictions|target)",
    ),
    "centred_predictions": function(
        functional.centred_predictions,
        {"unimodal": torch.ones(2, 4, 3), "joint": FOUR},
        {
            "unimodal": [*NO_REAL, FOUR],
            "joint": [*NO_REAL, ONES],
            "present": [3, ONES, torch.ones(2, 4), torch.ones(4).bool()],
        },
    ),
    "quantile_classes": function(
        functional.quantile_classes,
        {"targets": torch.arange(4.0)},
        {"targets": [*NO_REAL, FOUR, torch.tensor([NAN])], "bins": [*NO_SIZE, 1]},
    ),
    "label_set_classes": function(
        functional.label_set_classes,
        {"multi_hot": FOUR},
        {"multi_hot": [*NO_REAL, ONES, FOUR[:0]], "most": NO_SIZE},
    ),
    "discrepancy_ratio": function(
        functional.discrepancy_ratio,
        {"scores": ONES},
        {
            "scores": [*NO_VECTOR, torch.ones(0)],
            "reduction": NO_CHOICE,
            "present": [3, "a", [True, False], ONES, torch.ones(3, dtype=torch.bool), torch.tensor(True)],
        },
    ),
    "modulation_coefficient": function(
        functional.modulation_coefficient,
        {"ratio": ONES, "alpha": 0.1},
        {"ratio": NO_REAL, "alpha": NEGATIVE, "form": NO_CHOICE},
    ),
    "drop_probability": function(
        functional.drop_probability, {"ratio": ONES}, {"ratio": NO_REAL, "q_base": NO_PART, "lam": NEGATIVE}
    ),
    "adaptive_coefficient": function(
        functional.adaptive_coefficient,
        {"cross_entropy": ONES, "running": ONES},
        {
            "cross_entropy": [*NO_VECTOR, torch.ones(0)],
            "running": [*NO_VECTOR, torch.ones(0), torch.ones(3)],
            "alpha": NEGATIVE,
            "cap": NEGATIVE,
            "present": NO_PRESENT,
        },
    ),
    "balance_coefficient": function(
        functional.balance_coefficient,
        {"score": ONES},
        {
            "score": [*NO_VECTOR, torch.ones(0)],
            "alpha": NEGATIVE,
            "beta": [*NEGATIVE, 0.9],
            "present": NO_PRESENT,
        },
    ),
    "priority_coefficients": function(
        functional.priority_coefficients,
        {"accuracy": ONES},
        {"accuracy": [*NO_VECTOR, torch.ones(0)], "boost": NEGATIVE, "damp": NEGATIVE},
    ),
    "regulation_strength": function(
        functional.regulation_strength,
        {"cross_entropy": ONES},
        {"cross_entropy": [*NO_VECTOR, torch.ones(0)], "beta": NEGATIVE, "present": NO_PRESENT},
    ),
    "blend_weights": function(
        functional.blend_weights,
        dict.fromkeys(LOSSES, ONES),
        {
            **{name: [*NO_VECTOR, torch.ones(0), torch.ones(4)] for name in LOSSES},
            "floor": [*NO_PART, 0, 0.0001],
        },
        train_before="(train_before|val_after|val_before|train_after)",
    ),
    "in_prime_window": function(
        functional.in_prime_window,
        {"trace": ONES},
        {"trace": [*NO_REAL, torch.tensor(1.0), torch.ones(2, 2, 2)], "threshold": NO_THRESHOLD},
    ),
    "kept_modalities": function(
        functional.kept_modalities,
        {"p": torch.tensor([0.5, 0.0]), "samples": 4, "generator": torch.Generator()},
        {
            "p": [
                *NO_VECTOR,
                *(
                    torch.ones(0),
                    torch.tensor([-0.1, 0.5]),
                    torch.tensor([0.5, 1.1]),
                    torch.tensor([NAN, 0.5]),
                ),
            ],
            "samples": [*NO_COUNT, None],
            "generator": NO_GENERATOR,
            "present": NO_FLAGS,
        },
    ),
    "kept_but_one": function(
        functional.kept_but_one,
        {"modalities": 2, "samples": 4, "generator": torch.Generator()},
        {
            "modalities": NO_SIZE,
            "samples": [*NO_COUNT, None],
            "generator": NO_GENERATOR,
            "present": NO_FLAGS,
            "device": ["cpu", 3.5, [], torch.device],
        },
    ),
    "vote": function(
        functional.vote,
        {"logits": torch.ones(2, 4, 3)},
        {
            "logits": [*NO_REAL, torch.ones(4, 3), torch.ones(0, 4, 3)],
            "present": NO_FLAGS,
            "answers": [*NO_CHOICE, "numbers"],
        },
    ),
    "effective_rank": function(
        functional.effective_rank, {"features": FOUR}, {"features": [*NO_REAL, torch.ones(2, 2, 2)]}
    ),
    "agreement": function(
        functional.agreement,
        {"logits": torch.ones(2, 4, 3), "joint": FOUR},
        {
            "logits": [*NO_REAL, FOUR],
            "joint": [*NO_REAL, ONES, torch.ones(5, 3), torch.ones(4, 2)],
            "kind": NO_CHOICE,
        },
    ),
    "QuantileClasses": function(
        functional.quantile_classes(torch.arange(4.0)).__call__,
        {"targets": torch.arange(4.0)},
        {"targets": [*NO_REAL, FOUR, torch.tensor([NAN])]},
    ),
    "LabelSetClasses": function(
        functional.label_set_classes(FOUR).__call__,
        {"multi_hot": FOUR},
        {"multi_hot": [*NO_REAL, ONES, torch.ones(4, 2)]},
    ),
    "mixed_gradient": function(
        functional.mixed_gradient,
        {"joint": ONES, "unimodal": ONES},
        {"joint": [None, 3, "a"], "unimodal": [3, "a", FOUR], "share": NO_PART},
    ),
    "min_norm_weight": function(
        functional.min_norm_weight,
        {"joint_sq": ONES, "unimodal_sq": ONES, "dot": ONES},
        {"joint_sq": NO_REAL, "unimodal_sq": [*NO_REAL, torch.ones(3)], "dot": [*NO_REAL, torch.ones(3)]},
    ),
    "permutation_divergence": function(
        functional.permutation_divergence,
        {"logits": torch.ones(2, 3), "permuted": torch.ones(2, 3)},
        {
            "logits": [*NO_REAL, ONES],
            "permuted": [*NO_REAL, ONES, torch.ones(2, 4), torch.ones(3, 3), torch.ones(2, 0)],
        },
    ),
    "pareto_gradient": function(
        functional.pareto_gradient,
        {"joint": ONES, "unimodal": ONES},
        {
            "joint": [None, 3, "a"],
            "unimodal": [None, 3, "a", FOUR],
            "gamma": NEGATIVE,
            "weight": [3, "a", ONES, torch.tensor(1j)],
        },
    ),
    "total_correlation_loss": function(
        functional.total_correlation_loss,
        {"logits": [FOUR, FOUR], "labels": torch.tensor([0, 1, 2, -100])},
        {
            "logits": [
                *(None, 3, "a", [], FOUR, [FOUR, None], [ONES, ONES], [FOUR, FOUR[:3]], [FOUR[:, :1]] * 2),
                [FOUR, FOUR * 1j],
            ],
            "labels": [
                *NO_TENSOR,
                *NO_LABELS[5:],
                torch.zeros(3).long(),
                torch.tensor([0, 1, 2, 3]),
                FOUR,
                torch.ones(4),
            ],
            "ignore_index": [1.5, "a", None],
        },
    ),
    "linear_logits": function(
        functional.linear_logits,
        {"features": [FOUR, FOUR], "weight": torch.ones(2, 6)},
        {
            "features": [None, 3, FOUR, [], [None], [FOUR, 3], [FOUR], [FOUR, torch.ones(5, 3)], [ONES[0]]],
            "weight": [*NO_REAL, torch.ones(6), torch.ones(2, 5)],
            "bias": [3, "a", torch.ones(3), torch.ones(2, dtype=torch.cfloat)],
        },
    ),
    "feature_entropy": function(
        functional.feature_entropy, {"features": FOUR}, {"features": [*NO_REAL, torch.tensor(1.0)]}
    ),
    "modal_significance": function(
        functional.modal_significance,
        {"logits": FOUR[None], "features": [FOUR], "labels": torch.tensor([0, 1, 2, 0])},
        {
            "logits": [*NO_REAL, FOUR],
            "features": [None, FOUR, [], [3], [FOUR, FOUR], [torch.ones(5, 3)]],
            "labels": [*NO_TENSOR, torch.tensor([0, 1, 2, 3])],
            "offset": NO_NUMBER,
        },
    ),
    "significance_from_baseline": function(
        functional.significance_from_baseline,
        {"losses": ONES, "feature_entropy": ONES, "baseline": torch.tensor(1.0), "count": ONES},
        {
            "losses": [*NO_VECTOR, torch.ones(3)],
            "feature_entropy": [*NO_VECTOR, torch.ones(3)],
            "baseline": [*NO_TENSOR, torch.ones(1)],
            "count": [*NO_VECTOR, torch.ones(3)],
            "offset": NO_NUMBER,
        },
    ),
    "keep_ratio": function(
        functional.keep_ratio,
        {"significance": ONES},
        {
            "significance": [*NO_VECTOR, torch.ones(0)],
            "temperature": [*NEGATIVE, 0],
            "clamp": [
                0.5,
                None,
                "ab",
                (0.1,),
                (0.9, 0.1),
                (-0.1, 0.5),
                (0.1, 1.1),
                (NAN, 1),
                ("a", "b"),
                (0, 1, 1),
            ],
            "present": [3, [True, True], ONES, torch.ones(3, dtype=torch.bool)],
        },
    ),
    "kept_units": function(
        functional.kept_units,
        {"n": 3, "ratio": 0.5},
        {"n": [*NO_COUNT[:6], -1, ONES], "ratio": NO_NUMBER[:-2]},
    ),
    "unit_importance": function(
        functional.unit_importance,
        {"grad": torch.ones(2, 3)},
        {
            "grad": [*NO_TENSOR, torch.tensor(1.0), torch.ones(2, 2).to_sparse()],
            "unit_dim": [2, -3, 0.5, "a", None, True, [0, "a"], [5]],
        },
    ),
    "sample_units": function(
        functional.sample_units,
        {"importance": ONES, "k": 1},
        {
            "importance": [*NO_VECTOR, torch.tensor([NAN]), torch.tensor([-1.0])],
            "k": NO_COUNT,
            "generator": NO_GENERATOR,
        },
    ),
    "sample_units_padded": function(
        functional.sample_units_padded,
        {
            "importance": torch.ones(2, 3),
            "sizes": torch.tensor([3, 2]),
            "k": torch.tensor([1, 1]),
            "uniforms": torch.rand(2, 3),
        },
        {
            "importance": [*NO_TENSOR, ONES],
            "sizes": [*NO_TENSOR, torch.ones(3)],
            "k": [*NO_TENSOR, torch.ones(3)],
            "uniforms": [*NO_TENSOR, torch.ones(2, 2)],
        },
    ),
    "inclusion_probabilities": function(
        functional.inclusion_probabilities,
        {"importance": ONES, "budget": 1.0},
        {"importance": [*NO_VECTOR, torch.tensor([INF])], "budget": NEGATIVE},
    ),
    "inclusion_probabilities_padded": function(
        functional.inclusion_probabilities_padded,
        {"importance": torch.ones(2, 3), "budget": ONES},
        {"importance": [*NO_TENSOR, ONES], "budget": [*NO_TENSOR, torch.ones(3)]},
    ),
    "systematic_sample": function(
        functional.systematic_sample,
        {"probabilities": ONES},
        {"probabilities": [*NO_VECTOR, torch.tensor([NAN])], "generator": NO_GENERATOR},
    ),
    "systematic_sample_padded": function(
        functional.systematic_sample_padded,
        {"probabilities": torch.ones(2, 3), "start": ONES, "uniforms": torch.rand(2, 3)},
        {
            "probabilities": [*NO_TENSOR, ONES],
            "start": [*NO_TENSOR, torch.ones(3)],
            "uniforms": [*NO_TENSOR, torch.ones(3, 3)],
        },
    ),
    "kmeans": function(
        functional.kmeans,
        {"features": torch.randn(6, 2), "num_clusters": 2},
        {
            "features": [
                *NO_REAL,
                ONES,
                torch.ones(0, 2),
                torch.ones(3, 0),
                torch.full((3, 2), NAN),
                FOUR[:1],
            ],
            "num_clusters": [*NO_SIZE, 7],
            "generator": NO_GENERATOR,
            "init": [3, "k-means++", ONES, torch.ones(3, 2), torch.full((2, 2), NAN)],
            "max_iterations": NO_SIZE,
            "tolerance": NEGATIVE,
            "n_init": NO_SIZE,
        },
    ),
    "minmax_scale": function(
        functional.minmax_scale,
        {"features": FOUR},
        {"features": [*NO_REAL, ONES, torch.ones(0, 2), torch.full((3, 2), INF)]},
    ),
    "purity": function(
        functional.purity,
        {"assignments": TWENTY, "labels": TWENTY},
        {
            "assignments": [*NO_TENSOR, ONES, TWENTY[:3], TWENTY[:, None]],
            "labels": [*NO_TENSOR, ONES, TWENTY[:3], TWENTY[:, None]],
        },
        assignments="(assignments|labels)",
    ),
    "recover_labels": function(
        functional.recover_labels,
        {"grad": FOUR, "logits": FOUR},
        {"grad": [*NO_REAL, ONES, torch.ones(4, 2)], "logits": [*NO_REAL, ONES, torch.ones(4, 2)]},
    ),
    "recover_scale": function(
        functional.recover_scale,
        {"grad": FOUR, "logits": FOUR, "labels": torch.tensor([0, 1, 2, -100])},
        {
            "grad": [*NO_REAL, ONES],
            "logits": [*NO_REAL, ONES],
            "labels": [*NO_TENSOR, ONES, torch.tensor([0]), torch.tensor([0, 1, 2, 3])],
        },
    ),
    "reinit_strength": function(
        functional.reinit_strength,
        {"gap": 0.1, "lam": 3.0},
        {"gap": [NAN, "a", None, [0.1], torch.ones(2, dtype=torch.cfloat)], "lam": NEGATIVE},
    ),
    "soft_reinit_": function(
        functional.soft_reinit_,
        {"params": [torch.ones(2)], "initial": [torch.zeros(2)], "strength": 0.5},
        {
            "params": [None, 3, [3], [None], [ONES, ONES], [torch.ones(2).long()], [torch.ones(3)]],
            "initial": [None, 3, [3], [], [torch.ones(3)], [torch.ones(2, dtype=torch.cfloat)]],
            "strength": [NAN, -0.1, 1.1, "a", None, [0.1, 0.2], torch.tensor([0.1, 0.2]), [NAN]],
        },
        params="(params|initial)",
    ),
    # methods
    "OGM": function(
        bo.OGM,
        {},
        {
            "alpha": NEGATIVE,
            "form": NO_CHOICE,
            "noise": [*NO_CHOICE, "pool", 1],
            "noise_scale": NEGATIVE,
            "apply_to": [*NO_CHOICE, "lr"],
            "min_ndim": NO_COUNT,
            "ratio": NO_CHOICE,
            **WINDOW,
        },
    ),
    "AGM": function(
        bo.AGM,
        {},
        {
            "alpha": NEGATIVE,
            "cap": NEGATIVE,
            "apply_to": [*NO_CHOICE, "lr"],
            "head": NO_FLAG,
            "min_ndim": NO_COUNT,
            **WINDOW,
        },
    ),
    "MLB": function(
        bo.MLB,
        {},
        {
            "alpha": NEGATIVE,
            "beta": [*NEGATIVE, 0.9],
            "apply_to": [*NO_CHOICE, "lr"],
            "min_ndim": NO_COUNT,
            **WINDOW,
        },
    ),
    "FixedModulation": function(
        bo.FixedModulation,
        {"coefficients": {"audio": 0.5}},
        {
            "coefficients": [*NO_MAPPING, None, *({"audio": value} for value in NEGATIVE)],
            "apply_to": [*NO_CHOICE, "lr"],
            "min_ndim": NO_COUNT,
            "frozen": [*NO_FLAG, True],
            **WINDOW,
        },
    ),
    "FixedModulation of an optimizer": Row(
        lambda world, **given: wrapped(world, modulation=bo.FixedModulation(**given)),
        bo.FixedModulation,
        {"coefficients": [{"smell": 0.5}, {3: 0.5}, {"": 0.5}, {"audio": 0.5, "smell": 0.5}]},
        lambda world: {"coefficients": {"audio": 0.5}},
    ),
    "InfoReg": function(
        bo.InfoReg,
        {},
        {"beta": NEGATIVE, "threshold": NO_THRESHOLD, "scale": NEGATIVE, "trace": NO_CHOICE, **WINDOW},
    ),
    "AMSS": function(
        bo.AMSS,
        {},
        {
            "temperature": [*NEGATIVE, 0],
            "scale": NO_CHOICE,
            "clamp": [0.5, None, (0.9, 0.1), (0.1, NAN), ("a", 1)],
            "offset": NO_NUMBER,
            "units": [
                3,
                "whole",
                bo.MaskUnits(2),
                bo.MaskUnits,
                nn.Linear(1, 1),
                {3: "whole"},
                {nn.Linear: 3},
            ],
            "min_ndim": NO_COUNT,
            **WINDOW,
        },
    ),
    "MaskUnits": function(
        bo.MaskUnits, {}, {"count": [*NO_COUNT, 0], "dim": [0.5, "a", None, True], "parts": NO_SIZE}
    ),
    "attention_heads": function(
        bo.attention_heads, {"model": nn.Linear(2, 2)}, {"model": [*NO_MODULE, nn.Linear(2, 2)]}
    ),
    "ModulatedOptimizer": Row(
        wrapped,
        bo.ModulatedOptimizer,
        {
            "optimizer": [*NO_OPTIMIZER, sgd([nn.Parameter(torch.ones(1))])],
            "monitor": NO_MONITOR,
            "modulation": NO_MODULATION,
            "seed": NO_SEED,
            "strict": NO_FLAG,
        },
    ),
    "balance": Row(
        composed,
        bo.balance,
        {
            "model": NO_MODULE,
            "encoders": ENCODERS,
            "optimizer": NO_OPTIMIZER,
            "out_features": NO_SIZE,
            "train_loader": [*NO_LOADER, None],
            "val_loader": [*NO_LOADER, None],
            "epochs": [*NO_COUNT, 0],
            "loss": [*NO_FUNCTION, nn.TripletMarginLoss(), nn.NLLLoss()],
            "seed": NO_SEED,
        },
        named={"train_loader": "train_loader", "val_loader": "val_loader"},
    ),
    "attach": Row(
        lambda world, **given: bo.attach(
            **{"optimizer": world.optimizer, "monitor": world.monitor, **given}
        ).remove(),
        bo.attach,
        {
            "optimizer": NO_OPTIMIZER,
            "monitor": NO_MONITOR,
            "modulation": NO_MODULATION,
            "seed": NO_SEED,
            "strict": NO_FLAG,
        },
    ),
    "MaskedSubnetworkSGD": Row(
        masked,
        bo.MaskedSubnetworkSGD,
        {
            "params": [None, 3],
            "monitor": NO_MONITOR,
            "lr": [NAN, -0.1, "0.1", None, True],
            "momentum": NEGATIVE,
            "dampening": NO_NUMBER,
            "weight_decay": NEGATIVE,
            "nesterov": [*NO_FLAG, True],
            "temperature": [*NEGATIVE, 0],
            "scale": NO_CHOICE,
            "seed": NO_SEED,
            "maximize": NO_FLAG,
            "foreach": ["yes", 1],
            "fused": ["yes", 1],
            "strict": NO_FLAG,
            "clamp": [0.5],
            "unknown": [1],
        },
    ),
    "OPM": Row(
        lambda world, **given: bo.OPM(**{"monitor": world.monitor, **given}).remove(),
        bo.OPM,
        {
            "monitor": NO_MONITOR,
            "q_base": NO_PART,
            "lam": NEGATIVE,
            "p_exe": NO_PART,
            "rescale": NO_CHOICE,
            "ratio": NO_CHOICE,
            "seed": NO_SEED,
            **WINDOW,
        },
    ),
    "ModalityDropout": Row(
        lambda world, **given: bo.ModalityDropout(**{"monitor": world.monitor, **given}).remove(),
        bo.ModalityDropout,
        {
            "monitor": NO_MONITOR,
            "p": [*NO_PART, "other", {"smell": 0.5}, {3: 0.5}, *({"audio": value} for value in NO_PART)],
            "seed": NO_SEED,
            **WINDOW,
        },
    ),
    "UnimodalObjective": Row(
        lambda world, **given: objective(world, **given).remove(),
        bo.UnimodalObjective,
        {
            "monitor": NO_MONITOR,
            "out_features": NO_SIZE,
            "heads": NO_CHOICE,
            "weight": [*NEGATIVE, {"smell": 1.0}, {3: 1.0}, {"audio": NAN}, {"audio": "1"}],
            "joint": NO_PART,
            "inject": NO_FLAG,
            "loss": NO_FUNCTION,
            "pool": [3, "median", None],
            "seed": NO_SEED,
        },
    ),
    "TotalCorrelationLoss": Row(
        lambda world, **given: bo.TotalCorrelationLoss(**{"monitor": world.monitor, **given}).remove(),
        bo.TotalCorrelationLoss,
        {"monitor": NO_MONITOR, "weight": NEGATIVE, "group_negatives": NO_FLAG},
    ),
    "TotalCorrelationLoss.forward": Row(
        correlation_of,
        bo.TotalCorrelationLoss.forward,
        {
            "labels": [
                *NO_LABELS,
                torch.full((8,), 7),
                torch.zeros(3).long(),
                torch.ones(8),
                torch.ones(8, CLASSES),
                torch.zeros(8, 3).long(),
            ]
        },
        lambda world: {"labels": world.labels},
    ),
    "MMPareto": Row(
        lambda world, **given: bo.MMPareto(
            **{"objective": bo.UnimodalObjective(world.monitor, CLASSES, inject=True), **given}
        ),
        bo.MMPareto,
        {
            "objective": [None, 3, "a", nn.Linear(1, 1)],
            "gamma": NEGATIVE,
            "scope": NO_CHOICE,
            **WINDOW,
        },
    ),
    "CompetitionObjective": Row(
        lambda world, **given: bo.CompetitionObjective(**{"monitor": world.monitor, **given}).remove(),
        bo.CompetitionObjective,
        {
            "monitor": [*NO_MONITOR, watch(small_model(), loss=nn.MSELoss())],
            "weight": NEGATIVE,
            "strategy": NO_CHOICE,
            "samples": NO_SIZE,
            "seed": NO_SEED,
        },
    ),
    "CompetitionObjective.load_state_dict": Row(
        lambda world, **given: bo.CompetitionObjective(world.monitor).load_state_dict(given["state"]),
        bo.CompetitionObjective.load_state_dict,
        {"state": [*NO_STATE, {"_extra_state": 3}, {"_extra_state": {"calls": -1, "seed": 0}}]},
        lambda world: {"state": bo.CompetitionObjective(world.monitor).state_dict()},
        named={"state": "(state|calls)"},
    ),
    "UnimodalObjective.weight": Row(
        lambda world, **given: setattr(objective(world), *given.popitem()),
        bo.UnimodalObjective,
        {"weight": [*NEGATIVE, {"smell": 1.0}, {3: 1.0}, {"audio": NAN}, {"audio": "1"}]},
        lambda world: {"weight": 0.5},
    ),
    "UnimodalObjective.forward": Row(
        loss_of,
        bo.UnimodalObjective.forward,
        {
            "labels": [
                *NO_LABELS,
                torch.full((8,), 7),
                torch.full((8,), -1),
                torch.zeros(3).long(),
                torch.ones(8),
            ],
            "loss": [lambda logits, labels: None, lambda logits, labels: 3.0],
            "out_features": [3],
        },
        lambda world: {"labels": world.labels.clamp(min=3)},
    ),
    "UnimodalObjective.predict": Row(
        prediction_of,
        bo.UnimodalObjective.predict,
        {
            "logits": [*NO_REAL, torch.ones(8, 3), torch.ones(7, CLASSES), torch.ones(8, CLASSES).long()],
            "present": [
                *NO_MAPPING[:3],
                *({"audio": value} for value in (None, "a", torch.ones(8, 1).bool(), torch.ones(8))),
                *({"audio": torch.ones(4).bool()}, {"smell": torch.ones(8).bool()}),
            ],
        },
        lambda world: {"logits": JOINT},
    ),
    # the monitor
    "ModalityMonitor": Row(
        lambda world, **given: watched(world, **given).remove(),
        bo.ModalityMonitor,
        {
            "model": NO_MODULE,
            "encoders": ENCODERS,
            "head": [3, nn.Linear, "nowhere", nn.Linear(1, 1), {"audio": "head"}, {3: "head", "a": "head"}],
            "loss": [*NO_FUNCTION, nn.MSELoss, nn.TripletMarginLoss(), nn.NLLLoss()],
            "fill": NO_CHOICE,
            "scores": [*NO_CHOICE, "per-head", nn.Linear],
            "labels": [*NO_CHOICE, nn.CrossEntropyLoss],
            "train_only": NO_FLAG,
            "group": NO_GROUP,
            "select": [*NO_MAPPING, {"audio": 3}, {"smell": len}, {3: len}],
            "slices": SLICES,
            "ignore_index": [1.5, "a", None, NAN],
            "strict": NO_FLAG,
        },
    ),
    "observe": Row(
        observed,
        bo.ModalityMonitor.observe,
        {
            "labels": NO_LABELS,
            "present": [
                *(NO_MAPPING[:3]),
                *({"audio": value} for value in (None, True, "a", torch.ones(8, 1).bool(), torch.ones(8))),
                *(
                    {"audio": torch.ones(3).bool()},
                    {"smell": torch.ones(8).bool()},
                    {3: torch.ones(8).bool()},
                ),
            ],
        },
        lambda world: {"labels": world.labels},
    ),
    "watch_loss": Row(
        lambda world, **given: world.monitor.watch_loss(**given).remove(),
        bo.ModalityMonitor.watch_loss,
        {"module": [None, 3, F.cross_entropy, nn.CrossEntropyLoss]},
        lambda world: {"module": nn.CrossEntropyLoss()},
    ),
    "modality_groups": Row(
        lambda world, **given: bo.modality_groups(**{"model": world.model, **given}),
        bo.modality_groups,
        {"model": NO_MODULE, "encoders": ENCODERS, "params": [[]], "modality": ["audio"]},
        lambda world: {"encoders": world.model.modalities},
    ),
    # re-learning
    "ReLearnScheduler": Row(
        lambda world, **given: scheduler(world, **given).remove(),
        bo.ReLearnScheduler,
        {
            "optimizer": NO_OPTIMIZER,
            "monitor": NO_MONITOR,
            "train_loader": [*NO_LOADER, None, (FEATURES, TWENTY)],
            "val_loader": [*NO_LOADER, None, (FEATURES, TWENTY)],
            "every": NO_SIZE,
            "epochs": [*NO_COUNT, 0],
            "first": [*NO_COUNT, 0],
            "max_relearns": NO_COUNT,
            "optimizer_state": [*NO_CHOICE, "scale"],
            "initial": [*NO_MAPPING, {}, {"audio": {}}],
            "snapshot_device": ["nowhere", 3.5, []],
            **DIAGNOSIS,
        },
    ),
    "ReLearnScheduler.step": Row(
        lambda world, **given: scheduler(world, **given.pop("options", {})).step(**given),
        bo.ReLearnScheduler.step,
        {
            "train": [
                *(3, "a", ({}, TWENTY), ({"smell": FEATURES["a"]}, TWENTY), ({3: FEATURES["a"]}, TWENTY)),
                *(({"audio": value}, TWENTY) for value in (None, "a", torch.tensor(1.0), FEATURES["a"][:3])),
                ({"audio": FEATURES["a"].to(torch.cfloat)}, TWENTY),
                *(({"audio": FEATURES["a"]}, value) for value in (None, "a", TWENTY.float(), TWENTY[:3], 3)),
            ]
        },
        named={"train": "train"},
    ),
    "BlendScheduler": Row(
        blending,
        bo.BlendScheduler,
        {
            "objective": [None, 3, "a", nn.Linear(1, 1), bo.UnimodalObjective],
            "probes": [None, 3, "a", bo.ProbeMonitor],
            "every": NO_SIZE,
            "floor": [*NO_PART, 0, 0.0001],
            "min_joint": [*NO_PART, 0],
        },
    ),
    "BlendScheduler.load_state_dict": Row(
        lambda world, state: blending(world).load_state_dict(state),
        bo.BlendScheduler.load_state_dict,
        {
            "state": [
                *NO_STATE,
                *(
                    {"last_epoch": 1, "weight": {"audio": 1, "visual": 1}, "losses": losses}
                    for losses in (3, torch.ones(2, 2), torch.ones(2, 3).long())
                ),
            ]
        },
        lambda world: {"state": blending(world).state_dict()},
    ),
    "diagnose": Row(
        lambda world, **given: bo.diagnose(**given),
        bo.diagnose,
        {
            "train": [None, 3, "a", [1, 2], ({}, TWENTY), ({"a": 3}, TWENTY), (FEATURES, TWENTY * 0.5)],
            "monitor": NO_MONITOR[1:],
            "group": NO_GROUP,
            **DIAGNOSIS,
        },
        lambda world: {"train": (FEATURES, TWENTY), "val": (FEATURES, TWENTY), "seed": 0},
        named={"train": "train"},
    ),
    # loading
    "ModulatedOptimizer.load_state_dict": Row(
        lambda world, state: world.wrapper.load_state_dict(state),
        bo.ModulatedOptimizer.load_state_dict,
        {
            "state": [
                *NO_STATE,
                {"state": {}},
                {"state": 3, "param_groups": []},
                {"state": {}, "param_groups": 3},
            ]
        },
        lambda world: {"state": world.wrapper.state_dict()},
    ),
    "OPM.load_state_dict": Row(
        lambda world, state: bo.OPM(world.monitor).load_state_dict(state),
        bo.OPM.load_state_dict,
        {"state": NO_STATE},
        lambda world: {"state": bo.OPM(world.monitor).state_dict()},
    ),
    "ModalityDropout.load_state_dict": Row(
        lambda world, state: bo.ModalityDropout(world.monitor).load_state_dict(state),
        bo.ModalityDropout.load_state_dict,
        {"state": NO_STATE},
        lambda world: {"state": bo.ModalityDropout(world.monitor).state_dict()},
    ),
    "ProbeMonitor.load_state_dict": Row(
        lambda world, state: bo.ProbeMonitor(world.monitor).load_state_dict(state),
        bo.ProbeMonitor.load_state_dict,
        {"state": NO_STATE},
        lambda world: {"state": bo.ProbeMonitor(world.monitor).state_dict()},
    ),
    "Recorder.load_state_dict": Row(
        lambda world, state: bo.Recorder().load_state_dict(state),
        bo.Recorder.load_state_dict,
        {
            "state": [
                *NO_STATE,
                {"rows": []},
                {"rows": 3, "steps": 0},
                *({"rows": [row], "steps": 1} for row in (3, None, (), "step", (0, "score", "audio", "0.5"))),
                *({"rows": [], "steps": steps} for steps in NO_COUNT),
            ]
        },
        lambda world: {"state": recorded().state_dict()},
        named={"state": "(state|rows?|steps)"},
    ),
    "ReLearnScheduler.load_state_dict": Row(
        lambda world, state: scheduler(world).load_state_dict(state),
        bo.ReLearnScheduler.load_state_dict,
        {"state": NO_STATE},
        lambda world: {"state": scheduler(world).state_dict()},
    ),
    "set_epoch": Row(
        lambda world, wrapper, **given: wrapper.set_epoch(**given),
        bo.ModulatedOptimizer.set_epoch,
        {"epoch": [*NO_COUNT, None]},
        lambda world: {"wrapper": world.wrapper, "epoch": 3},
    ),
    "add_param_group": Row(
        lambda world, wrapper, tag: wrapper.add_param_group(
            {"params": [nn.Parameter(torch.ones(1))], "modality": tag}
        ),
        bo.ModulatedOptimizer.add_param_group,
        {"tag": ["smell", 3, ["audio"], ""]},
        lambda world: {"wrapper": world.wrapper, "tag": None},
        named={"tag": "tagged with modality"},
    ),
    "step": Row(
        lambda world, wrapper, **given: wrapper.step(**given),
        bo.ModulatedOptimizer.step,
        {"closure": [3, "loss", torch.ones(1)]},
        lambda world: {"wrapper": world.wrapper},
    ),
    # recording
    "Recorder": Row(
        lambda world, source=None, **given: bo.Recorder(
            *[] if source is None else [source], **given
        ).remove(),
        bo.Recorder,
        {
            "source": [3, "optimizer", bo.OPM, nn.Linear(1, 1), [bo.OGM()]],
            "every": NO_SIZE,
            "log": [3, "print", [print], nn.Module],
        },
    ),
    "ProbeMonitor": Row(
        lambda world, **given: bo.ProbeMonitor(**{"monitor": world.monitor, **given}).remove(),
        bo.ProbeMonitor,
        {"monitor": NO_MONITOR, "lr": [*NEGATIVE, 0], "losses": NO_FLAG},
    ),
    "report": Row(
        lambda world, **given: bo.report(**given),
        bo.report,
        {
            "recorder": [None, 3, "recorder", bo.Recorder, []],
            "alone": [
                *NO_MAPPING,
                *({"audio": value} for value in (*NO_NUMBER, 1.1)),
                {"smell": 0.5},
                {3: 0.5},
            ],
        },
        lambda world: {"recorder": recorded()},
    ),
    "to_html": Row(
        lambda world, **given: bo.report(bo.Recorder()).to_html(**given),
        bo.Report.to_html,
        {"path": [None, *NO_PATH], "title": [None, 3, b"a", ["report"]]},
        lambda world: {"path": "/dev/null/nowhere"},
    ),
    "to_csv": Row(
        lambda world, **given: bo.Recorder().to_csv(**given),
        bo.Recorder.to_csv,
        {"path": [None, *NO_PATH]},
        lambda world: {"path": "/dev/null/nowhere"},
    ),
    "plot_rows": function(
        plot_rows,
        {"rows": [bo.Recorder.__init__.__globals__["Row"](0, "score", "audio", 0.5)]},
        {"smooth": NO_SIZE, "path": NO_PATH, "quantities": ["score", 3, ["other"]]},
        quantities="(quantities|nothing to draw)",
    ),
    # callbacks
    "BalanceCallback": Row(
        lambda world, **given: Balance(
            **{
                **dict.fromkeys(("head", "modulation", "prediction", "relearn", "seed", "strict")),
                "options": {},
                **given,
            }
        ),
        Balance,
        {
            "encoders": [None, 3, "audio", ["audio"], bo.ModalityMonitor],
            "head": [3, ["head"], nn.Linear],
            "modulation": NO_MODULATION,
            "prediction": [3, "OPM"],
            "relearn": [3, "every epoch"],
            "seed": NO_SEED,
            "strict": ["yes", 1],
            "options": [{"score": "auto"}],
        },
        lambda world: {"encoders": {"audio": "encoders.audio"}},
    ),
}
# Good arguments that are not taken to the end: they would write a file, or there is nothing to find.
NOT_TRIED = {"attention_heads", "to_csv", "to_html", "MaskedSubnetworkSGD"}


def cases() -> Iterator[Any]:
    for name, row in ROWS.items():
        for argument, values in row.bad.items():
            for number, value in enumerate(values):
                yield pytest.param(name, argument, value, id=f"{name}-{argument}-{number}")


@pytest.fixture(scope="module")
def worlds() -> dict[str, World]:
    return {}


@pytest.mark.parametrize(("name", "argument", "value"), list(cases()))
def test_bad_input_is_refused_by_a_sentence(name: str, argument: str, value: Any, worlds: dict[str, World]):
    row = ROWS[name]
    world = worlds[name] if name in worlds else worlds.setdefault(name, World())
    good = row.good(world)
    before = world.fingerprint()
    with pytest.raises((TypeError, ValueError, KeyError, RuntimeError, NotImplementedError)) as refused:
        row.call(world, **{**good, argument: value})
    error = refused.value
    assert type(error).__name__ in documented(row.of), "an exception that the docstring does not name"
    assert is_raised_here(error.__traceback__), "a bare traceback"
    assert re.search(row.named.get(argument, argument), str(error)), "the argument is not named"
    assert len(str(error)) < 600
    del refused, error
    assert world.fingerprint() == before


@pytest.mark.parametrize("name", [name for name in ROWS if name not in NOT_TRIED])
def test_what_is_good_is_taken(name: str):
    world = World()
    ROWS[name].call(world, **ROWS[name].good(world))


def test_there_are_enough_of_them():
    assert len(list(cases())) >= 300


def documented(of: Any) -> set[str]:
    """Names of the exceptions under `Raises:`; of a method that names none, of its class."""
    section = re.search(r"Raises:\n(.*?)(\n\n|\Z)", of.__doc__ or "", re.S)
    return set(re.findall(r"\b[A-Z]\w*(?:Error|Exception)\b", section[1] if section else ""))


def is_raised_here(trace: TracebackType | None) -> bool:
    """Whether the innermost line of a traceback is a `raise` statement of the package."""
    assert trace is not None
    while trace.tb_next is not None:
        trace = trace.tb_next
    path = Path(trace.tb_frame.f_code.co_filename)
    return PACKAGE in path.parents and trace.tb_lineno in raising_lines(path)


@cache
def raising_lines(path: Path) -> set[int]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    statements = (node for node in ast.walk(tree) if isinstance(node, ast.Raise))
    return {line for node in statements for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
