"""Which bases divide a constant gradient factor out again, measured; and that scaled updates slow them all."""

from __future__ import annotations

import pytest

from balanceopt.modulation._cancelling import cancels_constant_factor
from tests.contract.bases import BASES, Base
from tests.contract.movement import FACTOR, movement
from tests.training import groups_of, small_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True"),
    pytest.mark.filterwarnings("ignore:This overload of add"),
]


@pytest.mark.parametrize("base", [base for base in BASES if not base.closure], ids=str)
def test_the_hint_comes_where_the_base_takes_most_of_the_factor_out(base: Base):
    listed = cancels_constant_factor(base.make(groups_of(small_model())))
    measured = movement(base, FACTOR, "grad") / movement(base, 1.0, "grad")
    assert (measured > 1.4 * FACTOR) == listed, measured


STEPPING = [base for base in BASES if not base.closure]


@pytest.mark.parametrize("base", [base for base in STEPPING if not base.keeps_copy], ids=str)
def test_scaled_updates_move_parameters_by_the_factor(base: Base):
    assert movement(base, FACTOR, "update") / movement(base, 1.0, "grad") == pytest.approx(FACTOR, rel=0.05)


@pytest.mark.parametrize("base", [base for base in STEPPING if base.keeps_copy], ids=str)
def test_a_base_with_a_second_copy_is_slowed_by_less(base: Base):
    assert 1.2 * FACTOR < movement(base, FACTOR, "update") / movement(base, 1.0, "grad") < 0.6
