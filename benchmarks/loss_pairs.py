"""Scores of a training pass against a loop over samples, for models of public families and their losses.

    python -m benchmarks.loss_pairs

prints a row for each pair: uni-modal predictions, where the targets came from, and the largest difference between the
monitor's mean score of a modality and that of the loop. Nothing of the package is used in the loop: other modalities
are zeroed by hooks written here, and each sample's loss is computed from Python numbers. Needs
`pip install 'balanceopt[transformers]'`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import balanceopt as bo
from benchmarks.loss_models import PAIRS, Case

_SEED = 0


@dataclass(frozen=True)
class Comparison:
    """Mean scores by modality, of the monitor and of the loop."""

    monitor: dict[str, float]
    loop: dict[str, float]
    scores: str
    source: str

    @property
    def difference(self) -> float:
        """The largest difference; infinite where a score is no number."""
        pairs = [abs(self.monitor[m] - self.loop[m]) for m in self.loop]
        return max(x if math.isfinite(x) else math.inf for x in pairs)


def compare(build: Callable[[], Case], seed: int = _SEED) -> Comparison:
    """Score one training pass of a new model by the monitor and by the loop."""
    torch.manual_seed(seed)
    case = build()
    twin = copy.deepcopy(case)  # before hooks and running statistics
    monitor = bo.ModalityMonitor(case.model, case.encoders, case.head, loss=case.criterion, **case.options)
    buffer = monitor.scores()
    loss = case.train(case.model(**case.inputs))
    if case.source == "observe":
        monitor.observe(case.target)
    loss.backward()
    sums = buffer.take()
    assert sums is not None
    means = (sums.score / sums.count).tolist()
    stats = monitor.stats()
    (source,) = stats["labels"]
    result = Comparison(
        dict(zip(case.encoders, means, strict=True)), naive_scores(twin), stats["scores"], source
    )
    monitor.remove()
    return result


# -- uni-modal predictions -----------------------------------------------------------------------------------------


def naive_scores(case: Case) -> dict[str, float]:
    """Return each modality's mean score over the samples that count, from one loop over them."""
    case.model.eval()
    for encoder in case.encoders.values():
        encoder.train()  # as in the training pass, where running statistics are not used
    kind = _kind(case.criterion)
    with torch.no_grad():
        alone, joint = _predictions(case, mean=kind not in ("classes", "labels"))
    if kind == "numbers" and case.scores in ("split", "per-head"):
        alone = {m: _centred(x, joint) for m, x in alone.items()}
    target = _listed(case.target)
    losses = {
        m: [_sample_loss(case, kind, f, y) for f, y in zip(x, target, strict=True)] for m, x in alone.items()
    }
    tau = _scale(case, kind, target, losses)
    scores = {m: [math.exp(-x / tau) for x in values if x is not None] for m, values in losses.items()}
    return {m: sum(x) / len(x) for m, x in scores.items()}


def _predictions(case: Case, *, mean: bool) -> tuple[dict[str, list[Any]], list[Any]]:
    """Run the model by hand: the predictions of each modality alone, and the joint ones."""
    outputs: dict[str, Any] = {}
    joint = _logits(case, run_by_hand(case, lambda name, output: outputs.__setitem__(name, output)))
    features = {m: case.features.get(m, lambda x: x)(outputs[m]) for m in case.encoders}
    if case.scores == "split":
        alone, start = {}, 0
        for m, z in features.items():
            stop = start + z.shape[1]
            alone[m] = z @ case.head.weight[:, start:stop].T + case.head.bias / len(features)
            start = stop
    elif case.scores == "per-head":
        alone = {m: case.head[m](z) for m, z in features.items()}
    else:
        fill = partial(averaged, samples=len(case.target)) if mean else torch.zeros_like
        alone = {m: _logits(case, run_by_hand(case, without(m, fill))) for m in case.encoders}
    return {m: _listed(x) for m, x in alone.items()}, _listed(joint)


def run_by_hand(case: Case, replace: Callable[[str, Any], Any]) -> Any:
    """Run the model with `replace(modality, output)` in place of the encoders' outputs; None for the output itself."""
    handles = [
        encoder.register_forward_hook(lambda module, args, output, name=name: replace(name, output))
        for name, encoder in case.encoders.items()
    ]
    try:
        return case.model(**case.inputs)
    finally:
        for handle in handles:
            handle.remove()


def without(alone: str, fill: Callable[[Tensor], Tensor]) -> Callable[[str, Any], Any]:
    """Return a replacement of all encoders' outputs but that of modality `alone` by `fill` of their tensors."""
    return lambda name, output: None if name == alone else _filled(output, fill)


def averaged(x: Tensor, samples: int) -> Tensor:
    """Return features with each sample's replaced by the mean over samples, which are second in an LSTM's states."""
    if len(x) != samples:
        return averaged(x.transpose(0, 1), samples).transpose(0, 1)
    return torch.stack([sum(x[1:], x[0]) / len(x)] * len(x))


def _filled(output: Any, fill: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(output, Tensor):
        return fill(output) if output.is_floating_point() else output
    if isinstance(output, dict):  # Transformers' outputs too
        return type(output)(**{key: _filled(value, fill) for key, value in output.items()})
    if isinstance(output, (tuple, list)):
        return type(output)(_filled(value, fill) for value in output)
    return output


def _logits(case: Case, output: Any) -> Tensor:
    logits = output if isinstance(output, Tensor) else output.logits
    return logits.movedim(-1, 1) if case.tokens else logits


# -- losses --------------------------------------------------------------------------------------------------------


def _kind(criterion: Any) -> str:
    if criterion is None or isinstance(criterion, nn.CrossEntropyLoss):
        return "classes"
    if isinstance(criterion, nn.BCEWithLogitsLoss):
        return "labels"
    return "numbers" if isinstance(criterion, nn.Module) else "function"


def _listed(values: Tensor) -> list[Any]:
    """Return each sample's numbers: outputs by positions, or class indices by position."""
    rows = values.detach().double() if values.is_floating_point() else values
    if values.is_floating_point():
        return [row.reshape(row.shape[0] if row.dim() else 1, -1).tolist() for row in rows]
    return [row.flatten().tolist() for row in rows]


def _centred(parts: list[Any], joint: list[Any]) -> list[Any]:
    """Move each output of a modality's predictions so that its mean is that of the joint prediction."""
    moves = [_mean_of([x[k] for x in joint]) - _mean_of([x[k] for x in parts]) for k in range(len(parts[0]))]
    return [[[f + move for f in fs] for fs, move in zip(x, moves, strict=True)] for x in parts]


def _mean_of(rows: Sequence[Sequence[float]]) -> float:
    values = [value for row in rows for value in row]
    return sum(values) / len(values)


def _sample_loss(case: Case, kind: str, prediction: list[list[float]], target: Any) -> float | None:
    """Return a sample's loss, each position or label by its weight; None where none counts."""
    if kind == "classes":
        return _of_classes(case.criterion, prediction, target)
    if kind == "labels":
        return _of_labels(case.criterion, prediction, target)
    pairs = [(f, y) for fs, ys in zip(prediction, target, strict=True) for f, y in zip(fs, ys, strict=True)]
    if kind == "function":
        return float(case.criterion(torch.tensor([[pairs[0][0]]]), torch.tensor([[pairs[0][1]]])))
    return sum(_elementwise(case.criterion, f - y) for f, y in pairs) / len(pairs)


def _of_classes(criterion: Any, prediction: list[list[float]], target: Any) -> float | None:
    classes, positions = len(prediction), len(prediction[0])
    ignore = -100 if criterion is None else criterion.ignore_index
    weight = [1.0] * classes if criterion is None or criterion.weight is None else criterion.weight.tolist()
    smoothing = 0.0 if criterion is None else criterion.label_smoothing
    total = count = 0.0
    for t in range(positions):
        logits = [prediction[c][t] for c in range(classes)]
        soft = isinstance(target[0], list)
        if not soft and target[t] == ignore:
            continue
        largest = max(logits)
        log_sum = largest + math.log(sum(math.exp(x - largest) for x in logits))
        for c in range(classes):
            share = target[c][t] if soft else float(target[t] == c)
            share = weight[c] * ((1 - smoothing) * share + smoothing / classes)
            total += share * (log_sum - logits[c])
            count += share
    return total / count if count else None


def _of_labels(criterion: Any, prediction: list[list[float]], target: list[list[float]]) -> float:
    total = count = 0.0
    pos = criterion.pos_weight
    for k, (fs, ys) in enumerate(zip(prediction, target, strict=True)):
        positive = 1.0 if pos is None else float(pos[k])
        for f, y in zip(fs, ys, strict=True):
            p = 1 / (1 + math.exp(-f))
            total -= positive * y * math.log(p) + (1 - y) * math.log(1 - p)
            count += positive * y + 1 - y
    return total / count


def _elementwise(criterion: Any, difference: float) -> float:
    size = abs(difference)
    if isinstance(criterion, nn.MSELoss):
        return size * size
    if isinstance(criterion, nn.SmoothL1Loss):
        beta = criterion.beta
        return 0.5 * size * size / beta if size < beta else size - 0.5 * beta
    if isinstance(criterion, nn.HuberLoss):
        delta = criterion.delta
        return 0.5 * size * size if size < delta else delta * (size - 0.5 * delta)
    return size


def _scale(case: Case, kind: str, target: list[Any], losses: dict[str, list[float | None]]) -> float:
    """Return the loss of the best constant prediction, for losses without a scale of their own."""
    if kind in ("classes", "labels"):
        return 1.0
    if kind == "function":
        values = [x for own in losses.values() for x in own if x is not None]
        return sum(values) / len(values)
    constant = []
    for k in range(len(target[0])):
        values = sorted(y for sample in target for y in sample[k])
        middle = (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2
        constant.append([sum(values) / len(values) if isinstance(case.criterion, nn.MSELoss) else middle])
    own = [
        _elementwise(case.criterion, y - constant[k][0])
        for sample in target
        for k in range(len(constant))
        for y in sample[k]
    ]
    return sum(own) / len(own)


def table() -> str:
    """Return the rows of all pairs, in Markdown."""
    lines = [
        "| model | loss | uni-modal predictions | targets from | largest difference |",
        "|---|---|---|---|--:|",
    ]
    for (model, loss), build in PAIRS.items():
        row = compare(build)
        lines.append(f"| {model} | {loss} | {row.scores} | {row.source} | {row.difference:.0e} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
