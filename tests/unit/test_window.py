"""When a method acts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import balanceopt as bo
from balanceopt._options import check_count
from balanceopt._window import Window
from tests.models import watch
from tests.training import modulated, small_model


def test_both_ends_are_inclusive():
    window = Window(2, 4)
    assert [window.is_open(step, None) for step in range(6)] == [False, False, True, True, True, False]
    assert all(Window().is_open(step, None) for step in (0, 10**9))


def test_each_unit_counts_itself_alone():
    assert Window(2, 4).is_open(3, 0)
    assert not Window(2, 4).is_open(0, 3)
    assert Window(2, 4, "epoch").is_open(0, 3)
    assert not Window(2, 4, "epoch").is_open(3, 0)


def test_epochs_have_to_be_set():
    with pytest.raises(
        RuntimeError, match=r"Call set_epoch\(epoch\) when an epoch begins, before its first step"
    ):
        Window(unit="epoch").is_open(0, None)


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
    assert Window(np.int64(1), np.int64(2)).is_open(2, None)  # type: ignore[arg-type]


def test_an_end_before_the_start_and_other_units_are_refused():
    with pytest.raises(
        ValueError, match=r"`end` should not be less than `start`. Found start = 3 and end = 2"
    ):
        Window(3, 2)
    with pytest.raises(ValueError, match=r"`unit` should be one of .*'epoch'.*Found unit = 'epochs'"):
        Window(unit="epochs")  # type: ignore[arg-type]
