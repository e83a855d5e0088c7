"""A forward that breaks off: what is called after it is no part of it."""

from __future__ import annotations

import pytest
import torch

from tests.dropping import warm
from tests.models import batch, train_step


def test_encoders_called_after_a_forward_that_broke_off_are_not_dropped_from():
    model, _ = warm()
    inputs, _ = batch()
    with torch.no_grad():
        expected = model.encoders["audio"](inputs[0])
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        model(inputs[0], inputs[1][:, :-1])
    with torch.no_grad():
        assert torch.equal(model.encoders["audio"](inputs[0]), expected)


def test_training_goes_on_after_it():
    model, modulator = warm()
    with pytest.raises(ValueError, match="zip"):
        model(*batch()[0], torch.zeros(8, 1))
    train_step(model, *batch())
    assert modulator.monitor.stats()["passes"] == 2
