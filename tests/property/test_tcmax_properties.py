"""What must hold of TCMax's loss for any logits and labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from balanceopt.functional import total_correlation_loss

seeds = st.integers(0, 2**16)
sizes = st.integers(1, 6)
modalities = st.integers(1, 4)
scales = st.sampled_from([0.1, 1.0, 30.0])
EPS = torch.finfo(torch.float64).eps


def case(seed: int, modalities: int, size: int, scale: float = 1.0) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(modalities, size, 4, dtype=torch.float64, generator=generator)
    return list(logits), torch.randint(4, (size,), generator=generator)


@given(seeds, modalities, sizes, scales)
def test_it_is_not_negative(seed: int, count: int, size: int, scale: float):
    logits, labels = case(seed, count, size, scale)
    # Logits of the labels far above all others come close to the bound of 0.
    sure = [x + 1000 * F.one_hot(labels, 4) for x in logits]
    for given_logits in (logits, sure):
        magnitude = sum(float(x.abs().max()) for x in given_logits) + 20
        assert float(total_correlation_loss(given_logits, labels)) >= -16 * EPS * magnitude


@given(seeds, modalities, scales)
def test_for_one_sample_it_is_the_cross_entropy_of_the_sum(seed: int, count: int, scale: float):
    logits, labels = case(seed, count, 1, scale)
    expected = F.cross_entropy(torch.stack(logits).sum(0), labels)
    torch.testing.assert_close(total_correlation_loss(logits, labels), expected, rtol=1e-12, atol=1e-12)


@given(seeds, modalities, sizes, st.randoms())
def test_modalities_and_samples_have_no_order_and_arguments_stay(seed: int, count: int, size: int, random):
    logits, labels = case(seed, count, size)
    before = [x.clone() for x in logits], labels.clone()
    loss = total_correlation_loss(logits, labels)
    rows = random.sample(range(size), size)
    shuffled = [x[rows] for x in random.sample(logits, count)]
    torch.testing.assert_close(total_correlation_loss(shuffled, labels[rows]), loss)
    assert all(map(torch.equal, logits, before[0]))
    assert torch.equal(labels, before[1])


@given(seeds, st.integers(2, 4), sizes, st.randoms())
def test_other_partners_change_the_term_of_the_labels_alone(seed: int, count: int, size: int, random):
    logits, labels = case(seed, count, size)
    rows = random.sample(range(size), size)
    permuted = [logits[0][rows], *logits[1:]]
    index = labels.unsqueeze(1)
    change = (logits[0].gather(1, index) - permuted[0].gather(1, index)).mean()
    difference = total_correlation_loss(permuted, labels) - total_correlation_loss(logits, labels)
    torch.testing.assert_close(difference, change, rtol=1e-9, atol=1e-12)


@given(seeds, st.integers(2, 4), sizes)
def test_what_one_modality_gives_a_class_another_may_take(seed: int, count: int, size: int):
    logits, labels = case(seed, count, size)
    shift = 5 * torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    moved = [logits[0] + shift, logits[1] - shift, *logits[2:]]
    torch.testing.assert_close(total_correlation_loss(moved, labels), total_correlation_loss(logits, labels))


@given(seeds, modalities, sizes, st.lists(st.booleans(), min_size=6, max_size=6))
def test_ignored_rows_are_as_rows_that_are_not_there(seed: int, count: int, size: int, flags: list[bool]):
    logits, labels = case(seed, count, size)
    ignored = torch.tensor(flags[:size])
    spoilt = [x.masked_fill(ignored.unsqueeze(1), float("nan")).requires_grad_() for x in logits]
    loss = total_correlation_loss(spoilt, labels.masked_fill(ignored, -7), ignore_index=-7)
    kept = [x[~ignored].requires_grad_() for x in logits]
    expected = total_correlation_loss(kept, labels[~ignored])
    torch.testing.assert_close(loss, expected)
    if bool(ignored.all()):
        assert float(loss.detach()) == 0
    pairs = zip(torch.autograd.grad(loss, spoilt), torch.autograd.grad(expected, kept), strict=True)
    for gradient, g in pairs:
        assert not gradient[ignored].any()
        torch.testing.assert_close(gradient[~ignored], g)


@given(seeds, st.integers(2, 4), sizes)
def test_half_precision_is_reckoned_in_single(seed: int, count: int, size: int):
    logits, labels = case(seed, count, size, 30.0)
    for dtype in (torch.float16, torch.bfloat16):
        half = [x.to(dtype) for x in logits]
        loss = total_correlation_loss(half, labels)
        assert loss.dtype == torch.float32
        assert torch.equal(loss, total_correlation_loss([x.float() for x in half], labels))
