"""What must hold of constant coefficients for any accuracies and factors."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import balanceopt as bo
from balanceopt.functional import priority_coefficients
from tests.training import bare, batches, modulated, same_bits, train

accuracies = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=5)
factors = st.floats(0, 4)


@given(accuracies, factors, factors)
def test_one_is_boosted_the_rest_damped(accuracy: list[float], boost: float, damp: float):
    given_accuracy = torch.tensor(accuracy)
    before = given_accuracy.clone()
    k = priority_coefficients(given_accuracy, boost, damp)
    best = int(given_accuracy.argmax())
    others = torch.cat([k[:best], k[best + 1 :]])
    assert torch.equal(k[best], torch.tensor(boost))
    assert torch.equal(others, torch.full_like(others, damp))
    assert torch.equal(given_accuracy, before)


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=5, unique=True), st.randoms())
def test_order_of_modalities_does_not_matter(accuracy: list[float], random: object):
    order = list(range(len(accuracy)))
    random.shuffle(order)  # type: ignore[attr-defined]
    moved = priority_coefficients(torch.tensor([accuracy[i] for i in order]))
    assert torch.equal(priority_coefficients(torch.tensor(accuracy))[torch.tensor(order)], moved)


def test_without_a_number_nobody_is_prioritised():
    assert priority_coefficients(torch.tensor([0.5, torch.nan])).tolist() == [1, 1]


def test_integers_are_numbers():
    assert priority_coefficients(torch.tensor([50, 70])).tolist() == [0.5, 1.5]


@settings(max_examples=10, deadline=None)
@given(factors, factors)
def test_with_another_method_coefficients_multiply_in_any_order(a: float, b: float):
    def run(*methods: bo.Modulation) -> torch.nn.Module:
        model, optimizer = modulated(list(methods))
        train(model, optimizer, batches(model, 2))
        return model

    ogm, fixed = bo.OGM(0.5, noise=False), bo.FixedModulation({"audio": a, "visual": b})
    one, other = run(fixed, ogm), run(ogm, fixed)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_modality_that_is_not_named_is_the_base_optimizers():
    model, optimizer = modulated(bo.FixedModulation({"audio": 0.25}))
    twin, base = bare()
    train(model, optimizer, batches(model, 1))
    train(twin, base, batches(twin, 1))
    assert same_bits(model.modalities["visual"], twin.modalities["visual"])
    assert same_bits(model.head, twin.head)
    assert not same_bits(model.modalities["audio"], twin.modalities["audio"])
