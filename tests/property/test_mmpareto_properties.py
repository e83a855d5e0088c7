"""What must hold of the combined gradient for any two gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from balanceopt.functional import min_norm_weight, pareto_gradient

seeds = st.integers(0, 2**16)
gammas = st.floats(0.1, 3)
slants = st.floats(-2, 2)


def pair(seed: int, slant: float, size: int = 5) -> tuple[Tensor, Tensor]:
    """Two gradients, the second with a part along the first: negative slants conflict."""
    j, u = torch.randn(2, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return j, u + slant * j


def weight(j: Tensor, u: Tensor) -> Tensor:
    return min_norm_weight(j @ j, u @ u, j @ u)


@given(seeds, slants, gammas)
def test_neither_loss_goes_up(seed: int, slant: float, gamma: float):
    j, u = pair(seed, slant)
    h = pareto_gradient(j, u, gamma)
    assert h @ j >= -1e-9 * h.norm() * j.norm()
    assert h @ u >= -1e-9 * h.norm() * u.norm()


@given(seeds, slants, gammas)
def test_its_length_is_gamma_times_that_of_the_sum(seed: int, slant: float, gamma: float):
    j, u = pair(seed, slant)
    torch.testing.assert_close(pareto_gradient(j, u, gamma).norm(), gamma * (j + u).norm())


@given(seeds, slants)
def test_the_weight_is_the_best_of_a_grid(seed: int, slant: float):
    j, u = pair(seed, slant)
    grid = torch.linspace(0, 1, 20001, dtype=torch.float64).unsqueeze(1)
    best = (grid * j + (1 - grid) * u).norm(dim=1).argmin()
    assert abs(float(weight(j, u)) - float(grid[best])) <= 1e-4
    assert 0 <= float(weight(j, u)) <= 1


@given(seeds, slants, gammas)
def test_it_is_symmetric(seed: int, slant: float, gamma: float):
    j, u = pair(seed, slant)
    torch.testing.assert_close(pareto_gradient(j, u, gamma), pareto_gradient(u, j, gamma))
    torch.testing.assert_close(weight(j, u), 1 - weight(u, j))


@given(seeds, slants, st.sampled_from([2.0**-20, 0.5, 3.0, 2.0**16]))
def test_it_scales_with_the_loss(seed: int, slant: float, factor: float):
    j, u = pair(seed, slant)
    torch.testing.assert_close(pareto_gradient(factor * j, factor * u), factor * pareto_gradient(j, u))


@given(seeds, st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
def test_without_conflict_and_gamma_1_it_is_the_sum_bit_for_bit(seed: int, dtype: torch.dtype):
    j, u = (x.to(dtype) for x in pair(seed, 3.0, size=12))
    u = torch.where((j.double() @ u.double()) > 0, u, -u)
    before = j.clone(), u.clone()
    assert torch.equal(pareto_gradient(j, u, 1.0), j + u)
    assert torch.equal(j, before[0])
    assert torch.equal(u, before[1])


@given(seeds, gammas)
def test_a_gradient_of_0_leaves_the_other(seed: int, gamma: float):
    j, _ = pair(seed, 0.0)
    zero = torch.zeros_like(j)
    torch.testing.assert_close(pareto_gradient(j, zero, gamma), gamma * j)
    torch.testing.assert_close(pareto_gradient(zero, j, gamma), gamma * j)
    assert torch.equal(pareto_gradient(zero, zero, gamma), zero)


@pytest.mark.parametrize("factor", [-1.0, -2.0, -0.5])
@given(seeds)
def test_opposite_gradients_give_0(factor: float, seed: int):
    j, _ = pair(seed, 0.0)
    assert torch.equal(pareto_gradient(j, factor * j), torch.zeros_like(j))


def test_norms_that_overflow_are_no_conflict():
    j = torch.full((4,), 1e30)
    assert torch.equal(pareto_gradient(j, -0.5 * j, 1.0), 0.5 * j)


@given(seeds)
def test_half_precision_is_reckoned_in_single(seed: int):
    j, u = (x.half() for x in pair(seed, -0.7, size=50))
    expected = pareto_gradient(j.double(), u.double())
    torch.testing.assert_close(pareto_gradient(j, u).double(), expected, rtol=5e-3, atol=5e-3)


@given(seeds, slants)
def test_a_weight_of_its_own(seed: int, slant: float):
    j, u = pair(seed, slant)
    h = pareto_gradient(j, u, 1.0, torch.tensor(1.0))
    torch.testing.assert_close(h / h.norm(), j / j.norm())
