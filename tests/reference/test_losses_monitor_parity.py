"""What the monitor gives for every loss, kind of uni-modal prediction and source of targets, against a naive loop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import balanceopt as bo
from tests.models import INPUTS, Concat, Multimodal, SumHeads, Tokens
from tests.reference import losses as naive
from tests.reference import losses_monitor as oracle

B, M, CLASSES, IGNORED = 7, 3, 4, -100
SAME = object()
WEIGHT, POS_WEIGHT = [1.0, 0.5, 3.0, 2.0], [3.0, 1.0, 0.2, 10.0]


class Targets(nn.Module):
    """A model that takes targets for its own use."""

    def __init__(self, model: Multimodal) -> None:
        super().__init__()
        self.inner = model

    def forward(self, *inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.inner(*inputs)


class Nonlinear(Multimodal):
    """Concatenation, then two layers."""

    def __init__(self, modalities: int = M, *, classes: int = CLASSES, **options: Any) -> None:
        super().__init__(modalities, classes=classes, **options)
        self.head = nn.Sequential(nn.Linear(sum(self.widths), 6), nn.Tanh(), nn.Linear(6, classes))

    def fuse(self, features: list[Tensor]) -> Tensor:
        return self.head(torch.cat(features, -1))


def features_of(model: Multimodal, inputs: list[Tensor]) -> list[oracle.Rows]:
    """Each modality's features, a row for each sample."""
    return [
        [oracle.layers(encoder, row) for row in x.tolist()]
        for encoder, x in zip(model.encoders.values(), inputs, strict=True)
    ]


def alone(
    model: Multimodal, features: list[oracle.Rows], *, fill: str, parts: bool, present: Any = None
) -> list[oracle.Rows]:
    """Each modality's predictions; of `parts` of a sum the centred ones."""
    whole = [oracle.joined([rows[i] for rows in features]) for i in range(B)]
    if isinstance(model, Concat):
        unimodal = oracle.split(model.head, features)
        joint = [oracle.layers(model.head, z) for z in whole]
    elif isinstance(model, SumHeads):
        unimodal = oracle.per_head(list(model.own_heads.values()), features)
        joint = [[sum(f) for f in zip(*(rows[i] for rows in unimodal), strict=True)] for i in range(B)]
    else:
        assert isinstance(model, Nonlinear)
        return oracle.zero_out(lambda z: oracle.layers(model.head, oracle.joined(z)), features, fill)
    return oracle.centred(unimodal, joint, present) if parts else unimodal


MODELS: dict[str, tuple[Callable[..., Multimodal], dict[str, Any]]] = {
    "split": (Concat, {}),
    "per-head": (SumHeads, {}),
    "zero-out": (Nonlinear, {}),
    "zero-out, zero": (Nonlinear, {"fill": "zero"}),
    "zero-out, mean": (Nonlinear, {"fill": "mean"}),
    "function": (Concat, {"scores": lambda features: {n: z.cumsum(1) for n, z in features.items()}}),
}


@dataclass
class Kind:
    """A loss.

    Attributes:
        loss: what the loop calls.
        of: naive loss of a sample.
        target: makes the batch's targets.
        baseline: naive loss of the best constant prediction.
        sources: where the targets can come from.
        outputs: number of outputs.
        numbers: whether it is a regression, whose losses are divided by the baseline.
        per_sample: what the monitor is given, if not `loss`: a function, or None for cross-entropy.
    """

    loss: Any
    of: Callable[[Any, Any], float | None]
    target: Callable[[], Tensor]
    baseline: Callable[[Any], float]
    sources: tuple[str, ...] = ("observe", "loss", "model")
    outputs: int = CLASSES
    numbers: bool = False
    per_sample: Any = SAME

    @property
    def given(self) -> Any:
        """The monitor's `loss=`."""
        return self.loss if self.per_sample is SAME else self.per_sample


ANY = ("observe", "loss", "model", "gradient")


def entropy_of_labels(rows: list[list[float]]) -> float:
    return naive.entropy([sum(column) / len(rows) for column in zip(*rows, strict=True)])


def one_hot(smoothing: float = 0.0, weight: list[float] | None = None) -> Callable[[Any], float]:
    def baseline(labels: Any) -> float:
        rows = [naive.soft_label(y, CLASSES, smoothing) for y in labels]
        if weight is not None and smoothing:
            rows = [[p * w for p, w in zip(row, weight, strict=True)] for row in rows]
            rows = [[p / sum(row) for p in row] for row in rows]
        return entropy_of_labels(rows)

    return baseline


def entropy_of_multi_hot(pos_weight: list[float] | None = None) -> Callable[[Any], float]:
    """Mean Bernoulli entropy; each sample counts 1, and its labels as their weights say."""

    def baseline(rows: Any) -> float:
        rows = [row if isinstance(row, list) else [row] for row in rows]
        labels = len(rows[0])
        weights = [1.0] * labels if pos_weight is None else pos_weight
        sides = [[0.0] * labels, [0.0] * labels]
        for row in rows:
            mass = sum(w * y + 1 - y for w, y in zip(weights, row, strict=True))
            for c, (w, y) in enumerate(zip(weights, row, strict=True)):
                sides[1][c] += w * y / mass
                sides[0][c] += (1 - y) / mass
        total = sum(map(sum, sides))
        return sum(
            (n + p) / total * naive.entropy([n / (n + p), p / (n + p)]) for n, p in zip(*sides, strict=True)
        )

    return baseline


def classes() -> Tensor:
    return torch.randint(CLASSES, (B,))


def multi_hot() -> Tensor:
    return torch.randint(2, (B, CLASSES)).float()


def numbers(*shape: int) -> Callable[[], Tensor]:
    return lambda: 2 * torch.randn(B, *shape) + 3


def regression(module: nn.Module, of: Callable[[float, float], float], *shape: int) -> Kind:
    return Kind(
        module,
        lambda f, y: naive.regression(f, y, of),
        numbers(*shape),
        lambda targets: naive.regression_baseline(targets, of),
        outputs=shape[-1] if shape else 1,
        numbers=True,
    )


def cubed(f: Tensor, y: Tensor) -> Tensor:
    return (f - y).abs() ** 3


KINDS = {
    "class indices": Kind(nn.CrossEntropyLoss(), naive.cross_entropy, classes, one_hot(), ANY),
    "no loss": Kind(nn.CrossEntropyLoss(), naive.cross_entropy, classes, one_hot(), ANY, per_sample=None),
    "soft labels": Kind(
        nn.CrossEntropyLoss(),
        partial(naive.cross_entropy, soft=True),
        lambda: torch.randn(B, CLASSES).softmax(1),
        entropy_of_labels,
        ("observe", "loss"),  # floats among a model's `labels=` are no class indices
    ),
    "weight": Kind(
        nn.CrossEntropyLoss(torch.tensor(WEIGHT)),
        partial(naive.cross_entropy, weight=WEIGHT),
        classes,
        one_hot(),
        ANY,
    ),
    "weight and smoothing": Kind(
        nn.CrossEntropyLoss(torch.tensor(WEIGHT), label_smoothing=0.2),
        partial(naive.cross_entropy, weight=WEIGHT, smoothing=0.2),
        classes,
        one_hot(0.2, WEIGHT),
    ),
    "multi-label": Kind(
        nn.BCEWithLogitsLoss(),
        naive.binary_cross_entropy,
        multi_hot,
        entropy_of_multi_hot(),
        ANY,
    ),
    "multi-label, pos_weight": Kind(
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor(POS_WEIGHT)),
        partial(naive.binary_cross_entropy, pos_weight=POS_WEIGHT),
        multi_hot,
        entropy_of_multi_hot(POS_WEIGHT),
        ANY,
    ),
    "one logit": Kind(
        nn.BCEWithLogitsLoss(),
        naive.binary_cross_entropy,
        lambda: torch.randint(2, (B, 1)).float(),
        entropy_of_multi_hot(),
        ANY,
        outputs=1,
    ),
    "MSE": regression(nn.MSELoss(), naive.square, 1),
    "MSE of several outputs": regression(nn.MSELoss(), naive.square, 3),
    "summed MSE": regression(nn.MSELoss(reduction="sum"), naive.square, 3),
    "L1": regression(nn.L1Loss(), naive.distance, 3),
    "smooth L1": regression(nn.SmoothL1Loss(beta=0.3), naive.smooth(0.3), 1),
    "Huber": regression(nn.HuberLoss(delta=0.6), naive.huber(0.6), 3),
    "function": Kind(
        lambda f, y: cubed(f, y).mean(),
        lambda f, y: naive.regression(f, y, lambda a, b: abs(a - b) ** 3),
        numbers(3),
        lambda targets: float("nan"),
        ("observe", "model"),
        outputs=3,
        numbers=True,
        per_sample=cubed,
    ),
}


def run(
    model: nn.Module,
    monitor: bo.ModalityMonitor,
    kind: Kind,
    inputs: list[Tensor],
    target: Tensor,
    source: str,
) -> Any:
    """What a training pass gives whose targets can come from one source alone."""
    scores = monitor.scores(needs_entropy=True)
    criterion = kind.loss if source == "loss" else UNWATCHED[id(kind)]
    if source == "observe":
        monitor.observe(target)
    elif source == "loss" and kind.given is None:
        monitor.watch_loss(criterion)
    output = model(*inputs, **({"labels": target} if source == "model" else {}))
    criterion(output, target).backward()
    taken = scores.take()
    assert monitor.stats()["labels"] == {source: 1}
    return taken


# Copies from before any monitor has hooked the modules.
UNWATCHED = {id(kind): copy.deepcopy(kind.loss) for kind in KINDS.values()}


CASES = [
    pytest.param(name, which, source, id=f"{name}-{which}-{source}")
    for name, kind in KINDS.items()
    for which in MODELS
    for source in kind.sources
]


@pytest.mark.parametrize(("name", "which", "source"), CASES)
def test_scores_of_a_training_pass(name: str, which: str, source: str):
    kind = KINDS[name]
    make, options = MODELS[which]
    inner = make(M, width=kind.outputs if which == "function" else [2, 4, 3], classes=kind.outputs)
    inputs, target = [torch.randn(B, n) for n in INPUTS[:M]], kind.target()
    model = Targets(inner)
    with bo.ModalityMonitor(model, inner.modalities, inner.heads, loss=kind.given, **options) as monitor:
        found = run(model, monitor, kind, inputs, target, source)
        assert monitor.stats()["scores"].startswith(which.split(",")[0])

    features = features_of(inner, inputs)
    if which == "function":
        unimodal = [[[sum(z[: d + 1]) for d in range(len(z))] for z in rows] for rows in features]
    else:
        fill = options.get("fill", "mean" if kind.numbers else "zero")
        unimodal = alone(inner, features, fill=fill, parts=kind.numbers)
    baseline = kind.baseline(target.tolist())
    scale = None if name == "function" else baseline if kind.numbers else 1.0
    expected = oracle.sums(unimodal, target.tolist(), kind.of, scale)
    for field, values in expected.items():
        assert getattr(found, field).tolist() == pytest.approx(values, rel=2e-5), field
    assert float(found.baseline) == pytest.approx(1.0 if kind.numbers else baseline, rel=1e-5)
    entropies = [sum(oracle.entropy_of(z) for z in rows) for rows in features]
    assert found.feature_entropy.tolist() == pytest.approx(entropies, rel=2e-5)


# Positions: pixels and tokens


class Dense(nn.Module):
    """Convolutions at half the resolution, as SegFormer has them: the model's output is upsampled."""

    def __init__(self) -> None:
        super().__init__()
        self.rgb, self.depth = nn.Conv2d(3, 4, 1), nn.Conv2d(1, 2, 1)
        self.head = nn.Conv2d(6, CLASSES, 1)
        self.up = nn.Upsample(scale_factor=2)

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        return self.up(self.head(torch.cat([self.rgb(rgb), self.depth(depth)], 1)))


def with_gaps(target: Tensor) -> Tensor:
    """Labels of which a third do not count, and none of the first sample's."""
    target[torch.rand(target.shape) < 0.3] = IGNORED
    target[0] = IGNORED
    return target


def shares(labels: list[Any]) -> list[float]:
    """How often each class is the label, each sample counting once."""
    total = [0.0] * CLASSES
    for sample in labels:
        valid = [int(y) for y in naive.leaves(sample) if y != IGNORED]
        for y in valid:
            total[y] += 1 / len(valid)
    return total


def expect(found: Any, unimodal: list[Any], labels: list[Any]) -> None:
    expected = oracle.sums(unimodal, labels, naive.cross_entropy)
    for field, values in expected.items():
        assert getattr(found, field).tolist() == pytest.approx(values, rel=2e-5), field
    assert found.label_counts.tolist() == pytest.approx(shares(labels), rel=1e-5)
    whole = sum(shares(labels))
    assert float(found.baseline) == pytest.approx(
        naive.entropy([s / whole for s in shares(labels)]), rel=1e-5
    )


@pytest.mark.parametrize("source", ["observe", "loss", "gradient"])
@pytest.mark.parametrize("fill", ["zero", "mean"])
def test_pixels_of_an_upsampled_output(source: str, fill: Any):
    model, criterion = Dense(), nn.CrossEntropyLoss()
    twin = copy.deepcopy(criterion)
    rgb, depth, target = torch.randn(B, 3, 2, 3), torch.randn(B, 1, 2, 3), torch.randint(CLASSES, (B, 4, 6))
    target = with_gaps(target)
    encoders = {"rgb": model.rgb, "depth": model.depth}
    with bo.ModalityMonitor(model, encoders, model, loss=criterion, fill=fill) as monitor:
        scores = monitor.scores()
        if source == "observe":
            monitor.observe(target)
        (criterion if source == "loss" else twin)(model(rgb, depth), target).backward()
        found = scores.take()
        assert monitor.stats()["labels"] == {source: 1}

    def pixel(layer: nn.Conv2d, x: list[float]) -> list[float]:
        assert layer.bias is not None
        return oracle.affine(layer.weight.flatten(1), layer.bias.tolist(), x)

    # By modality, sample and low-resolution pixel.
    features = [
        [[pixel(layer, z) for z in naive.positions_of(sample)] for sample in x.tolist()]
        for layer, x in ((model.rgb, rgb), (model.depth, depth))
    ]
    unimodal: list[Any] = [[[[] for _ in range(CLASSES)] for _ in range(B)] for _ in features]
    for i in range(4):
        for j in range(6):
            at = 3 * (i // 2) + j // 2
            here = [[sample[at] for sample in samples] for samples in features]
            alone = oracle.zero_out(lambda z: pixel(model.head, oracle.joined(z)), here, fill)
            for m, rows in enumerate(alone):
                for sample, logits in enumerate(rows):
                    for c, value in enumerate(logits):
                        unimodal[m][sample][c].append(value)
    expect(found, unimodal, [naive.leaves(y) for y in target.tolist()])


@pytest.mark.parametrize("flattened", [False, True])
@pytest.mark.parametrize("source", ["observe", "loss", "model", "gradient"])
def test_tokens(source: str, flattened: bool):
    inner = Concat(2, classes=CLASSES, encoder=Tokens)
    model, criterion = Targets(inner), nn.CrossEntropyLoss()
    twin = copy.deepcopy(criterion)
    inputs, target = [torch.randn(B, n) for n in INPUTS[:2]], with_gaps(torch.randint(CLASSES, (B, 3)))
    with bo.ModalityMonitor(model, inner.modalities, inner.head, loss=criterion) as monitor:
        scores = monitor.scores()
        if source == "observe":
            monitor.observe(target.flatten() if flattened else target)
        logits = model(*inputs, **({"labels": target} if source == "model" else {}))
        prediction, y = (
            (logits.flatten(0, 1), target.flatten()) if flattened else (logits.movedim(-1, 1), target)
        )
        (criterion if source == "loss" else twin)(prediction, y).backward()
        found = scores.take()
        assert monitor.stats()["labels"] == {source: 1}
        assert monitor.stats()["scores"] == "split"
    tokens = [
        [
            torch.tensor(oracle.layers(encoder.get_submodule("project"), row)).view(3, -1).tolist()
            for row in x.tolist()
        ]
        for encoder, x in zip(inner.encoders.values(), inputs, strict=True)
    ]
    unimodal: list[Any] = [[[[] for _ in range(CLASSES)] for _ in range(B)] for _ in tokens]
    for t in range(3):
        here = [[sample[t] for sample in samples] for samples in tokens]
        for m, rows in enumerate(oracle.split(inner.head, here)):
            for sample, values in enumerate(rows):
                for c, value in enumerate(values):
                    unimodal[m][sample][c].append(value)
    expect(found, unimodal, target.tolist())


# Samples that lack a modality


@pytest.mark.parametrize("which", ["split", "per-head", "zero-out"])
@pytest.mark.parametrize("name", ["class indices", "multi-label", "MSE of several outputs", "L1", "function"])
def test_samples_that_lack_a_modality(name: str, which: str):
    kind = KINDS[name]
    make, options = MODELS[which]
    model = make(M, width=[2, 4, 3], classes=kind.outputs)
    inputs, target = [torch.randn(B, n) for n in INPUTS[:M]], kind.target()
    present = [[True] * B, [i % 3 > 0 for i in range(B)], [i > 4 for i in range(B)]]
    flags = {n: torch.tensor(p) for n, p in zip(model.names[1:], present[1:], strict=True)}
    with bo.ModalityMonitor(model, model.modalities, model.heads, loss=kind.given, **options) as monitor:
        scores = monitor.scores()
        monitor.observe(target, present=flags)
        UNWATCHED[id(kind)](model(*inputs), target).backward()
        found = scores.take()
    assert found is not None
    features = features_of(model, inputs)
    fill = "mean" if kind.numbers else "zero"
    unimodal = alone(model, features, fill=fill, parts=kind.numbers, present=present)
    scale = None if name == "function" else kind.baseline(target.tolist()) if kind.numbers else 1.0
    expected = oracle.sums(unimodal, target.tolist(), kind.of, scale, present)
    for field, values in expected.items():
        assert getattr(found, field).tolist() == pytest.approx(values, rel=2e-5), field
