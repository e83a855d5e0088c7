"""What the methods make of the scores of other losses than cross-entropy of a class a sample, against naive rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import balanceopt as bo
from tests.models import INPUTS, Concat, Tokens
from tests.reference import agm, amss, ogm, opm
from tests.reference import losses as naive
from tests.reference import losses_monitor as oracle

B, M, CLASSES, POSITIONS, IGNORED, STEPS = 6, 3, 4, 3, -100, 4


class Means(NamedTuple):
    """Naive means over a batch's samples, of each modality.

    Attributes:
        score: mean score.
        loss: mean loss over tau.
        baseline: loss of the best constant prediction over tau.
        entropy: mean entropy of the features.
    """

    score: list[float]
    loss: list[float]
    baseline: float
    entropy: list[float]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def means(losses: Any, tau: float, baseline: float, entropies: Any) -> Means:
    return Means(
        [mean([naive.score(x, tau) for x in row]) for row in losses],
        [mean(row) / tau for row in losses],
        baseline / tau,
        [mean(row) for row in entropies],
    )


def features_of(model: Concat, inputs: list[Tensor]) -> list[oracle.Rows]:
    pairs = zip(model.encoders.values(), inputs, strict=True)
    return [[oracle.layers(encoder, row) for row in x.tolist()] for encoder, x in pairs]


def of_regression(model: Concat, inputs: list[Tensor], target: Tensor) -> Means:
    features = features_of(model, inputs)
    joint = [oracle.layers(model.head, oracle.joined([rows[i] for rows in features])) for i in range(B)]
    unimodal = oracle.centred(oracle.split(model.head, features), joint)
    targets = target.tolist()
    losses = [
        [naive.regression(f, y, naive.square) for f, y in zip(rows, targets, strict=True)]
        for rows in unimodal
    ]
    baseline = naive.regression_baseline(targets, naive.square)
    return means(losses, baseline, baseline, [[oracle.entropy_of(z) for z in rows] for rows in features])


def of_labels(model: Concat, inputs: list[Tensor], target: Tensor) -> Means:
    features = features_of(model, inputs)
    unimodal = oracle.split(model.head, features)
    losses = [
        [naive.binary_cross_entropy(f, y) for f, y in zip(rows, target.tolist(), strict=True)]
        for rows in unimodal
    ]
    frequencies = [mean(column) for column in zip(*target.tolist(), strict=True)]
    baseline = mean([naive.entropy([p, 1 - p]) for p in frequencies])
    return means(losses, 1.0, baseline, [[oracle.entropy_of(z) for z in rows] for rows in features])


def of_tokens(model: Concat, inputs: list[Tensor], target: Tensor) -> Means:
    """A sample's loss and entropy are means over the positions that count, and it counts once."""
    tokens = [
        [torch.tensor(oracle.layers(encoder.get_submodule("project"), row)).view(POSITIONS, -1).tolist() for row in x]
        for encoder, x in zip(model.encoders.values(), (x.tolist() for x in inputs), strict=True)
    ]  # fmt: skip
    losses: list[list[float]] = [[] for _ in tokens]
    entropies: list[list[float]] = [[] for _ in tokens]
    shares = [0.0] * CLASSES
    for i, labels in enumerate(target.tolist()):
        counted = [t for t, y in enumerate(labels) if y != IGNORED]
        for t in counted:
            shares[labels[t]] += 1 / len(counted)
        if not counted:
            continue
        unimodal = oracle.split(model.head, [[samples[i][t] for t in counted] for samples in tokens])
        for m, rows in enumerate(unimodal):
            pairs = zip(rows, counted, strict=True)
            losses[m].append(mean([-naive.log_softmax(row)[labels[t]] for row, t in pairs]))
            entropies[m].append(mean([oracle.entropy_of(tokens[m][i][t]) for t in counted]))
    total = sum(shares)
    return means(losses, 1.0, naive.entropy([s / total for s in shares]), entropies)


def numbers() -> Tensor:
    return 2 * torch.randn(B, 3) + 1


def multi_hot() -> Tensor:
    return torch.randint(2, (B, CLASSES)).float()


def labels_of_tokens() -> Tensor:
    target = torch.randint(CLASSES, (B, POSITIONS))
    target[1, :2] = target[4, 0] = target[5] = IGNORED
    return target


class Task(NamedTuple):
    """A loss with a model, targets and naive means."""

    criterion: nn.Module
    model: dict[str, Any]
    target: Callable[[], Tensor]
    naive: Callable[[Concat, list[Tensor], Tensor], Means]


TASKS = {
    "regression": Task(nn.MSELoss(), {"classes": 3}, numbers, of_regression),
    "several labels": Task(nn.BCEWithLogitsLoss(), {"classes": CLASSES}, multi_hot, of_labels),
    "tokens": Task(
        nn.CrossEntropyLoss(), {"classes": CLASSES, "encoder": Tokens}, labels_of_tokens, of_tokens
    ),
}


class Run:
    """Some steps of training under a method: the naive means of each, and the recorded values."""

    def __init__(self, task: Task, modulation: bo.Modulation | None) -> None:
        self.expected: list[Means] = []
        self.q: list[list[float]] = []
        model = Concat(M, width=[2, 4, 3], **task.model)
        self.names = model.names
        with bo.ModalityMonitor(model, model.modalities, model.head, loss=task.criterion) as monitor:
            base = torch.optim.SGD(model.parameters(), lr=0.3)
            optimizer = base if modulation is None else bo.ModulatedOptimizer(base, monitor, modulation)
            prediction = bo.OPM(monitor, q_base=0.6, lam=0.7, p_exe=0.0) if modulation is None else None
            source: Any = optimizer if prediction is None else prediction
            self.recorder = bo.Recorder(source)
            for _ in range(STEPS):
                inputs, target = [torch.randn(B, n) for n in INPUTS[:M]], task.target()
                self.expected.append(task.naive(model, inputs, target))
                optimizer.zero_grad()
                logits = model(*inputs)
                task.criterion(logits.movedim(-1, 1) if logits.dim() > 2 else logits, target).backward()
                optimizer.step()
                if prediction is not None:
                    prediction.update()
                    self.q.append(prediction.q.tolist())

    def recorded(self, quantity: str) -> list[list[float]]:
        series = self.recorder.series(quantity)
        return [list(row) for row in zip(*(series[name][1] for name in self.names), strict=True)]


def near(values: list[list[float]]) -> Any:
    return [pytest.approx(row, rel=1e-4, abs=1e-6) for row in values]


@pytest.mark.parametrize("task", TASKS)
class TestFollowsTheScores:
    def test_ogm(self, task: str):
        run = Run(TASKS[task], bo.OGM(alpha=0.4, noise=False))
        ratios = [ogm.ratios_eq7(x.score) for x in run.expected]
        assert run.recorded("score") == near([x.score for x in run.expected])
        assert run.recorded("ratio") == near(ratios)
        expected = [[ogm.coefficient_a(ratio, 0.4) for ratio in row] for row in ratios]
        assert run.recorded("coefficient") == near(expected)

    def test_agm(self, task: str):
        run = Run(TASKS[task], bo.AGM(alpha=0.7))
        losses = [x.loss for x in run.expected]
        assert run.recorded("cross_entropy") == near(losses)
        expected = [agm.coefficients(losses[: step + 1], 0.7, 10.0) for step in range(STEPS)]
        assert run.recorded("coefficient") == near(expected)

    @pytest.mark.parametrize("offset", [0.5, 3.0])
    def test_amss(self, task: str, offset: float):
        run = Run(TASKS[task], bo.AMSS(temperature=0.8, offset=offset))
        expected = [
            [(x.baseline - loss + offset) / h for loss, h in zip(x.loss, x.entropy, strict=True)]
            for x in run.expected
        ]
        assert run.recorded("significance") == near(expected)
        ratios = [amss.keep_ratio(row, 0.8, 0.1, 0.9) for row in expected]
        assert run.recorded("keep_ratio") == near(ratios)

    def test_opm(self, task: str):
        run = Run(TASKS[task], None)
        expected = [opm.drop_probabilities(x.score, 0.6, 0.7) for x in run.expected]
        assert run.q == near(expected)
        assert any(q > 0 for row in run.q for q in row)
