"""OGM and OGM-GE through a whole training run against the papers' loop, written naively on the gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import balanceopt as bo
from tests.noise import gaussian_like
from tests.reference import ogm
from tests.training import backward, batches, distance, grad_of, groups_of, sgd, small_model, train

SEED = 11
FORMS = {"cvpr": ogm.coefficient_a, "cvpr_v0": ogm.coefficient_b, "tpami": ogm.coefficient_c}


def naive_step(model: Any, given: Any, alpha: float, form: str, noise: bool, step: int) -> None:
    """Algorithm 1 of CVPR 2022 on the gradients of one batch; the noise is drawn by our rule, scaled by theirs."""
    inputs, labels = given
    with torch.no_grad():
        features = model.encode(*inputs)
    blocks = model.head.weight.detach().split(model.widths, 1)
    pairs = zip(features, blocks, strict=True)
    scores = [ogm.score_eq8(z, w, model.head.bias.detach(), len(features), labels) for z, w in pairs]
    index = 0
    for encoder, ratio in zip(model.modalities.values(), ogm.ratios_eq7(scores), strict=True):
        for p in encoder.parameters():
            if p.dim() >= 2:
                g = grad_of(p)
                h = ogm.noise_std(g) * gaussian_like(g, SEED, step, index) if noise else 0.0
                p.grad = FORMS[form](ratio, alpha) * g + h
            index += 1


@pytest.mark.parametrize("modalities", [2, 3])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("noise", [False, True], ids=["OGM", "OGM-GE"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_run(modalities: int, form: Any, noise: bool, momentum: float):
    steps = 5
    naive = small_model(modalities)
    bare = sgd(groups_of(naive), momentum=momentum)
    for step, one in enumerate(batches(naive, steps)):
        bare.zero_grad()
        backward(naive, one)
        naive_step(naive, one, 0.5, form, noise, step)
        bare.step()

    model = small_model(modalities)
    monitor = bo.ModalityMonitor(model, model.modalities, head=model.head)
    base = sgd(groups_of(model), momentum=momentum)
    optimizer = bo.ModulatedOptimizer(base, monitor, bo.OGM(0.5, form=form, noise=noise), seed=SEED)
    recorder = bo.Recorder(optimizer)
    train(model, optimizer, batches(model, steps))
    assert max(recorder.series("coefficient")["audio"][1]) < 1  # it was held back at every step
    assert distance(model, naive) < 2e-6


def test_scores_come_from_accumulated_gradients_batches_together():
    """Two micro-batches give the scores, and so the coefficients, of both together."""
    seen = []
    for parts in (1, 2):
        model = small_model()
        monitor = bo.ModalityMonitor(model, model.modalities, head=model.head)
        optimizer = bo.ModulatedOptimizer(sgd(groups_of(model)), monitor, bo.OGM(0.5, noise=False))
        optimizer.listeners.append(lambda _, __, ___, values: seen.append(values))
        ((inputs, labels),) = batches(model, 1)
        for rows in torch.arange(8).chunk(parts):
            (F.cross_entropy(model(*[x[rows] for x in inputs]), labels[rows]) / parts).backward()
        optimizer.step()
    for whole, both in zip(seen[:3], seen[3:], strict=True):
        torch.testing.assert_close(whole, both)
