"""Which bases divide a constant gradient factor out again, measured; and that `apply_to="lr"` acts on all of them."""

from __future__ import annotations

import pytest

from balanceopt.modulation._bases import cancels_constant_factor
from tests.contract.bases import BASES, Base
from tests.contract.movement import FACTOR, movement
from tests.training import groups_of, small_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True"),
    pytest.mark.filterwarnings("ignore:This overload of add"),
]

# What the power of k is with which a parameter of MADGRAD moves: its sums of g and g^2 meet in s / cbrt(v).
MADGRAD = 2 / 3


@pytest.mark.parametrize("base", [base for base in BASES if not base.closure], ids=str)
def test_the_hint_comes_where_the_base_takes_most_of_the_factor_out(base: Base):
    listed = cancels_constant_factor(base.make(groups_of(small_model())))
    measured = movement(base, FACTOR, "grad") / movement(base, 1.0, "grad")
    assert (measured > 1.4 * FACTOR) == listed, measured


@pytest.mark.parametrize("base", [base for base in BASES if base.scales_lr], ids=str)
def test_lr_mode_moves_parameters_by_the_factor(base: Base):
    measured = movement(base, FACTOR, "lr") / movement(base, 1.0, "grad")
    expected = FACTOR**MADGRAD if "MADGRAD" in base.name else FACTOR
    assert measured == pytest.approx(expected, rel=0.05)
