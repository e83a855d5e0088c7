"""The table of ecosystem.md 4.1: which losses leave the labels readable in the gradient at the logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from balanceopt.functional import recover_labels

INVALID = -100


@dataclass
class Case:
    """Logits from untrained to (nearly) memorised, and labels."""

    logits: Tensor
    labels: Tensor

    def read(self, loss):
        return recover_labels(self.gradient(loss), self.logits)

    def gradient(self, loss):
        x = self.logits.detach().clone().requires_grad_()
        loss(x).backward()
        assert x.grad is not None
        return x.grad


@st.composite
def cases(draw, min_classes=2, max_confidence=12.0):
    classes = draw(st.integers(min_classes, 40))
    seed = draw(st.integers(0, 2**32 - 1))
    confidence = draw(st.floats(-3, max_confidence))
    generator = torch.Generator().manual_seed(seed)
    rows = draw(st.integers(1, 12))
    labels = torch.randint(classes, (rows,), generator=generator)
    logits = draw(st.floats(0.05, 4)) * torch.randn(rows, classes, generator=generator)
    logits[torch.arange(rows), labels] += confidence
    return Case(logits, labels)


scales = st.one_of(st.sampled_from([1.0, 0.25, 65536.0]), st.floats(1e-6, 1e6))


@given(cases(), scales, st.sampled_from(["mean", "sum"]))
def test_cross_entropy_at_any_scale(case, scale, reduction):
    found = case.read(lambda x: scale * F.cross_entropy(x, case.labels, reduction=reduction))
    assert torch.equal(found.labels, case.labels)
    assert not found.ambiguous.any()


@given(cases(), st.integers(1, 8))
def test_nll_of_log_softmax_and_accumulation(case, micro_batches):
    found = case.read(lambda x: F.nll_loss(x.log_softmax(1), case.labels) / micro_batches)
    assert torch.equal(found.labels, case.labels)


@given(cases(), st.data())
def test_class_weights_and_sample_weights(case, data):
    rows, classes = case.logits.shape
    weight = torch.tensor(data.draw(st.lists(st.floats(0.01, 10), min_size=classes, max_size=classes)))
    sample = torch.tensor(data.draw(st.lists(st.floats(0.01, 10), min_size=rows, max_size=rows)))
    found = case.read(lambda x: (sample * F.cross_entropy(x, case.labels, weight, reduction="none")).mean())
    assert torch.equal(found.labels, case.labels)


@given(cases(), st.data())
def test_weight_zero_and_ignored_rows_have_no_label(case, data):
    rows = len(case.labels)
    ignored = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    labels = torch.where(ignored, INVALID, case.labels)
    found = case.read(lambda x: F.cross_entropy(x, labels, reduction="sum"))
    assert torch.equal(found.labels, labels)
    weights = (~ignored).float()
    found = case.read(lambda x: (weights * F.cross_entropy(x, case.labels, reduction="none")).sum())
    assert torch.equal(found.labels, labels)


@given(cases(), st.floats(0, 5))
def test_focal_loss(case, gamma):
    def focal(x):
        log_p = -F.cross_entropy(x, case.labels, reduction="none")
        return -((1 - log_p.exp()) ** gamma * log_p).sum()

    g = case.gradient(focal)
    # A memorised sample's factor (1 - p)^gamma, and so its whole row, may be nothing but rounding.
    told = 1 - case.logits.double().softmax(1).gather(1, case.labels[:, None]).squeeze(1) > 1e-4
    found = recover_labels(g, case.logits)
    assert torch.equal(found.labels[told], case.labels[told])


@given(cases(max_confidence=5.0), st.floats(0.2, 10))
def test_temperature(case, temperature):
    found = case.read(lambda x: F.cross_entropy(x / temperature, case.labels))
    assert torch.equal(found.labels, case.labels)


@given(cases(max_confidence=6.0))
def test_bce_on_one_hot_labels(case):
    target = F.one_hot(case.labels, case.logits.shape[1]).float()
    found = case.read(lambda x: F.binary_cross_entropy_with_logits(x, target))
    assert torch.equal(found.labels, case.labels)


@given(cases())
def test_one_hot_probabilities_as_targets(case):
    target = F.one_hot(case.labels, case.logits.shape[1]).float()
    found = case.read(lambda x: F.cross_entropy(x, target))
    assert torch.equal(found.labels, case.labels)


@given(cases(min_classes=4, max_confidence=8.0), st.floats(0.01, 0.3), scales)
def test_label_smoothing_from_four_classes(case, smoothing, scale):
    found = case.read(lambda x: scale * F.cross_entropy(x, case.labels, label_smoothing=smoothing))
    assert torch.equal(found.labels, case.labels)


@given(cases(max_confidence=60.0), st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
def test_memorised_in_half_precision_under_loss_scale(case, dtype):
    case.logits = case.logits.to(dtype)
    g = case.gradient(lambda x: 1024 * F.cross_entropy(x, case.labels))
    found = recover_labels(g, case.logits)
    valid = torch.isfinite(g).all(1) & (g.abs().amax(1) > 0)
    assert torch.equal(found.labels[valid], case.labels[valid])
    assert (found.labels[~valid] == INVALID).all()


@given(cases(), st.integers(0, 2**31))
def test_order_of_the_classes_does_not_matter(case, seed):
    order = torch.randperm(case.logits.shape[1], generator=torch.Generator().manual_seed(seed))
    g = case.gradient(lambda x: F.cross_entropy(x, case.labels))
    found = recover_labels(g[:, order], case.logits[:, order])
    assert torch.equal(order[found.labels], case.labels)


@given(cases(), st.floats(1e-30, 1e30))
def test_scale_of_the_gradient_does_not_matter(case, scale):
    g = case.gradient(lambda x: F.cross_entropy(x, case.labels)).double()
    assert torch.equal(recover_labels(g * scale, case.logits).labels, recover_labels(g, case.logits).labels)


@given(st.integers(2, 3), st.integers(0, 10**6))
def test_few_classes_with_several_negatives_are_refused(classes, seed):
    generator = torch.Generator().manual_seed(seed)
    g = -torch.rand(8, classes, generator=generator) - 0.1
    found = recover_labels(g, torch.randn(8, classes, generator=generator))
    assert (found.labels == INVALID).all()
    assert found.ambiguous.all()


@given(cases(), st.integers(0, 10**6))
def test_a_label_is_a_class_or_none(case, seed):
    noise = torch.randn(case.logits.shape, generator=torch.Generator().manual_seed(seed))
    found = recover_labels(noise, case.logits)
    assert (((found.labels >= 0) & (found.labels < case.logits.shape[1])) | (found.labels == INVALID)).all()
