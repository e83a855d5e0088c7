"""What the gradient of a cross-entropy loss at its logits says of labels and scale, whatever the batch."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from balanceopt.functional import recover_labels, recover_scale
from balanceopt.functional._labels import INVALID

seeds = st.integers(0, 2**16)
spreads = st.sampled_from([0.01, 1.0, 5.0, 30.0])


def batch(seed, rows, classes, spread, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(rows, classes, generator=draw)).to(dtype).requires_grad_()
    return logits, torch.randint(classes, (rows,), generator=draw)


class Read(NamedTuple):
    labels: torch.Tensor
    scale: torch.Tensor
    doubtful: torch.Tensor


def read(loss, logits, labels=None, dtype=None):
    """Labels, scales, and the number of doubtful rows, from the gradient in `dtype`, as `inject=True` takes them."""
    (gradient,) = torch.autograd.grad(loss, logits)
    gradient = gradient if dtype is None else gradient.to(dtype)
    if labels is not None:
        scale, doubtful, _ = recover_scale(gradient, logits, labels)
        return Read(labels, scale, doubtful.sum())
    told, ambiguous = recover_labels(gradient, logits)
    scale, doubtful, vanished = recover_scale(gradient, logits, told)
    return Read(told, scale, (doubtful | vanished | ambiguous).sum())


@given(seeds, st.integers(1, 12), st.integers(2, 12), spreads, st.floats(1e-6, 1e6))
def test_labels_and_scale_of_a_mean(seed, rows, classes, spread, scale):
    logits, labels = batch(seed, rows, classes, spread)
    found = read(scale * F.cross_entropy(logits, labels), logits, labels)
    assert found.doubtful == 0
    torch.testing.assert_close(found.scale, torch.full((rows,), scale / rows).double(), rtol=1e-4, atol=0)


@given(seeds, st.integers(2, 12), st.integers(2, 12), st.sampled_from([0.01, 1.0, 5.0]))
def test_labels_are_recovered(seed, rows, classes, spread):
    logits, labels = batch(seed, rows, classes, spread)
    found = read(F.cross_entropy(logits, labels), logits)
    assert found.doubtful == 0
    assert torch.equal(found.labels, labels)
    torch.testing.assert_close(found.scale, torch.full((rows,), 1 / rows).double(), rtol=1e-4, atol=0)


@given(seeds, st.integers(2, 10), st.integers(3, 10), st.booleans())
def test_weights_of_rows(seed, rows, classes, known):
    logits, labels = batch(seed, rows, classes, 1.0)
    weights = 0.1 + torch.rand(rows, generator=torch.Generator().manual_seed(seed + 1))
    loss = (weights * F.cross_entropy(logits, labels, reduction="none")).sum()
    found = read(loss, logits, labels if known else None)
    assert found.doubtful == 0
    torch.testing.assert_close(found.scale, weights.double(), rtol=1e-3, atol=1e-6)


@given(seeds, st.integers(2, 10), st.booleans())
def test_ignored_rows_have_no_scale(seed, rows, known):
    logits, labels = batch(seed, rows, 5, 1.0)
    labels[0] = INVALID
    found = read(F.cross_entropy(logits, labels), logits, labels if known else None)
    assert found.doubtful == 0
    assert found.scale[0] == 0
    assert torch.equal(found.labels, labels)


@given(seeds, st.integers(2, 10), st.integers(3, 10), st.sampled_from([0.05, 0.3]), st.booleans())
def test_label_smoothing_is_doubted(seed, rows, classes, smoothing, known):
    logits, labels = batch(seed, rows, classes, 1.0)
    loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    assert read(loss, logits, labels if known else None).doubtful > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@given(seed=seeds, classes=st.integers(2, 12))
def test_half_precision_gradients(dtype, seed, classes):
    logits, labels = batch(seed, 32, classes, 2.0)
    with torch.no_grad():
        logits.copy_(logits.to(dtype))
    found = read(1024 * F.cross_entropy(logits, labels), logits, dtype=dtype)
    assert found.doubtful == 0
    assert torch.equal(found.labels, labels)
    torch.testing.assert_close(found.scale, torch.full((32,), 32.0).double(), rtol=0.02, atol=0)


@given(seeds, st.integers(1, 8))
def test_numbers_that_are_not_finite_have_no_scale(seed, rows):
    logits, labels = batch(seed, rows, 4, 1.0)
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels), logits)
    gradient[0, 1] = torch.nan
    found = recover_scale(gradient, logits, labels)
    assert found.scale[0] == 0
    assert bool(torch.isfinite(found.scale).all())
