"""Results of a round of validation: accuracy, mean average precision, R2."""

from __future__ import annotations

import torch
from torch import Tensor

from balanceopt.functional import AnswerKind
from balanceopt.probes._rows import Rows

# Samples of which a mean average precision is made.
_RANKED = 10_000


class Round:
    """Results of a round of validation, as sums that do not wait for the device."""

    def __init__(self) -> None:
        self._sums: dict[str, list[Tensor]] = {}
        self._kept: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
        self._count: dict[str, int] = {}
        self._task: AnswerKind = "classes"

    @property
    def is_empty(self) -> bool:
        """Whether no batch came."""
        return not self._count

    def add(self, name: str, prediction: Tensor, rows: Rows, task: AnswerKind) -> None:
        """Add the outputs `(B, O)` of one modality's probe on a batch."""
        _, y, weight = rows
        if task == "labels" and y.shape[1] == 1:
            task, prediction, y = "classes", torch.cat([-prediction, prediction], 1), (y[:, 0] > 0.5).long()
        self._task = task
        seen = self._count.get(name, 0)
        self._count[name] = seen + len(prediction)
        if task == "classes":
            right = prediction.argmax(1) == (y if y.dim() == 1 else y.argmax(1))
            sums = [(right * weight).sum(), weight.sum()]
        elif task == "labels":
            if seen < _RANKED:
                self._kept.setdefault(name, []).append((prediction, y, weight))
            sums = [weight.sum()]
        else:
            w = weight.unsqueeze(1)
            sums = [
                ((y - prediction).square() * w).sum(0),
                (y * w).sum(0),
                (y.square() * w).sum(0),
                weight.sum(),
            ]
        earlier = self._sums.get(name)
        self._sums[name] = sums if earlier is None else [a + b for a, b in zip(earlier, sums, strict=True)]

    def sums(self, names: tuple[str, ...]) -> Tensor:
        """Return `(2, M)`: results times numbers of samples, and numbers of samples, which add over ranks."""
        nothing = torch.zeros(2, dtype=torch.float32, device="cpu")
        pairs = [self._pair(name) if name in self._sums else nothing for name in names]
        device = next(
            (pair.device for name, pair in zip(names, pairs, strict=True) if name in self._sums), None
        )
        return torch.stack([pair.to(device or "cpu") for pair in pairs], 1)

    def _pair(self, name: str) -> Tensor:
        sums = self._sums[name]
        if self._task == "classes":
            return torch.stack(sums).float()
        count = sums[-1]
        if self._task == "labels":
            result = mean_average_precision(
                *(torch.cat(parts) for parts in zip(*self._kept[name], strict=True))
            )
        else:
            error, total, square, _ = sums
            variance = square - total.square() / count
            result = torch.where(variance > 0, 1 - error / variance, torch.nan).nanmean()
        usable = torch.isfinite(result)
        return torch.stack([torch.where(usable, result * count, 0), torch.where(usable, count, 0)]).float()


def mean_average_precision(score: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Compute the mean over labels of the average precision, 0-d; labels without a positive sample do not count.

    Args:
        score: `(B, O)`, higher for likelier labels.
        y: `(B, O)` of 0 and 1.
        weight: `(B,)`, 0 for samples that do not count.
    """
    score = torch.where(weight.unsqueeze(1) > 0, score, -torch.inf)
    positive = (y > 0.5) & (weight.unsqueeze(1) > 0)
    ranked = positive.gather(0, score.argsort(dim=0, descending=True, stable=True)).to(score.dtype)
    places = torch.arange(1, len(score) + 1, dtype=score.dtype, device=score.device).unsqueeze(1)
    precision = ranked.cumsum(0) / places
    result: Tensor = torch.where(
        ranked.sum(0) > 0, (precision * ranked).sum(0) / ranked.sum(0), torch.nan
    ).nanmean()
    return result
