"""What must hold of a vote for any predictions: probabilities, order, shifts, and the limit of equal ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from balanceopt.functional import vote

sizes = st.tuples(st.integers(1, 4), st.integers(0, 5), st.integers(1, 6))
seeds = st.integers(0, 2**32)


def logits(shape: tuple[int, ...], seed: int) -> Tensor:
    return 5 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(sizes, seeds, st.randoms(), st.floats(-50, 50))
def test_probabilities_whatever_the_order_and_the_shifts(size, seed, random, shift):
    x = logits(size, seed)
    before = x.clone()
    result = vote(x)
    torch.testing.assert_close(result.exp().sum(-1), torch.ones(size[1], dtype=x.dtype))
    order = random.sample(range(size[0]), size[0])
    torch.testing.assert_close(vote(x[order]), result)
    moved = x.clone()
    moved[0] += shift  # which changes no prediction
    torch.testing.assert_close(vote(moved), result)
    assert torch.equal(x, before)


@given(sizes, seeds, st.integers(1, 4))
def test_predictions_that_agree_are_the_vote(size, seed, times):
    x = logits((1, *size[1:]), seed).expand(times, *size[1:])
    torch.testing.assert_close(vote(x), x[0].log_softmax(-1))
    torch.testing.assert_close(vote(x, answers="labels"), x[0])


@given(sizes, seeds, st.randoms())
def test_absent_predictions_do_not_count(size, seed, random):
    x = logits(size, seed)
    flags = [[random.random() < 0.5 for _ in range(size[1])] for _ in range(size[0])]
    present = torch.tensor(flags, dtype=torch.bool).view(size[:2])
    result = vote(torch.where(present.unsqueeze(-1), x, torch.nan), present)
    assert torch.equal(result.isnan().all(-1), ~present.any(0))
    for i in range(size[1]):
        if bool(present[:, i].any()):
            torch.testing.assert_close(result[i], vote(x[present[:, i], i].unsqueeze(1))[0])


def test_classes_that_a_prediction_excludes():
    x = torch.tensor([[[0.0, 1.0, -torch.inf]], [[3.0, 0.0, 0.0]]])
    assert torch.equal(vote(x), torch.tensor([[1.5, 0.5, -torch.inf]]).log_softmax(-1))


def test_ties_stay_ties():
    x = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    assert torch.equal(vote(x), torch.full((1, 2), 0.5).log())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_stays(dtype):
    assert vote(torch.zeros(2, 3, 4, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 4),), "should have shape"),
        ((torch.zeros(0, 3, 4),), "at least one prediction"),
        ((torch.zeros(2, 3, 4), torch.ones(3, 2, dtype=torch.bool)), "2 predictions and 3 samples"),
        ((torch.zeros(2, 3, 4), torch.ones(2, 3)), "dense bool tensor"),
        ((torch.zeros(2, 3, 4), None, "numbers"), "`answers` should be one of"),
    ],
)
def test_what_is_no_vote(arguments, message):
    with pytest.raises(ValueError, match=message):
        vote(*arguments)
