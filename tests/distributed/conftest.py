"""How many ranks the tests of this folder start."""

from __future__ import annotations

import pytest

from tests.ranks import WORLDS


@pytest.fixture(scope="module", params=WORLDS)
def ranks(request: pytest.FixtureRequest) -> int:
    """How many there are."""
    return int(request.param)
