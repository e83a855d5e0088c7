"""When a method acts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import balanceopt as bo
from balanceopt._method import Method, Unit
from balanceopt._options import check_count
from tests.models import watch
from tests.training import modulated, small_model


def opens(step: int, epoch: int | None, start: int = 0, end: int | None = None, unit: Unit = "step") -> bool:
    method = Method(start=start, end=end, unit=unit)
    if epoch is not None:
        method.set_epoch(epoch)
    return method.is_open(step)


def test_both_ends_are_inclusive():
    assert [opens(step, None, 2, 4) for step in range(6)] == [False, False, True, True, True, False]
    assert all(opens(step, None) for step in (0, 10**9))


def test_each_unit_counts_itself_alone():
    assert opens(3, 0, 2, 4)
    assert not opens(0, 3, 2, 4)
    assert opens(0, 3, 2, 4, "epoch")
    assert not opens(3, 0, 2, 4, "epoch")


def test_epochs_have_to_be_set():
    with pytest.raises(
        RuntimeError, match=r"Call set_epoch\(epoch\) when an epoch begins, before its first step"
    ):
        opens(0, None, unit="epoch")


NO_COUNTS: list[Any] = [-1, 0.5, 2.0, math.nan, math.inf, True, "1", torch.tensor(1)]


@pytest.mark.parametrize("name", ["start", "end"])
@pytest.mark.parametrize("value", NO_COUNTS, ids=repr)
@pytest.mark.parametrize("method", [bo.OGM, bo.AMSS, lambda **o: bo.OPM(watch(small_model()), **o)])
def test_what_is_no_whole_number_is_refused(method: Any, value: Any, name: str):
    with pytest.raises(
        ValueError, match=rf"`{name}` should be a whole number of at least 0(, or None)?. Found {name} = "
    ):
        method(**{name: value})


@pytest.mark.parametrize("value", NO_COUNTS, ids=repr)
def test_an_epoch_is_a_whole_number(value: Any):
    _, optimizer = modulated()
    with pytest.raises(ValueError, match=r"`epoch` should be a whole number of at least 0"):
        optimizer.set_epoch(value)
    assert optimizer.param_groups[0]["balanceopt_epoch"] is None


def test_numbers_of_numpy_count():
    check_count("n", np.int64(3))
    assert opens(2, None, np.int64(1), np.int64(2))  # type: ignore[arg-type]


def test_an_end_before_the_start_and_other_units_are_refused():
    with pytest.raises(
        ValueError, match=r"`end` should not be less than `start`. Found start = 3 and end = 2"
    ):
        Method(start=3, end=2)
    with pytest.raises(ValueError, match=r"`unit` should be one of .*'epoch'.*Found unit = 'epochs'"):
        Method(unit="epochs")  # type: ignore[arg-type]
