"""Computations side by side: what they ask of other ranks, or of the device, goes out once for all of them.

A computation is a generator. It yields an `Ask` where it needs numbers from elsewhere, and goes on with the answer.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Literal, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Ask(NamedTuple):
    """What a computation waits for: `values` reduced over ranks, or brought to the host."""

    values: Tensor
    how: Literal["sum", "max", "host"]


Steps = Generator[Ask, Tensor, T]


def to_host(values: Tensor) -> Steps[Tensor]:
    """The values, where the host can read them without waiting."""
    if values.device.type == "cpu":
        return values
    return (yield Ask(values, "host"))


@torch.no_grad()
def run_together(computations: Sequence[Steps[T]], group: dist.ProcessGroup | None) -> list[T]:
    """The results, in order; with a group every rank runs computations that ask for the same in the same order."""
    results: dict[int, T] = {}
    waiting: dict[int, Ask] = {}
    answers: dict[int, Tensor | None] = dict.fromkeys(range(len(computations)))
    while answers:
        for number, answer in answers.items():
            steps = computations[number]
            try:
                waiting[number] = next(steps) if answer is None else steps.send(answer)
            except StopIteration as end:
                results[number] = end.value
        answers = _answered(waiting, group)
        waiting = {}
    return [results[number] for number in range(len(computations))]


def _answered(asks: dict[int, Ask], group: dist.ProcessGroup | None) -> dict[int, Tensor | None]:
    """One transfer for all asks of a kind."""
    kinds: dict[tuple[str, torch.dtype, torch.device], list[int]] = {}
    for number, ask in asks.items():
        kinds.setdefault((ask.how, ask.values.dtype, ask.values.device), []).append(number)
    answers: dict[int, Tensor | None] = {}
    for (how, *_), numbers in kinds.items():
        flat = torch.cat([asks[number].values.flatten() for number in numbers])
        if how == "host":
            flat = flat.cpu()
        else:
            dist.all_reduce(flat, dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX, group=group)
        parts = flat.split([asks[number].values.numel() for number in numbers])
        answers |= {n: part.view(asks[n].values.shape) for n, part in zip(numbers, parts, strict=True)}
    return dict(sorted(answers.items()))
