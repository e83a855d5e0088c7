"""Half precision: each method under autocast and a GradScaler, fused bases, steps that overflow, half weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import balanceopt as bo
from tests.everything import Everything, everything
from tests.models import Concat
from tests.training import batch, distance, small_model

METHODS: dict[str, Callable[[], list[bo.Modulation]]] = {
    "OGM": lambda: [bo.OGM(0.5, noise=False)],
    "OGM-GE": lambda: [bo.OGM(0.5)],
    "OGM update": lambda: [bo.OGM(0.5, noise=False, apply_to="update")],
    "AMSS": lambda: [bo.AMSS()],
    "AMSS+": lambda: [bo.AMSS(scale="unbiased")],
    "OGM-GE, AMSS": lambda: [bo.OGM(0.5), bo.AMSS()],
}
BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.01),
    "AdamW fused": lambda groups: torch.optim.AdamW(groups, lr=0.01, fused=True),
}
every_method = pytest.mark.parametrize("method", METHODS)
every_base = pytest.mark.parametrize("base", BASES)


def build(method: str, base: str) -> Everything:
    """All pieces, OPM among them, on the model whose first modality dominates."""
    return everything(small_model(), METHODS[method](), make=BASES[base])


def scaled_step(
    run: Everything,
    scaler: torch.amp.GradScaler,
    number: int,
    dtype: torch.dtype | None = None,
    *,
    broken: bool = False,
    parts: int = 1,
    clip: bool = False,
) -> None:
    """The loop of torch's AMP recipe."""
    inputs, labels = batch(number, run.model)
    run.optimizer.zero_grad()
    for rows in torch.arange(len(labels)).chunk(parts):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = F.cross_entropy(run.model(*[x[rows] for x in inputs]), labels[rows]) / parts
        scaler.scale(loss * float("inf") if broken else loss).backward()
    if clip:
        scaler.unscale_(run.optimizer)
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 0.1)
    scaler.step(run.optimizer)
    scaler.update()


def finite(model: torch.nn.Module) -> bool:
    return all(bool(p.isfinite().all()) for p in model.parameters())


@every_method
@every_base
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_with_accumulation_and_clipping(method: str, base: str, dtype: torch.dtype):
    run = build(method, base)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    for number in range(4):
        scaled_step(run, scaler, number, dtype, parts=2, clip=True)
    assert run.balanced.stats()["modulated"] == 4
    assert run.modulator.stats()["dropping"] == 7  # all forwards but the first
    assert finite(run.model)


@every_method
@every_base
def test_scaling_changes_nothing(method: str, base: str):
    run, twin = build(method, base), build(method, base)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for number in range(3):
        scaled_step(run, scaler, number)
        twin.train(number)
    assert distance(run.model, twin.model) < 1e-6
    assert torch.equal(run.modulator.q, twin.modulator.q)


@every_method
@every_base
def test_a_step_that_overflows_uses_nothing(method: str, base: str):
    run, twin = build(method, base), build(method, base)
    run.modulator.remove()  # its masks are numbered by forwards, of which there are more here
    twin.modulator.remove()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100)
    for number in range(3):
        scaled_step(run, scaler, 50 + number, broken=True)
        scaled_step(run, scaler, number)
        twin.train(number)
    assert run.balanced.stats() == twin.balanced.stats()
    assert run.optimizer.param_groups[0]["balanceopt_step"] == 3
    assert distance(run.model, twin.model) < 1e-6


@every_method
@every_base
def test_weights_in_bfloat16(method: str, base: str):
    model: Concat = small_model().to(torch.bfloat16)
    run = everything(model, METHODS[method](), make=BASES[base])
    for number in range(4):
        inputs, labels = batch(number, model)
        run.optimizer.zero_grad()
        F.cross_entropy(model(*[x.bfloat16() for x in inputs]), labels).backward()
        run.optimizer.step()
    assert run.balanced.stats()["modulated"] == 4
    assert run.modulator.stats()["dropping"] == 3
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert finite(model)
