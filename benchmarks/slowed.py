"""Which modality OGM slows, and which one knows more: a vision-language model, RGB-D masks, text + audio + vision.

    python -m benchmarks.slowed

trains each model on made data in which one modality says more. In every step it notes which modality OGM slowed most,
and which one has the smaller loss if the others are taken away by hand, with hooks written here. Needs
`pip install 'balanceopt[transformers]'`.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import balanceopt as bo
from benchmarks.loss_models import Case, llava, llava_encoders, rgbd, sentiment
from benchmarks.loss_pairs import averaged, run_by_hand, without

STEPS = 60
SEEDS = range(3)
_WORDS = 40


@dataclass
class Slowed:
    """Counts of steps by modality: slowed most, knowing most by hand, and steps in which the two are the same."""

    slowed: Counter[str]
    knows: Counter[str]
    same: int
    modulated: int


def train(case: Case, batch: Callable[[], tuple[dict[str, Any], Tensor]], steps: int = STEPS) -> Slowed:
    """Train a case's model on new batches under OGM."""
    monitor = bo.ModalityMonitor(case.model, case.encoders, case.head, loss=case.criterion)
    base = torch.optim.SGD(case.model.parameters(), lr=0.05, momentum=0.9)
    optimizer = bo.ModulatedOptimizer(base, monitor, bo.OGM(0.8, noise=False))
    recorder = bo.Recorder(optimizer)
    result = Slowed(Counter(), Counter(), 0, 0)
    for _ in range(steps):
        case.inputs, case.target = batch()
        best = min(alone := losses_alone(copy.deepcopy(case)), key=lambda m: alone[m])
        optimizer.zero_grad()
        case.train(case.model(**case.inputs)).backward()
        optimizer.step()
        result.knows[best] += 1
        latest = {m: values[-1] for m, (_, values) in recorder.series("coefficient").items()}
        slowed = min(latest, key=lambda m: latest[m])
        if latest[slowed] < 1:
            result.slowed[slowed] += 1
            result.same += slowed == best
    result.modulated = optimizer.stats()["modulated"]
    monitor.remove()
    return result


def losses_alone(case: Case) -> dict[str, float]:
    """Return the loss of each modality with the others zero, for numbers at their mean over the batch."""
    case.model.eval()
    numbers = case.target.is_floating_point()
    fill = partial(averaged, samples=len(case.target)) if numbers else torch.zeros_like
    with torch.no_grad():
        return {m: float(case.train(run_by_hand(case, without(m, fill)))) for m in case.encoders}


def vision_language() -> tuple[Case, Callable[[], tuple[dict[str, Any], Tensor]]]:
    """Answers of two words: a picture tells both, the first word tells the second."""
    model: Any = llava(_WORDS)

    def batch() -> tuple[dict[str, Any], Tensor]:
        y = torch.randint(0, 4, (6,))
        answer = torch.stack([20 + y, 24 + y, 0 * y + 2], 1)
        ids = torch.cat([torch.full((6, 4), _WORDS - 1), torch.randint(5, 20, (6, 4)), answer], 1)
        labels = ids.clone()
        labels[:, :8] = -100
        pixels = torch.randn(6, 3, 16, 16) + y[:, None, None, None]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
        return {**inputs, "labels": labels}, labels

    inputs, target = batch()
    encoders = llava_encoders(model)
    return Case(model, encoders, model.lm_head, inputs, lambda out: out.loss, target, tokens=True), batch


def masks() -> tuple[Case, Callable[[], tuple[dict[str, Any], Tensor]]]:
    """Five classes of pixels in blocks: depth tells them, colour tells two of them apart from the others."""
    model, criterion = rgbd(5), nn.CrossEntropyLoss(ignore_index=255)

    def batch() -> tuple[dict[str, Any], Tensor]:
        blocks = torch.randint(5, (8, 4, 4))
        y = blocks.repeat_interleave(4, 1).repeat_interleave(4, 2)
        depth = 2.0 * (y - 2).unsqueeze(1) + torch.randn(8, 1, 16, 16)
        rgb = 2.0 * (y > 2).unsqueeze(1) + torch.randn(8, 3, 16, 16)
        target = torch.where(torch.rand(8, 16, 16) < 0.1, 255, y)
        return {"rgb": rgb, "depth": depth}, target

    inputs, target = batch()
    case = Case(
        model, dict(model.encoders.items()), model, inputs, lambda out: criterion(out, case.target), target
    )
    case.criterion = criterion
    return case, batch


def opinions() -> tuple[Case, Callable[[], tuple[dict[str, Any], Tensor]]]:
    """A number from -3 to 3, mean 1: text tells most of it, audio a little, vision nothing."""
    model, criterion = sentiment(), nn.L1Loss()

    def batch() -> tuple[dict[str, Any], Tensor]:
        y = torch.randint(-1, 4, (16,))
        words = torch.cat(
            [(10 + 3 * y).clamp(5, 30).unsqueeze(1).expand(16, 4), torch.randint(31, 39, (16, 3))], 1
        )
        t = torch.arange(400) / 400
        audio = torch.randn(16, 400) + 0.3 * y[:, None] * torch.sin(60 * t)
        inputs = {
            "text": {"input_ids": words},
            "audio": {"input_values": audio},
            "vision": torch.randn(16, 6, 5),
        }
        return inputs, y.float().unsqueeze(1)

    inputs, target = batch()
    case = Case(
        model,
        dict(model.encoders.items()),
        model.head,
        inputs,
        lambda out: criterion(out, case.target),
        target,
    )
    case.criterion = criterion
    return case, batch


MODELS: dict[str, Callable[[], tuple[Case, Callable[[], tuple[dict[str, Any], Tensor]]]]] = {
    "LLaVA": vision_language,
    "RGB-D masks": masks,
    "text + audio + vision, L1": opinions,
}


def table(seeds: Sequence[int] = SEEDS) -> str:
    """Return a row for each model, over all seeds, in Markdown."""
    lines = [
        "| model | slowed most, in steps | knows more by hand, in steps | slowed the one that knows more |",
        "|---|---|---|--:|",
    ]
    for name, build in MODELS.items():
        total = Slowed(Counter(), Counter(), 0, 0)
        for seed in seeds:
            torch.manual_seed(seed)
            result = train(*build())
            total.slowed += result.slowed
            total.knows += result.knows
            total.same += result.same
        lines.append(
            f"| {name} | {_counts(total.slowed)} | {_counts(total.knows)} | {total.same} of {len(seeds) * STEPS} |"
        )
    return "\n".join(lines)


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{m} {count}" for m, count in counter.most_common()) or "none"


if __name__ == "__main__":
    print(table())
