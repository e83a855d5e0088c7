"""FixedModulation: what it refuses, where it hints, and what its window does."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import balanceopt as bo
from tests.models import watch
from tests.training import batches, groups_of, modulated, same_bits, small_model, train


@pytest.mark.parametrize("value", [-0.5, math.nan, math.inf, "1", None, True])
def test_coefficients_that_are_no_factors(value: Any):
    with pytest.raises(
        ValueError, match=r"`coefficients\['audio'\]` should be a finite number of at least 0"
    ):
        bo.FixedModulation({"audio": value})


@pytest.mark.parametrize("given", [0.5, [0.5, 1.0], None])
def test_coefficients_that_are_no_mapping(given: Any):
    with pytest.raises(TypeError, match="`coefficients` should be a mapping from modality"):
        bo.FixedModulation(given)


def test_nothing_to_freeze():
    with pytest.raises(ValueError, match=r"freezes the encoders of modalities with coefficient 0. Found"):
        bo.FixedModulation({"audio": 0.5}, frozen=True)


def test_an_unknown_modality():
    with pytest.raises(KeyError, match=r"should name modalities of \['audio', 'visual'\]. Found \['sound'\]"):
        modulated(bo.FixedModulation({"sound": 0.5}))


def test_the_hint_comes_where_the_base_takes_the_factor_out():
    adam = torch.optim.AdamW
    with pytest.warns(bo.OptimizerHintWarning, match=r"FixedModulation\(apply_to='update'\)"):
        modulated(bo.FixedModulation({"audio": 0.5}), adam)
    modulated(bo.FixedModulation({"audio": 0.5}, apply_to="update"), adam)
    modulated(bo.FixedModulation({"audio": 0, "visual": 1}, frozen=True), adam)


def test_a_closed_window_is_the_base_bit_for_bit():
    model, optimizer = modulated(bo.FixedModulation({"audio": 0}, frozen=True, start=5))
    twin = small_model()
    train(model, optimizer, batches(model, 3))
    train(twin, torch.optim.SGD(twin.parameters(), lr=0.1), batches(twin, 3))
    assert same_bits(model, twin)


def test_one_modality_after_the_other_without_a_head():
    model = small_model()
    start = small_model()
    monitor = watch(model, head=None)
    first = bo.FixedModulation({"audio": 0}, frozen=True, end=1)
    second = bo.FixedModulation({"visual": 0}, frozen=True, start=2)
    optimizer = bo.ModulatedOptimizer(torch.optim.AdamW(groups_of(model), lr=0.01), monitor, [first, second])
    train(model, optimizer, batches(model, 2))
    assert same_bits(model.modalities["audio"], start.modalities["audio"])
    middle = {name: value.clone() for name, value in model.modalities["visual"].state_dict().items()}
    train(model, optimizer, batches(model, 2, first=2))
    assert all(torch.equal(value, middle[n]) for n, value in model.modalities["visual"].state_dict().items())
    assert not same_bits(model.modalities["audio"], start.modalities["audio"])


def test_a_frozen_encoder_is_read_by_methods_after_it():
    model, optimizer = modulated([bo.FixedModulation({"audio": 0}, frozen=True), bo.OGM(0.5), bo.AMSS()])
    start = small_model()
    train(model, optimizer, batches(model, 3))
    assert same_bits(model.modalities["audio"], start.modalities["audio"])
    assert not same_bits(model.modalities["visual"], start.modalities["visual"])


def test_a_parameter_of_two_modalities_belongs_to_none():
    model, twin = small_model(), small_model()
    for m in (model, twin):
        m.modalities["visual"].get_submodule("2").bias = m.modalities["audio"].get_submodule("2").bias
    monitor = watch(model, head=None)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, bo.ModulatedOptimizer(base, monitor, bo.FixedModulation({"audio": 0})), batches(model, 1))
    train(twin, torch.optim.SGD(twin.parameters(), lr=0.1), batches(twin, 1))
    shared, other = (m.modalities["audio"].get_parameter("2.bias") for m in (model, twin))
    assert torch.equal(shared, other)


def test_what_a_recorder_sees():
    model, optimizer = modulated(bo.FixedModulation({"audio": 0.5}))
    recorder = bo.Recorder(optimizer)
    train(model, optimizer, batches(model, 2))
    assert recorder.series("coefficient")["audio"][1] == [0.5, 0.5]
    assert recorder.series("coefficient")["visual"][1] == [1.0, 1.0]
