"""What the tests of frameworks share; files that they run or import, and that can't be imported without a framework."""

import os
import sys
from collections.abc import Iterator
from unittest import mock

import pytest

collect_ignore_glob = ["under_*.py", "rank_runs.py"]


@pytest.fixture(autouse=True)
def _own_settings_of_accelerate() -> Iterator[None]:
    """Forget what a test set: Accelerate keeps it for the process, and older Trainers in the environment too."""
    _forget()
    with mock.patch.dict(os.environ):
        yield
    _forget()


def _forget() -> None:
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(True)
