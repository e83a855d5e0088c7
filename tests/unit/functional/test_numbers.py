"""What all pure functions do: integers are numbers, half precision is reckoned in float32, arguments stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from balanceopt import functional

LABELS = torch.tensor([0, 2, 1, 0])
LOGITS = torch.tensor([[3.0, 0, 1], [0, 1, 2], [1, 4, 0], [2, 1, 1]])
UNIFORMS = torch.tensor([[0.25, 0.5, 0.125], [0.75, 0.5, 0.0]])

# Each function with arguments that are whole numbers: what is given as float here may come in any dtype.
CASES: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
    "true_class_score": (lambda x: functional.true_class_score(x, LABELS), [LOGITS]),
    "likelihood_score": (lambda x: functional.likelihood_score(x, LABELS, None), [LOGITS]),
    "likelihood of numbers": (
        lambda x, y: functional.likelihood_score(x, y, torch.nn.MSELoss()),
        [LOGITS, LOGITS.flip(0)],
    ),
    "centred_predictions": (
        lambda x, y: functional.centred_predictions(x[None], y),
        [LOGITS, LOGITS.flip(0)],
    ),
    "discrepancy_ratio": (functional.discrepancy_ratio, [torch.tensor([1.0, 2, 4])]),
    "ratio_of_means": (
        lambda s: functional.discrepancy_ratio(s, "ratio_of_means"),
        [torch.tensor([1.0, 2, 4])],
    ),
    "modulation_coefficient": (
        lambda r: functional.modulation_coefficient(r, 0.3),
        [torch.tensor([0.0, 1, 3])],
    ),
    "tpami": (
        lambda r: functional.modulation_coefficient(r, 0.3, "tpami"),
        [torch.tensor([0.0, 1, 3])],
    ),
    "adaptive_coefficient": (
        functional.adaptive_coefficient,
        [torch.tensor([0.0, 1, 2]), torch.tensor([1.0, 1, 1])],
    ),
    "balance_coefficient": (functional.balance_coefficient, [torch.tensor([1.0, 2, 4])]),
    "priority_coefficients": (functional.priority_coefficients, [torch.tensor([1.0, 2, 2])]),
    "regulation_strength": (functional.regulation_strength, [torch.tensor([0.0, 1, 3])]),
    "blend_weights": (
        functional.blend_weights,
        [torch.tensor(x) for x in ([4.0, 4, 4], [0.0, 3, 3], [4.0, 4, 4], [2.0, 3, 4])],
    ),
    "in_prime_window": (functional.in_prime_window, [torch.tensor([[1.0, 2], [3, 2]])]),
    "kept_modalities": (
        lambda p: functional.kept_modalities(p, 5, generator()),
        [torch.tensor([1.0, 0, 1])],
    ),
    "drop_probability": (functional.drop_probability, [torch.tensor([0.0, 1, 3])]),
    "mixed_gradient": (lambda a, b: functional.mixed_gradient(a, b, 0.5), [LOGITS, LOGITS.flip(0)]),
    "min_norm_weight": (
        functional.min_norm_weight,
        [torch.tensor(x) for x in ([1.0, 4], [3.0, 1], [-1.0, 0])],
    ),
    "permutation_divergence": (functional.permutation_divergence, [LOGITS, LOGITS.flip(0)]),
    "pareto_gradient": (lambda a, b: functional.pareto_gradient(a, b - 3), [LOGITS, LOGITS.flip(0)]),
    "linear_logits": (
        lambda a, b, w, bias: functional.linear_logits([a, b], w, bias),
        [LOGITS[:, :2], LOGITS, torch.arange(10.0).view(2, 5), torch.tensor([1.0, 2])],
    ),
    "feature_entropy": (functional.feature_entropy, [LOGITS]),
    "modal_significance": (
        lambda x, z: functional.modal_significance(x[None], [z], LABELS),
        [LOGITS, LOGITS],
    ),
    "significance_from_baseline": (
        functional.significance_from_baseline,
        [torch.tensor([3.0, 5]), torch.tensor([4.0, 7]), torch.tensor(1.0), torch.tensor([4.0, 4])],
    ),
    "keep_ratio": (functional.keep_ratio, [torch.tensor([1.0, 2, 1])]),
    "kept_units": (lambda r: functional.kept_units(7, r), [torch.tensor([0.0, 1])]),
    "unit_importance": (functional.unit_importance, [LOGITS]),
    "sample_units": (lambda s: functional.sample_units(s, 2, generator()), [torch.tensor([1.0, 5, 0, 2])]),
    "inclusion_probabilities": (
        lambda s: functional.inclusion_probabilities(s, 2.5),
        [torch.tensor([1.0, 5, 0, 2])],
    ),
    "systematic_sample": (
        lambda p: functional.systematic_sample(p, generator()),
        [torch.tensor([1.0, 0, 0, 1])],
    ),
    "sample_units_padded": (
        lambda s, n, k: functional.sample_units_padded(s, n, k, UNIFORMS),
        [LOGITS[:2], torch.tensor([3.0, 2]), torch.tensor([1.0, 2])],
    ),
    "inclusion_probabilities_padded": (
        functional.inclusion_probabilities_padded,
        [LOGITS[:2], torch.tensor([2.0, 1])],
    ),
    "recover_labels": (functional.recover_labels, [torch.tensor([[1.0, -2, 1]]), torch.zeros(1, 3)]),
    "recover_scale": (
        lambda g, x: functional.recover_scale(g, x, torch.tensor([1])),
        [torch.tensor([[1.0, -2, 1]]), torch.zeros(1, 3)],
    ),
    "kmeans": (
        lambda x: tuple(vars(functional.kmeans(x, 2, generator=generator())).values())[:3],
        [torch.tensor([[0.0, 0], [0, 1], [9, 9], [9, 8]])],
    ),
    "minmax_scale": (functional.minmax_scale, [LOGITS]),
    "reinit_strength": (lambda g: functional.reinit_strength(g, 3.0), [torch.tensor([0.0, 1])]),
}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def values_of(result: Any) -> list[Tensor]:
    return [x.double() for x in (result if isinstance(result, tuple) else (result,))]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8])
@pytest.mark.parametrize("name", CASES)
def test_integers_are_numbers(name, dtype):
    function, arguments = CASES[name]
    for found, expected in zip(
        values_of(function(*(x.to(dtype) for x in arguments))), values_of(function(*arguments)), strict=True
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_half_precision_is_reckoned_in_float32(name, dtype):
    function, arguments = CASES[name]
    for found, expected in zip(
        values_of(function(*(x.to(dtype) for x in arguments))), values_of(function(*arguments)), strict=True
    ):
        # What remains is the rounding of the result.
        torch.testing.assert_close(found, expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_arguments_stay(name):
    function, arguments = CASES[name]
    before = [x.clone() for x in arguments]
    function(*arguments)
    assert all(map(torch.equal, arguments, before))


@pytest.mark.parametrize(
    "name", sorted(CASES.keys() - {"unit_importance", "mixed_gradient", "pareto_gradient"})
)
def test_complex_numbers_are_refused(name):
    function, arguments = CASES[name]
    with pytest.raises(ValueError, match=r"should be a dense (real|integer) tensor.*complex64"):
        function(*(x.to(torch.complex64) for x in arguments))


def test_complex_gradients_have_importance():
    grad = torch.randn(4, 3, dtype=torch.complex64)
    torch.testing.assert_close(
        functional.unit_importance(grad), functional.unit_importance(torch.view_as_real(grad))
    )


@pytest.mark.parametrize(
    "soft",
    [
        torch.full((4, 3), 7.0),
        -torch.ones(4, 3),
        torch.full((4, 3), float("nan")),
        torch.tensor([[2.0, -1, 0]] * 4),
        torch.full((4, 3), 0.3),
    ],
)
def test_soft_labels_that_are_no_probabilities(soft):
    for labels in (soft, soft.half(), soft.bfloat16()):
        with pytest.raises(ValueError, match=r"soft `labels` should be probabilities.*Found entries from"):
            functional.true_class_score(LOGITS, labels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_soft_labels_in_any_precision(dtype):
    soft = torch.randn(200, 100).softmax(1)
    soft[3] = 0  # a row that does not count
    logits = torch.randn(200, 100)
    found = functional.true_class_score(logits, soft.to(dtype))
    torch.testing.assert_close(
        found, (logits.softmax(1) * soft).sum(), rtol=torch.finfo(dtype).eps, atol=1e-5
    )


def test_labels_of_eight_bits_beyond_127_are_classes():
    logits = torch.randn(2, 200)
    labels = torch.tensor([156, 3])
    expected = logits.softmax(1)[[0, 1], labels].sum()
    torch.testing.assert_close(functional.true_class_score(logits, labels.to(torch.uint8)), expected)
    with pytest.raises(ValueError, match=r"lie in \[0, 100\)"):
        functional.true_class_score(logits[:, :100], labels.to(torch.uint8))


@pytest.mark.parametrize("temperature", [1e-300, 1e-38, 5e-324])
def test_a_temperature_too_small_for_float32_is_as_sharp_as_can_be(temperature):
    assert functional.keep_ratio(torch.tensor([0.3, 0.1]), temperature).tolist() == pytest.approx([0.1, 0.9])


def test_an_unlimited_growth_of_a_base_of_zero_drops_nothing():
    assert functional.drop_probability(torch.tensor([2.0, 0.5]), 0.0, 1e300).tolist() == [0, 0]
