"""The plain PyTorch loop that every framework's run has to equal, and what those runs share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import balanceopt as bo
from tests.models import Concat, with_dropout
from tests.training import Batch, batches, small_model

SEED = 7
STEPS = 6
ENCODERS = {"audio": "encoders.audio", "visual": "encoders.visual"}


def method(**options: Any) -> bo.OGM:
    """OGM-GE: noise on."""
    return bo.OGM(0.5, **options)


# Every method that changes gradients; each is tried under each framework.
METHODS: dict[str, Callable[[], bo.Modulation]] = {
    "OGM": partial(bo.OGM, 0.5, noise=False),
    "OGM-GE": partial(bo.OGM, 0.5),
    "AGM": bo.AGM,
    "MLB": bo.MLB,
    "Fixed": partial(bo.FixedModulation, {"audio": 0.5}),
    "AMSS": bo.AMSS,
    "AMSS+": partial(bo.AMSS, scale="unbiased"),
}


def model_and_batches(count: int = STEPS, *, dropout: bool = False) -> tuple[Concat, list[Batch]]:
    model = small_model(encoder=with_dropout) if dropout else small_model()
    return model, batches(model, count)


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def halving(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """Half the learning rate after every third step."""
    return torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)


def plain(
    given: Sequence[Batch],
    *,
    modulation: bo.Modulation | None = None,
    make: Callable[[nn.Module], torch.optim.Optimizer] = momentum,
    accumulate: int = 1,
    clip: float | None = None,
    dtype: torch.dtype | None = None,
    scale: float = 2.0**16,
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
) -> Concat:
    """Train `small_model()` with `ModulatedOptimizer` in the loop that a user would write; fp16 with a GradScaler."""
    model = small_model()
    monitor = bo.ModalityMonitor(model, ENCODERS, head="head")
    optimizer = bo.ModulatedOptimizer(make(model), monitor, modulation or method(), seed=SEED)
    scheduler = schedule(optimizer) if schedule else None
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=dtype == torch.float16)
    for first in range(0, len(given), accumulate):
        optimizer.zero_grad()
        for inputs, labels in given[first : first + accumulate]:
            with torch.autocast("cpu", dtype) if dtype else nullcontext():
                loss = F.cross_entropy(model(*inputs), labels) / accumulate
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        if scheduler is not None:
            scheduler.step()
    return model


def unchanged(model: nn.Module) -> bool:
    """Whether no hook of anyone is left on the model."""
    return not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def bare(optimizer: torch.optim.Optimizer) -> bool:
    """Whether no hook of anyone is left on the optimizer."""
    hooks: list[Any] = [value for name, value in vars(optimizer).items() if name.endswith("_hooks")]
    return not any(hooks) and "zero_grad" not in vars(optimizer)


def counters(state: dict[str, Any]) -> dict[str, Any]:
    """What balanceopt put into an optimizer's state dict."""
    return {k: v for k, v in state["param_groups"][0].items() if k.startswith("balanceopt_")}


def flat(count: int, first: int = 0) -> list[tuple[Tensor, ...]]:
    """Batches as re-learning reads them: inputs, then labels."""
    return [(*inputs, labels) for inputs, labels in model_and_batches(first + count)[1][first:]]


def as_samples(given: Sequence[Batch]) -> list[dict[str, Tensor]]:
    """The batches taken apart, as data sets of dictionaries hold them."""
    return [
        {"audio": a, "visual": v, "labels": y}
        for inputs, labels in given
        for a, v, y in zip(*inputs, labels, strict=True)
    ]
