"""What must hold of G-Blending's rule for any losses."""

from __future__ import annotations

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from balanceopt.functional import blend_weights

# Of 1/64ths, whose sums and differences are exact.
loss = st.integers(0, 512).map(lambda n: n / 64)
tables = st.integers(1, 5).flatmap(
    lambda heads: st.lists(st.lists(loss, min_size=heads, max_size=heads), min_size=4, max_size=4)
)
floors = st.floats(0.001, 1)


def rule(table: Tensor, floor: float = 0.1) -> Tensor:
    return blend_weights(*table, floor=floor)


def tensor(table: list[list[float]]) -> Tensor:
    return torch.tensor(table, dtype=torch.float64)


def gain_of(table: Tensor) -> Tensor:
    return table[2] - table[3]


@given(tables, floors)
def test_shares_of_those_that_gain(given_table: list[list[float]], floor: float):
    table = tensor(given_table)
    before = table.clone()
    w = rule(table, floor)
    gains = bool((gain_of(table) > 0).any())
    torch.testing.assert_close(w.sum(), torch.tensor(float(gains), dtype=torch.float64))
    assert torch.equal(w > 0, gain_of(table) > 0)
    assert torch.equal(table, before)


@given(tables, st.randoms())
def test_order_of_heads_does_not_matter(given_table: list[list[float]], random: object):
    table = tensor(given_table)
    order = list(range(table.shape[1]))
    random.shuffle(order)  # type: ignore[attr-defined]
    torch.testing.assert_close(rule(table)[order], rule(table[:, order]))


@given(tables, st.floats(1e-6, 1e6))
def test_the_unit_of_the_losses_does_not_matter(given_table: list[list[float]], unit: float):
    table = tensor(given_table)
    torch.testing.assert_close(rule(table * unit), rule(table), rtol=1e-6, atol=1e-9)


@given(tables, st.integers(1, 512))
def test_a_larger_gain_weighs_more(given_table: list[list[float]], more: int):
    table = tensor(given_table)
    other = table.clone()
    other[[0, 2], 0] += more / 64  # both losses before, so that the gap's growth stays
    assert bool(rule(other)[0] >= rule(table)[0] - 1e-12)


@given(tables, st.integers(1, 512))
def test_more_overfitting_weighs_less(given_table: list[list[float]], more: int):
    table = tensor(given_table)
    gap = (table[3] - table[1]) - (table[2] - table[0])
    assume(bool(gap[0] >= 0))
    other = table.clone()
    other[1, 0] -= more / 64  # the training loss falls further
    assert bool(rule(other)[0] <= rule(table)[0] + 1e-12)


@given(tables, st.sampled_from([torch.nan, torch.inf]), st.integers(0, 3))
def test_a_loss_that_is_not_finite_is_not_hidden(given_table: list[list[float]], bad: float, row: int):
    table = tensor(given_table)
    table[row, 0] = bad
    assert bool(rule(table).isnan().all())
