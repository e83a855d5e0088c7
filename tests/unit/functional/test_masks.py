"""keep_ratio, kept_units, unit_importance, sample_units, inclusion_probabilities, systematic_sample."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from balanceopt.functional import (
    inclusion_probabilities,
    inclusion_probabilities_padded,
    keep_ratio,
    kept_units,
    sample_units,
    sample_units_padded,
    systematic_sample,
    systematic_sample_padded,
    unit_importance,
)

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestKeepRatio:
    @pytest.mark.parametrize(
        ("u", "expected"),
        [
            ([0.3, 0.3], [0.5, 0.5]),
            ([9.0, 0.1], [0.1, 0.9]),  # clamped
            ([0.3, 0.3, 0.3], [2 / 3] * 3),
            ([0.3, 0.0], [0.5, 0.5]),
            ([0.3, -0.1, 0.3], [2 / 3] * 3),
            ([math.inf, 0.3], [0.5, 0.5]),
            ([math.nan, 0.3], [0.5, 0.5]),
            ([-0.3], [1.0]),
            ([0.3], [1.0]),
        ],
    )
    def test_values(self, u, expected):
        assert keep_ratio(torch.tensor(u)).tolist() == pytest.approx(expected)

    def test_the_balanced_ratio_is_not_clamped(self):
        u = torch.ones(20)
        assert keep_ratio(u).tolist() == pytest.approx([0.9] * 20)
        assert keep_ratio(-u).tolist() == pytest.approx([0.95] * 20)

    def test_extreme_significance_stays_finite(self):
        assert keep_ratio(torch.tensor([3e38, 1e-38]), temperature=1e-3).tolist() == pytest.approx([0.1, 0.9])

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_dtype_is_kept(self, dtype):
        found = keep_ratio(torch.tensor([0.4, 0.2], dtype=dtype))
        assert found.dtype == dtype
        assert found.float().tolist() == pytest.approx([1 / (1 + math.e), math.e / (1 + math.e)], abs=5e-3)

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ({"significance": torch.ones(2, 2)}, "`significance` should be a dense real tensor"),
            ({"significance": torch.ones(0)}, r"shape \(M,\), not empty"),
            (
                {"temperature": 0.0},
                "`temperature` should be a finite number above 0. Found temperature = 0.0",
            ),
            ({"temperature": math.nan}, "`temperature`"),
            ({"clamp": (0.9, 0.1)}, "`clamp` should be"),
            ({"clamp": (-0.1, 0.1)}, "`clamp` should be"),
        ],
    )
    def test_errors(self, arguments, match):
        with pytest.raises(ValueError, match=match):
            keep_ratio(**{"significance": torch.ones(2), **arguments})


class TestKeptUnits:
    @pytest.mark.parametrize(
        ("n", "ratio", "expected"),
        [
            (100, 0.07, 7),
            (10, 0.1, 1),
            (10, 0.11, 2),
            (3, 2 / 3, 2),
            (5, 0.0, 1),
            (5, 1.0, 5),
            (1, 0.1, 1),
            (0, 0.5, 0),
        ],
    )
    @pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64])
    def test_values(self, n, ratio, expected, dtype):
        if dtype is None:
            assert kept_units(n, ratio) == expected
        else:
            found = kept_units(n, torch.tensor(ratio, dtype=dtype))
            assert found.dtype == torch.int64
            assert int(found) == expected

    def test_float32_ratios_count_as_the_decimal_they_stand_for(self):
        tenths = torch.arange(1, 10) / 10
        for n in range(10, 2000, 10):
            assert kept_units(n, tenths).tolist() == [n * i // 10 for i in range(1, 10)]

    def test_sizes_as_a_tensor(self):
        assert kept_units(torch.tensor([4, 0, 9]), torch.tensor(0.5)).tolist() == [2, 0, 5]
        with pytest.raises(TypeError, match="`ratio` should be a tensor"):
            kept_units(torch.tensor(3), 0.5)  # type: ignore[call-overload]


class TestUnitImportance:
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 3, 2), (4, 3, 5, 5)])
    @pytest.mark.parametrize("last", [False, True])
    def test_sum_of_squares(self, dtype, shape, last):
        grad = torch.randn(shape).to(dtype)
        unit_dim = len(shape) - 1 if last else 0
        expected = grad.double().square().movedim(unit_dim, 0).reshape(shape[unit_dim], -1).sum(1)
        for dim in (unit_dim, unit_dim - len(shape)):
            found = unit_importance(grad, dim)
            assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=0)

    def test_half_precision_does_not_overflow(self):
        assert unit_importance(torch.full((2, 3), 6e4, dtype=torch.float16)).tolist() == pytest.approx(
            [1.08e10] * 2, rel=1e-3
        )

    def test_strides_do_not_matter(self):
        grad = torch.randn(6, 4, 3)
        torch.testing.assert_close(unit_importance(grad.transpose(0, 2)), unit_importance(grad, 2))
        torch.testing.assert_close(unit_importance(grad[::2]), unit_importance(grad)[::2])
        assert unit_importance(torch.ones(1, 3).expand(5, 3)).tolist() == pytest.approx([3.0] * 5)

    def test_empty_units(self):
        assert unit_importance(torch.ones(3, 0)).tolist() == [0, 0, 0]
        assert unit_importance(torch.ones(0, 3)).shape == (0,)

    def test_needs_no_graph(self):
        grad = torch.ones(2, 2, requires_grad=True)
        assert not unit_importance(grad).requires_grad

    def test_several_dimensions_number_the_units_together(self):
        grad = torch.randn(4, 3, 5, dtype=torch.float64)
        expected = grad.square().sum(1).flatten()
        for dims in ((0, 2), (2, 0), (-3, -1)):
            torch.testing.assert_close(unit_importance(grad, dims), expected)
        torch.testing.assert_close(unit_importance(grad, (0, 1, 2)), grad.square().flatten())
        torch.testing.assert_close(unit_importance(grad, ()), grad.square().sum().view(1))

    def test_integers_are_numbers_and_complex_entries_have_their_modulus(self):
        assert unit_importance(torch.tensor([[3, 4], [200, 0]])).tolist() == [25, 40_000]
        assert unit_importance(torch.tensor([[3 + 4j, 0], [1j, 1]])).tolist() == pytest.approx([25, 2])

    def test_a_number_without_dimension(self):
        with pytest.raises(ValueError, match="`grad` should have at least one dimension"):
            unit_importance(torch.tensor(1.0))

    @pytest.mark.parametrize("unit_dim", [2, -3, (0, 2)])
    def test_unit_dim_out_of_range(self, unit_dim):
        with pytest.raises(ValueError, match="`unit_dim` should be a dimension"):
            unit_importance(torch.ones(2, 2), unit_dim)


class TestSampleUnits:
    @pytest.mark.parametrize("n", [0, 1, 2, 7, 300])
    @pytest.mark.parametrize("k", [0, 1, 3, 7, 1000])
    def test_size(self, n, k):
        mask = sample_units(torch.rand(n), k, generator())
        assert mask.dtype == torch.bool
        assert mask.shape == (n,)
        assert int(mask.sum()) == min(k, n)

    @pytest.mark.parametrize("importance", [[0.0] * 6, [1e-30] * 6, [1e30] * 6, [5e-324] * 6, [1.0] * 6])
    def test_equal_importances_are_drawn_uniformly(self, importance):
        draws = 6000
        rows = torch.tensor(importance, dtype=torch.float64).expand(draws, 6)
        masks = sample_units_padded(
            rows, torch.full((draws,), 6), torch.full((draws,), 2), torch.rand(draws, 6, dtype=torch.float64)
        )
        # Standard deviation sqrt(1/3 * 2/3 / 6000) = 0.0061.
        assert (masks.double().mean(0) - 1 / 3).abs().max() < 4.5 * 0.0061

    def test_zero_importance_comes_last_and_at_random(self):
        importance = torch.tensor([0.0, 1e-30, 0.0, 1e30, 0.0])
        for seed in range(20):
            assert sample_units(importance, 2, generator(seed)).tolist() == [False, True, False, True, False]
        third = [tuple(sample_units(importance, 3, generator(seed)).tolist()) for seed in range(40)]
        assert all(mask[1] and mask[3] for mask in third)
        assert len(set(third)) == 3

    def test_huge_importance_comes_first(self):
        importance = torch.tensor([1e-30, 1e30, 1e-30])
        assert all(bool(sample_units(importance, 1, generator(s))[1]) for s in range(50))

    @pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-53])
    def test_extreme_uniform_numbers(self, uniform):
        importance = torch.tensor([[0.0, 0.0, 3.0, 0.0, 9.0]])
        mask = sample_units_padded(
            importance, torch.tensor([4]), torch.tensor([2]), torch.full((1, 5), uniform, dtype=torch.float64)
        )[0]
        assert mask.tolist() == [True, False, True, False, False]

    @pytest.mark.parametrize("dtype", [*FLOATS, torch.int64])
    def test_any_dtype_gives_the_same_mask(self, dtype):
        importance = torch.tensor([1, 2, 3, 4, 8, 16])
        expected = sample_units(importance.double(), 3, generator())
        assert sample_units(importance.to(dtype), 3, generator()).tolist() == expected.tolist()

    @pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
    def test_bad_importance(self, bad):
        with pytest.raises(ValueError, match="`importance` should be finite and non-negative"):
            sample_units(torch.tensor([1.0, bad]), 1)

    def test_other_errors(self):
        with pytest.raises(ValueError, match="`k` should be a whole number of at least 0"):
            sample_units(torch.ones(2), -1)
        with pytest.raises(ValueError, match=r"`importance` should be a dense real tensor of shape \(n,\)"):
            sample_units(torch.ones(2, 2), 1)


class TestInclusionProbabilities:
    @pytest.mark.parametrize(
        ("importance", "budget", "expected"),
        [
            ([1.0, 1, 1, 1], 2.0, [0.5] * 4),
            ([9.0, 1, 1, 1], 2.0, [1, 1 / 3, 1 / 3, 1 / 3]),
            ([9.0, 3, 1, 0], 2.5, [1, 1, 0.5, 0]),
            ([2.0, 1, 1], 2.0, [1, 0.5, 0.5]),  # the cap is reached exactly
            ([0.0, 0, 0], 2.0, [0, 0, 0]),
            ([0.0, 5, 0], 0.25, [0, 0.25, 0]),
            ([1.0, 2, 0], 2.0, [1, 1, 0]),
            ([1.0, 2, 0], 7.0, [1, 1, 0]),
            ([1.0, 2, 3], 0.0, [0, 0, 0]),
            ([1e30, 1e-30, 1e-30], 2.0, [1, 0.5, 0.5]),
            ([3e38, 3e38, 3e38], 1.5, [0.5] * 3),
            ([1e-45, 1e-45], 1.0, [0.5, 0.5]),
            ([4.0], 0.5, [0.5]),
            ([], 1.0, []),
        ],
    )
    def test_values(self, importance, budget, expected):
        found = inclusion_probabilities(torch.tensor(importance), budget)
        assert found.dtype == torch.float32
        assert found.tolist() == pytest.approx(expected)

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_dtype_is_kept(self, dtype):
        assert inclusion_probabilities(torch.ones(4, dtype=dtype), 2).dtype == dtype

    def test_many_units(self):
        importance = torch.rand(10_000).pow(8)
        found = inclusion_probabilities(importance, 4321)
        assert float(found.double().sum()) == pytest.approx(4321, abs=1e-3)
        assert bool((found[importance.argsort()].diff() >= 0).all())

    @pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
    def test_errors(self, bad):
        with pytest.raises(ValueError, match="`importance` should be finite"):
            inclusion_probabilities(torch.tensor([1.0, bad]), 1.0)
        with pytest.raises(ValueError, match="`budget` should be a finite number of at least 0"):
            inclusion_probabilities(torch.ones(2), bad)


class TestSystematicSample:
    def test_certain_units_are_taken_and_impossible_ones_never(self):
        pi = torch.tensor([1.0, 0.0, 0.4, 1.5, 0.35, 0.0])
        for seed in range(200):
            mask = systematic_sample(pi, generator(seed))
            assert bool(mask[0])
            assert bool(mask[3])
            assert not mask[1]
            assert not mask[5]
            assert int(mask.sum()) in (2, 3)

    @pytest.mark.parametrize("shift", [0.0, 9e-6, -9e-6])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_size_where_the_sum_is_almost_an_integer(self, shift, dtype):
        pi = torch.tensor([0.25, 0.75, 1.0, 0.4, 0.6 + shift, 0.0], dtype=dtype)
        assert {int(systematic_sample(pi, generator(seed)).sum()) for seed in range(300)} == {3}

    @pytest.mark.parametrize("start", [0.0, 1 - 2.0**-53])
    @pytest.mark.parametrize("shift", [0.0, 9e-6, -9e-6])
    def test_size_at_the_ends_of_the_line(self, start, shift):
        pi = torch.tensor([[0.5, 0.5 + shift, 0.0, 0.25, 0.75]], dtype=torch.float64)
        for keys in itertools.permutations([0.0, 0.2, 0.4, 0.6, 0.8]):
            mask = systematic_sample_padded(
                pi, torch.tensor([start], dtype=torch.float64), torch.tensor([keys], dtype=torch.float64)
            )
            assert int(mask.sum()) == 2
            assert not mask[0, 2]

    def test_size_otherwise(self):
        pi = torch.tensor([0.3, 0.3, 0.9])
        sizes = torch.tensor([int(systematic_sample(pi, generator(seed)).sum()) for seed in range(2000)])
        assert set(sizes.tolist()) == {1, 2}
        # Standard deviation of the mean 0.5 / sqrt(2000) = 0.0112.
        assert abs(float(sizes.float().mean()) - 1.5) < 4.5 * 0.0112

    def test_inclusion_frequencies(self):
        pi, draws = torch.tensor([1.0, 0.9, 0.5, 0.3, 0.25, 0.05, 1e-9, 0.0], dtype=torch.float64), 40_000
        masks = systematic_sample_padded(
            pi.expand(draws, 8),
            torch.rand(draws, dtype=torch.float64),
            torch.rand(draws, 8, dtype=torch.float64),
        )
        # A frequency has standard deviation sqrt(pi (1 - pi) / draws).
        bound = 4.5 * (pi * (1 - pi) / draws).sqrt()
        assert ((masks.double().mean(0) - pi).abs() <= bound).all()

    def test_empty(self):
        assert systematic_sample(torch.ones(0)).shape == (0,)
        assert systematic_sample(torch.zeros(3)).tolist() == [False] * 3

    @pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf])
    def test_errors(self, bad):
        with pytest.raises(ValueError, match="`probabilities` should be finite and non-negative"):
            systematic_sample(torch.tensor([0.5, bad]))


class TestHorvitzThompson:
    """Every order of four units and every start on a fine grid: expectations without sampling error."""

    importance = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64)

    def outcomes(self, budget: float) -> tuple[torch.Tensor, torch.Tensor]:
        pi = inclusion_probabilities(self.importance, budget)
        # The probabilities are multiples of 1/16, so starts in the middle of 1/16 steps weigh all alike.
        starts = (torch.arange(16, dtype=torch.float64) + 0.5) / 16
        keys = torch.tensor(list(itertools.permutations([0.0, 0.25, 0.5, 0.75])), dtype=torch.float64)
        masks = systematic_sample_padded(
            pi.expand(24 * 16, 4), starts.repeat(24), keys.repeat_interleave(16, dim=0)
        )
        return pi, masks.double()

    @pytest.mark.parametrize("budget", [1.0, 1.5, 2.0, 3.0, 4.0])
    def test_inclusion_is_exact(self, budget):
        pi, masks = self.outcomes(budget)
        torch.testing.assert_close(masks.mean(0), pi)

    @pytest.mark.parametrize("budget", [1.0, 1.5, 2.0])
    def test_weighted_gradient_is_unbiased_with_the_variance_of_the_formula(self, budget):
        pi, masks = self.outcomes(budget)
        grad = torch.randn(4, 3, dtype=torch.float64)
        estimates = (masks / pi)[:, :, None] * grad
        torch.testing.assert_close(estimates.mean(0), grad)
        variance = (estimates - grad).square().sum((1, 2)).mean()
        expected = (unit_importance(grad) * (1 / pi - 1)).sum()
        torch.testing.assert_close(variance, expected)


class TestAllRules:
    @pytest.mark.parametrize(
        "call",
        [
            lambda g: sample_units(torch.rand(9, generator=generator()), 3, g),
            lambda g: systematic_sample(torch.full((9,), 1 / 3), g),
        ],
    )
    def test_randomness_comes_from_the_generator_alone(self, call):
        before = torch.get_rng_state()
        first, again, other = call(generator(1)), call(generator(1)), call(generator(2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert torch.equal(torch.get_rng_state(), before)

    def test_without_a_generator_torchs_own_is_used(self):
        torch.manual_seed(3)
        expected = sample_units(torch.ones(20), 5)
        torch.manual_seed(3)
        assert torch.equal(sample_units(torch.ones(20), 5), expected)
        assert not torch.equal(sample_units(torch.ones(20), 5), expected)

    def test_one_draw_of_n_numbers(self):
        shared, separate = generator(), generator()
        sample_units(torch.ones(13), 5, shared)
        torch.rand(13, dtype=torch.float64, generator=separate)
        assert torch.equal(shared.get_state(), separate.get_state())

    def test_no_wait_for_the_device(self):
        """Fake tensors have no values: looking at one on the host raises."""
        with FakeTensorMode():
            importance, sizes = torch.empty(3, 5), torch.empty(3, dtype=torch.int64)
            uniforms, ratio = torch.empty(3, 5, dtype=torch.float64), keep_ratio(torch.empty(3))
            count = kept_units(sizes, ratio)
            unit_importance(torch.empty(4, 3, 2, 2))
            assert sample_units_padded(importance, sizes, count, uniforms).shape == (3, 5)
            pi = inclusion_probabilities_padded(importance, sizes * ratio)
            assert systematic_sample_padded(pi, torch.empty(3), uniforms).shape == (3, 5)

    def test_deterministic_algorithms_are_enough(self):
        torch.use_deterministic_algorithms(True)
        importance = torch.rand(9)
        sample_units(importance, 3)
        systematic_sample(inclusion_probabilities(importance, 3))
