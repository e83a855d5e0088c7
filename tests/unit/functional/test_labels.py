"""recover_labels: one test for each thing it promises; ranges of cases are in tests/property."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from balanceopt.functional import recover_labels

INVALID = -100


def gradient(logits, loss):
    x = logits.detach().clone().requires_grad_()
    loss(x).backward()
    assert x.grad is not None
    return x.grad


def example(size=16, classes=5, spread=1.0):
    return spread * torch.randn(size, classes), torch.randint(classes, (size,))


def test_cross_entropy():
    logits, labels = example()
    found = recover_labels(gradient(logits, lambda x: F.cross_entropy(x, labels)), logits)
    assert torch.equal(found.labels, labels)
    assert not found.ambiguous.any()
    assert found.labels.dtype == torch.int64


def test_ignored_rows_have_no_label():
    logits, labels = example()
    labels[::3] = INVALID
    found = recover_labels(gradient(logits, lambda x: F.cross_entropy(x, labels)), logits)
    assert torch.equal(found.labels, labels)


def test_classes_of_weight_zero_have_no_label():
    logits, labels = example()
    weight = torch.tensor([0.0, 1.0, 2.0, 0.1, 5.0])
    found = recover_labels(gradient(logits, lambda x: F.cross_entropy(x, labels, weight)), logits)
    assert torch.equal(found.labels, torch.where(labels == 0, INVALID, labels))


def test_zero_rows_of_a_trained_model_are_not_read_as_the_most_probable_class():
    logits, labels = example(spread=20.0)
    labels[:8] = INVALID
    found = recover_labels(gradient(logits, lambda x: F.cross_entropy(x, labels)), logits)
    assert (found.labels[:8] == INVALID).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_have_no_label(bad):
    logits, labels = example()
    g = gradient(logits, lambda x: F.cross_entropy(x, labels))
    g[3, 1] = bad
    found = recover_labels(g, logits)
    labels[3] = INVALID
    assert torch.equal(found.labels, labels)
    assert not found.ambiguous[3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_memorised_samples(dtype):
    logits, labels = example(64)
    logits[torch.arange(64), labels] += 40.0
    logits = logits.to(dtype)
    g = gradient(logits, lambda x: 65536 * F.cross_entropy(x, labels))
    found = recover_labels(g, logits)
    valid = g.abs().amax(1) > 0
    assert torch.equal(found.labels[valid], labels[valid])
    assert (found.labels[~valid] == INVALID).all()


@pytest.mark.parametrize("classes", [4, 5, 100])
@pytest.mark.parametrize("confidence", [0.0, 3.0, 8.0])
def test_label_smoothing_from_four_classes(classes, confidence):
    logits, labels = example(128, classes)
    logits[torch.arange(128), labels] += confidence
    g = gradient(logits, lambda x: F.cross_entropy(x, labels, label_smoothing=0.1))
    assert (recover_labels(g, logits).labels == labels).float().mean() > 0.99


@pytest.mark.parametrize("classes", [5, 100])
def test_label_smoothing_of_a_trained_model(classes):
    """Trained for 300 steps, where most rows have several negative entries."""
    x, labels = torch.randn(128, 16), torch.randint(classes, (128,))
    layers = torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, classes)
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        logits = model(x)
        logits.retain_grad()
        F.cross_entropy(logits, labels, label_smoothing=0.1).backward()
        optimizer.step()
    assert logits.grad is not None
    found = recover_labels(logits.grad, logits)
    assert found.ambiguous.float().mean() > 0.3
    assert torch.equal(found.labels, labels)


def test_three_classes_with_several_negatives_are_refused():
    logits = torch.tensor([[6.0, 0.0, 0.1], [0.0, 0.1, 0.2]])
    g = gradient(logits, lambda x: F.cross_entropy(x, torch.tensor([0, 2]), label_smoothing=0.3))
    assert (g < 0).sum(1).tolist() == [2, 1]
    found = recover_labels(g, logits)
    assert found.labels.tolist() == [INVALID, 2]
    assert found.ambiguous.tolist() == [True, False]


def test_soft_targets_are_ambiguous():
    logits, _ = example()
    soft = torch.rand(16, 5).softmax(1)
    assert recover_labels(gradient(logits, lambda x: F.cross_entropy(x, soft)), logits).ambiguous.any()


def test_a_gradient_without_negative_entries_tells_nothing():
    logits, _ = example()
    found = recover_labels(torch.ones_like(logits), logits)
    assert (found.labels == INVALID).all()
    assert not found.ambiguous.any()


def test_nothing_is_changed_and_nothing_records_gradients():
    logits, labels = example()
    g = gradient(logits, lambda x: F.cross_entropy(x, labels))
    before = g.clone(), logits.clone()
    recover_labels(g, logits.requires_grad_())
    assert torch.equal(g, before[0])
    assert torch.equal(logits, before[1])


def test_empty_batch():
    found = recover_labels(torch.ones(0, 5), torch.ones(0, 5))
    assert found.labels.shape == found.ambiguous.shape == (0,)


@pytest.mark.parametrize(
    ("grad", "logits"),
    [
        (torch.ones(2, 3), torch.ones(2, 4)),
        (torch.ones(2, 1), torch.ones(2, 1)),
        (torch.ones(3), torch.ones(3)),
    ],
)
def test_shapes_that_do_not_fit(grad, logits):
    with pytest.raises(ValueError, match=r"the same shape \(B, C\), C >= 2"):
        recover_labels(grad, logits)


@pytest.mark.parametrize("classes", [2, 3, 4, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sure", [0.5, 6.0])
def test_labels_under_a_known_smoothing_are_those_of_the_loss_or_none(classes, dtype, sure):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (200,), generator=generator)
    logits = sure * torch.randn(200, classes, generator=generator)
    g = gradient(logits, lambda x: F.cross_entropy(x, labels, label_smoothing=0.1)).to(dtype)
    found = recover_labels(g, logits, label_smoothing=0.1)
    told = found.labels != -100
    assert (found.labels == labels)[told].float().mean() > 0.99
    assert found.ambiguous.float().mean() < 0.01
    if classes > 2 or sure < 1:  # a row of two classes that are both possible at some scale has no label
        assert told.float().mean() > 0.95


def test_a_gradient_that_does_not_fit_the_known_smoothing_is_read_as_without():
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    g = gradient(logits, lambda x: F.cross_entropy(x, torch.arange(50) % 6))
    assert recover_labels(g, logits, label_smoothing=0.3).labels.equal(torch.arange(50) % 6)
