"""Autocast, half precision, GradScaler: scores in float32 from what the half-precision pass saw."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.models import FUSIONS, Concat, batch, batch_norm, train_step, watch
from tests.unit.monitor.helpers import Spy, flat, sums_of


def counts_of(labels):
    return torch.bincount(labels, minlength=5).tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_autocast(fusion, dtype):
    model = FUSIONS[fusion]()
    inputs, labels = batch()
    expected = sums_of(model, inputs, labels)
    with watch(model) as monitor:
        scores, spy = monitor.scores(), Spy(monitor)
        with torch.autocast("cpu", dtype):
            logits = model(*inputs)
            loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        sums = scores.take()
        assert monitor.stats()["scores"] == (
            "split" if fusion in ("concat", "reversed", "no_bias") else monitor.stats()["scores"]
        )
    assert sums is not None
    assert expected is not None
    assert sums.label_counts.tolist() == counts_of(labels)
    assert all(z.dtype == torch.float32 for z in spy.unimodal[0].values())
    if fusion not in ("mlp", "transformer", "film", "inline"):  # these draw dropout masks
        torch.testing.assert_close(sums.score, expected.score, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fusion", ["concat", "sum", "gated", "mlp"])
def test_models_in_half_precision(fusion, dtype):
    model = FUSIONS[fusion](encoder=batch_norm).to(dtype)
    inputs, labels = batch(32)
    sums = sums_of(model, [x.to(dtype) for x in inputs], labels)
    assert sums is not None
    assert sums.score.dtype == torch.float32
    assert sums.label_counts.tolist() == counts_of(labels)


def test_split_under_autocast_adds_up():
    model = Concat()
    inputs, labels = batch()
    with watch(model) as monitor:
        spy = Spy(monitor)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(*inputs)
        F.cross_entropy(logits.float(), labels).backward()
    joint = torch.stack(list(spy.unimodal[0].values())).sum(0)
    torch.testing.assert_close(joint, logits.detach().float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("scale", [2.0**16, 2.0**-10])
def test_a_scaled_loss(scale):
    model = Concat()
    inputs, labels = batch()
    expected = sums_of(model, inputs, labels)
    with watch(model) as monitor:
        scores = monitor.scores()
        (scale * F.cross_entropy(model(*inputs), labels)).backward()
        sums = scores.take()
    assert sums is not None
    assert expected is not None
    torch.testing.assert_close(flat(sums), flat(expected))


def test_a_gradient_that_overflowed_tells_no_labels():
    model = Concat()
    inputs, labels = batch()
    with watch(model) as monitor:
        scores = monitor.scores()
        (
            F.cross_entropy(model(*inputs), labels, reduction="none")
            * torch.tensor([1.0] * 7 + [float("inf")])
        ).sum().backward()
        sums = scores.take()
    assert sums is not None
    assert sums.count.tolist() == [7, 7]


def test_logits_that_are_not_finite():
    model = Concat()
    with watch(model) as monitor:
        train_step(model, *batch())
        scores = monitor.scores()
        inputs, labels = batch()
        monitor.observe(labels)
        with torch.no_grad():
            model.head.weight[0, 0] = float("nan")
        train_step(model, inputs, labels)
        sums = scores.take()
    assert sums is not None
    assert not torch.isfinite(sums.score[0])
    assert torch.isfinite(sums.score[1])


def test_the_grad_scaler():
    model = Concat()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    inputs, labels = batch()
    with watch(model) as monitor:
        scores = monitor.scores()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(*inputs).float(), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        sums = scores.take()
    assert sums is not None
    assert sums.label_counts.tolist() == counts_of(labels)
