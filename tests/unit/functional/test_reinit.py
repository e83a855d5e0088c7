"""reinit_strength and soft_reinit_."""

from __future__ import annotations

import math

import pytest
import torch

from balanceopt.functional import reinit_strength, soft_reinit_


class TestReinitStrength:
    def test_values(self):
        gap = torch.tensor([0.0, 0.1, 1.0])
        torch.testing.assert_close(reinit_strength(gap, 3.0), torch.tanh(3 * gap))
        assert reinit_strength(gap, 0.0).tolist() == [0, 0, 0]
        assert float(reinit_strength(0.1, 3.0)) == pytest.approx(math.tanh(0.3))
        assert reinit_strength(gap.half(), 3.0).dtype == torch.float16

    @pytest.mark.parametrize("lam", [-1.0, math.nan, math.inf])
    def test_errors(self, lam):
        with pytest.raises(ValueError, match="`lam` should be a finite number of at least 0"):
            reinit_strength(torch.tensor(0.1), lam)


class TestSoftReinit:
    @pytest.mark.parametrize(
        "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
    )
    @pytest.mark.parametrize("alpha", [0.0, 0.3, 0.8, 1.0])
    def test_interpolates(self, dtype, alpha):
        current = [torch.randn(5, 3).to(dtype), torch.randn(()).to(dtype), torch.randn(0).to(dtype)]
        initial = [torch.randn_like(p) for p in current]
        expected = [
            (1 - alpha) * p.to(torch.complex128) + alpha * q for p, q in zip(current, initial, strict=True)
        ]
        kept = [q.clone() for q in initial]
        soft_reinit_(current, initial, alpha)
        for found, wanted in zip(current, expected, strict=True):
            tolerance = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(found.to(torch.complex128), wanted, rtol=tolerance, atol=2 * tolerance)
        assert all(torch.equal(a, b) for a, b in zip(initial, kept, strict=True))

    def test_strength_0_changes_no_bit(self):
        bits = torch.tensor([-0.0, math.nan, math.inf, 1e-45, 1.0])
        copy = bits.clone()
        version = bits._version
        soft_reinit_([bits], [torch.ones(5)], 0.0)
        soft_reinit_([bits], [torch.ones(5)], torch.tensor(0.0))
        soft_reinit_([bits], [torch.ones(5)], [0.0])
        assert torch.equal(bits.view(torch.int32), copy.view(torch.int32))
        assert bits._version == version

    def test_strength_1_is_the_initial_value_whatever_was_there(self):
        current = torch.tensor([math.nan, math.inf, 3e38, 1.0, 2.0])
        initial = torch.tensor([1.0, -3e38, -3e38, -0.0, 0.1])
        soft_reinit_([current], [initial], 1.0)
        assert torch.equal(current.view(torch.int32), initial.view(torch.int32))

    @pytest.mark.parametrize(
        "strength", [0.25, torch.tensor(0.25), [0.25, 0.25, 0.25], torch.full((3,), 0.25)]
    )
    def test_forms_of_the_strength(self, strength):
        params = [torch.ones(2), torch.ones(3, dtype=torch.float64), torch.ones(1)]
        soft_reinit_(params, [torch.zeros_like(p) for p in params], strength)
        assert all(bool((p == 0.75).all()) for p in params)

    def test_one_strength_per_parameter(self):
        params = [torch.ones(2) for _ in range(4)]
        soft_reinit_(params, [torch.zeros(2)] * 4, [0.0, 0.5, torch.tensor(1.0), 0.5])
        assert [float(p[0]) for p in params] == [1.0, 0.5, 0.0, 0.5]

    def test_parameters_keep_storage_gradient_and_state(self):
        layer = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3))
        initial = [p.detach().clone() for p in layer.parameters()]
        layer(torch.randn(4, 2, 6, 6)).square().mean().backward()
        torch.optim.SGD(layer.parameters(), lr=0.1).step()
        places = [(p.data_ptr(), p.requires_grad, p.is_leaf, p.grad) for p in layer.parameters()]
        soft_reinit_(layer.parameters(), initial, 1.0)
        for p, q, (place, requires, leaf, grad) in zip(layer.parameters(), initial, places, strict=True):
            assert torch.equal(p, q)
            assert (p.data_ptr(), p.requires_grad, p.is_leaf) == (place, requires, leaf)
            assert p.grad is grad

    def test_strides_dtypes_and_devices_of_the_initial_values(self):
        current = torch.ones(4, 6).T
        soft_reinit_([current], [torch.zeros(6, 4, dtype=torch.float64)], 0.5)
        assert bool((current == 0.5).all())

    def test_nothing_to_do(self):
        soft_reinit_([], [], 0.5)

    @pytest.mark.parametrize(
        ("params", "initial", "strength", "match"),
        [
            ([torch.ones(2)], [], 0.5, r"`initial` should have one tensor per parameter \(1\). Found 0"),
            ([torch.ones(2)], [torch.ones(3)], 0.5, "`initial` should have the shapes"),
            ([torch.ones(2)], [torch.ones(1)], 0.5, "`initial` should have the shapes"),
            ([torch.ones(2, dtype=torch.int64)], [torch.ones(2)], 0.5, "`params` should be floating tensors"),
            ([torch.ones(2, dtype=torch.bool)], [torch.ones(2)], 0.5, "`params` should be floating tensors"),
            (
                [torch.ones(2)],
                [torch.ones(2)],
                -0.1,
                r"`strength` should be a finite number from 0 to 1. Found strength = -0.1",
            ),
            ([torch.ones(2)], [torch.ones(2)], 1.1, "`strength` should be a finite number from 0 to 1"),
            (
                [torch.ones(2)],
                [torch.ones(2)],
                torch.tensor(math.nan),
                "`strength` should be a finite number from 0 to 1",
            ),
            ([torch.ones(2)], [torch.ones(2)], [0.1, 0.2], "`strength` should be one value, or one per"),
        ],
    )
    def test_errors(self, params, initial, strength, match):
        before = [p.clone() for p in params]
        with pytest.raises(ValueError, match=match):
            soft_reinit_(params, initial, strength)
        assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))

    def test_the_same_tensor_twice(self):
        weight = torch.ones(2)
        with pytest.raises(ValueError, match="`params` should hold each tensor once"):
            soft_reinit_([weight, weight], [torch.zeros(2)] * 2, 0.5)
