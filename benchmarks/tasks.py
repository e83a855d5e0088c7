"""What a model is asked for, a class, several labels or a number: the loss that trains it and what measures it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.extras import need

Arrays = tuple[np.ndarray, np.ndarray]

# A regression that is much worse than the mean is as good as none; without a floor one would be all of a set's mean.
_FLOOR = -100.0
# Standard deviations beyond which a feature counts as that far.
_FAR = 5.0


@dataclass(frozen=True)
class Task:
    """A kind of target.

    Args:
        metric: name of the number that is reported, in percent, the more the better.
        make_loss: the loss module that trains it.
        measure: the metric of (outputs (N, C), targets).
        probe: the metric that a linear model of (features, targets) reaches on others.
        chance: the metric of outputs that say nothing, for C outputs.
        outputs: C, from the targets.
        has_classes: whether each sample has one class.
    """

    metric: str
    make_loss: Callable[[], nn.Module]
    measure: Callable[[Tensor, Tensor], float]
    probe: Callable[[Arrays, Arrays], float]
    chance: Callable[[int], float]
    outputs: Callable[[Tensor], int]
    has_classes: bool = False


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Percent of the samples whose largest logit is their class's."""
    return 100 * (logits.argmax(dim=1) == labels).double().mean().item()


def determination(outputs: Tensor, targets: Tensor) -> float:
    """R2 in percent: 0 is the targets' mean, 100 is perfect; -100 at the least."""
    outputs, targets = outputs.double(), targets.double()
    rest = ((outputs - targets) ** 2).sum() / ((targets - targets.mean(dim=0)) ** 2).sum()
    return max(100 * (1 - rest.item()), _FLOOR)


def mean_average_precision(logits: Tensor, labels: Tensor) -> float:
    """Mean over the labels of the average precision, percent; labels that no sample has, or all, do not count."""
    return _mean_average_precision(logits.double().numpy(), labels.numpy())


def _mean_average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    told = (labels.min(axis=0) == 0) & (labels.max(axis=0) == 1)
    precision = need("sklearn.metrics").average_precision_score(
        labels[:, told], scores[:, told], average=None
    )
    return float(100 * np.mean(precision))


def logistic_probe(seen: Arrays, unseen: Arrays) -> float:
    """Accuracy in percent that a logistic regression of `seen` (features, classes) reaches on `unseen`."""
    seen_features, unseen_features = _scaled(seen[0], unseen[0])
    return float(100 * _logistic(seen_features, seen[1]).score(unseen_features, unseen[1]))


def ridge_probe(seen: Arrays, unseen: Arrays) -> float:
    """R2 in percent that a ridge regression of `seen` (features, numbers) reaches on `unseen`."""
    # A unit that is all but dead on the samples seen would be huge on others, and R2 has no bound.
    seen_features, unseen_features = (x.clip(-_FAR, _FAR) for x in _scaled(seen[0], unseen[0]))
    ridge = need("sklearn.linear_model").RidgeCV(np.logspace(-2, 3, 11)).fit(seen_features, seen[1])
    predicted = ridge.predict(unseen_features).reshape(unseen[1].shape)
    return determination(torch.from_numpy(predicted), torch.from_numpy(unseen[1]))


def labels_probe(seen: Arrays, unseen: Arrays) -> float:
    """Mean average precision in percent that a logistic regression for each label reaches on `unseen`."""
    seen_features, unseen_features = _scaled(seen[0], unseen[0])
    scores = np.zeros(unseen[1].shape)
    for number, label in enumerate(seen[1].T):
        if label.min() < label.max():
            scores[:, number] = _logistic(seen_features, label).decision_function(unseen_features)
    return _mean_average_precision(scores, unseen[1])


def _logistic(features: np.ndarray, labels: np.ndarray) -> Any:
    regression = need("sklearn.linear_model").LogisticRegression(max_iter=1000)
    with warnings.catch_warnings():
        # A unit that is dead can leave it a step short of convergence, which moves no prediction.
        warnings.simplefilter("ignore")
        return regression.fit(features, labels)


def _scaled(seen: np.ndarray, unseen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features with mean 0 and standard deviation 1 over those seen."""
    mean, std = seen.mean(axis=0), seen.std(axis=0) + 1e-6
    return (seen - mean) / std, (unseen - mean) / std


CLASS = Task(
    "accuracy",
    nn.CrossEntropyLoss,
    accuracy,
    logistic_probe,
    chance=lambda outputs: 100 / outputs,
    outputs=lambda labels: int(labels.max()) + 1,
    has_classes=True,
)
NUMBER = Task(
    "R2",
    nn.MSELoss,
    determination,
    ridge_probe,
    chance=lambda outputs: 0.0,
    outputs=lambda targets: targets.shape[1],
)
LABELS = Task(
    "mAP",
    nn.BCEWithLogitsLoss,
    mean_average_precision,
    labels_probe,
    chance=lambda outputs: 0.0,
    outputs=lambda labels: labels.shape[1],
)
