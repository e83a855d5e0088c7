"""What must hold of the divergence for any two predictions, of derangements, and of the game for any batch."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import balanceopt as bo
from balanceopt.functional import derangement, permutation_divergence
from tests.models import PER_HEAD, SPLIT, watch
from tests.objectives import given as batch_of
from tests.training import grad_of

seeds = st.integers(0, 2**16)
scales = st.sampled_from([0.0, 2.0**-10, 1.0, 30.0, 1e4])
dtypes = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])


def pair(seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(2, 6, 4, dtype=torch.float64, generator=generator)).to(dtype)


@given(seeds, scales, dtypes)
def test_bounds_and_symmetry(seed: int, scale: float, dtype: torch.dtype):
    x, y = pair(seed, scale, dtype)
    before = x.clone(), y.clone()
    values = permutation_divergence(x, y)
    assert values.dtype is dtype
    assert bool((values >= 0).all())
    assert bool((values.double() <= math.log(2) * (1 + torch.finfo(dtype).eps)).all())
    assert torch.equal(values, permutation_divergence(y, x))
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


@given(seeds, scales, dtypes)
def test_equal_predictions_have_neither_divergence_nor_gradient(seed: int, scale: float, dtype: torch.dtype):
    x = pair(seed, scale, dtype)[0].requires_grad_()
    y = x.detach().clone().requires_grad_()
    values = permutation_divergence(x, y)
    values.sum().backward()
    assert not values.any()
    assert not grad_of(x).any()
    assert not grad_of(y).any()


@given(seeds, st.floats(-100, 100))
def test_a_constant_on_all_classes_changes_nothing(seed: int, constant: float):
    x, y = pair(seed)
    torch.testing.assert_close(permutation_divergence(x + constant, y), permutation_divergence(x, y))
    assert bool((permutation_divergence(x, y) > 0).all())


@given(seeds)
def test_an_impossible_class_is_no_nan(seed: int):
    x, y = pair(seed)
    x[:, 0] = y[:, 0] = -torch.inf
    x[0, 1] = -torch.inf
    x.requires_grad_()
    values = permutation_divergence(x, y)
    values.sum().backward()
    torch.testing.assert_close(values[1:].detach(), permutation_divergence(x[1:, 1:], y[1:, 1:]).detach())
    assert bool(values.isfinite().all())
    assert bool(grad_of(x).isfinite().all())


@given(seeds, st.lists(st.booleans(), max_size=12))
def test_a_derangement_moves_all_that_take_part_and_no_other(seed: int, flags: list[bool]):
    present = torch.tensor(flags, dtype=torch.bool)
    index = torch.arange(len(flags))
    permutation = derangement(len(flags), torch.Generator().manual_seed(seed), present)
    assert torch.equal(permutation.sort().values, index)
    moves = present & (present.sum() > 1)
    assert torch.equal(permutation != index, moves)
    assert bool(present[permutation][present].all())


def test_each_other_sample_stands_in_equally_often():
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(4, 4)
    for _ in range(3000):
        counts[torch.arange(4), derangement(4, generator)] += 1
    # Five standard deviations of 3000 draws with chance 1/3 each.
    off_diagonal = counts[~torch.eye(4, dtype=torch.bool)]
    assert bool((off_diagonal - 1000).abs().max() < 5 * math.sqrt(3000 * 2 / 9))
    assert not counts.diagonal().any()


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(sorted({**SPLIT, **PER_HEAD})), seeds)
def test_strategies_share_value_and_heads_gradient_and_are_affine_in_k(kind: str, seed: int):
    torch.manual_seed(seed)
    model: Any = {**SPLIT, **PER_HEAD}[kind](3).double()
    inputs, _ = batch_of(3, seed=seed)
    found = []
    strategies: list[Any] = ["greedy", "independent", "collaborative"]
    for strategy in strategies:
        twin = copy.deepcopy(model)
        competition = bo.CompetitionObjective(watch(twin), strategy=strategy, seed=seed)
        twin(*inputs)
        term = competition()
        term.backward()
        found.append((term.detach(), {name: grad_of(p) for name, p in twin.named_parameters()}))
    (greedy, at_minus_1), (independent, at_0), (collaborative, at_1) = found
    assert greedy == independent == collaborative
    for name in at_0:
        torch.testing.assert_close(at_minus_1[name] + at_1[name], 2 * at_0[name], msg=name)
        if not name.startswith("encoders."):
            torch.testing.assert_close(at_minus_1[name], at_0[name], msg=name)
