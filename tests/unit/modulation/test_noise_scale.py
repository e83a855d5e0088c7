"""Standard deviations against float64."""

from __future__ import annotations

import math

import pytest
import torch

from balanceopt.modulation._noise import stds


def std(x: torch.Tensor) -> torch.Tensor:
    return stds([x])[0]


SIZES = [1, 2, 2**13, 2**14, 2**14 + 1, 300_001, 2**19, 2**19 + 1, 2**20 + 7]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mean", [0.0, 0.5, 1.0, 100.0])
@pytest.mark.parametrize("scale", [1e-18, 1e-3, 1.0, 1e10])
def test_agrees_with_float64(size, mean, scale):
    x = scale * (mean + torch.randn(size))
    torch.testing.assert_close(std(x).double(), x.double().std(correction=0), rtol=2e-6, atol=0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("value", [0.0, 3.0, -0.125])
def test_equal_numbers_have_no_spread(size, value):
    assert std(torch.full((size,), value)) == 0


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("value", [0.1, 0.7, 3.3])
def test_equal_sizes_stay_within_the_stated_bound(size, value):
    # Roundings all go one way: the most that a float32 sum can lose.
    x = value * torch.randn(size).sign()
    torch.testing.assert_close(
        std(x).double(), x.double().std(correction=0), rtol=1.5e-4 if size <= 2**13 else 2e-5, atol=0
    )


@pytest.mark.parametrize("size", [2**15, 2**20 + 7])
def test_the_number_of_threads_changes_nothing(size):
    x = torch.randn(size)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            found.append(std(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 150_000, 300_000])
def test_not_finite_where_an_element_is_not(bad, place):
    x = torch.randn(300_001)
    x[place] = bad
    assert not torch.isfinite(std(x))


def test_layout_and_dtype():
    x = torch.randn(4, 64, 16, 16)
    want = x.double().std(correction=0)
    for same in (x.contiguous(memory_format=torch.channels_last), x.transpose(0, 3), x.double()):
        torch.testing.assert_close(std(same).double(), want, rtol=2e-6, atol=0)
    assert std(x.double()).dtype == torch.float64
    half = x.bfloat16()
    torch.testing.assert_close(std(half).double(), half.double().std(correction=0), rtol=1e-6, atol=0)
    assert std(half).dtype == torch.float32


def test_many_at_once():
    tensors = [
        torch.randn(size) + place % 3 for place, size in enumerate([1, 30, 2**14 + 5, 700, 2, 200_000, 9])
    ]
    tensors += [torch.full((50,), 7.0), torch.tensor([1.0, torch.inf]), torch.randn(3, 40).t()[:3]]
    for given in (tensors[:-1], tensors):  # the last one is out of order, so that all are taken the slow way
        for found, x in zip(stds(given), given, strict=True):
            want = x.double().std(correction=0)
            torch.testing.assert_close(found.double(), want, rtol=2e-6, atol=0, equal_nan=True)
