"""Scaling gradients and adding noise, tensor by tensor, against plain versions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from balanceopt.modulation import Slot
from balanceopt.modulation._noise import scale_and_add_noise_
from balanceopt.modulation._scaling import scale_grads_
from tests.noise import gaussian_like
from tests.training import bits

HALF = torch.tensor(0.5)
ONE = torch.tensor(1.0)
INF, NAN = float("inf"), float("nan")


def slots(*grads: Tensor) -> list[Slot]:
    found = []
    for index, grad in enumerate(grads):
        parameter = nn.Parameter(torch.zeros_like(grad))
        parameter.grad = grad
        found.append(Slot(index, parameter))
    return found


@pytest.fixture(params=["host", "accelerator"])
def _where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of the code: numbers can be read in place, or only by waiting for a device."""
    if request.param == "accelerator":
        monkeypatch.setattr("balanceopt.modulation._scaling.on_host", lambda tensor: None)
        monkeypatch.setattr("balanceopt.modulation._noise.on_host", lambda tensor: None)


on_both = pytest.mark.usefixtures("_where")


def several() -> list[Tensor]:
    """Shapes and layouts that gradients have."""
    return [
        torch.randn(3, 4),
        torch.randn(5),
        torch.randn(()),
        torch.randn(1),
        torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        torch.randn(6, 4).t(),
        torch.randn(200, 200),
        torch.zeros(2, 2),
        torch.randn(3, 3, dtype=torch.float64),
        torch.randn(3, 3).bfloat16(),
    ]


@on_both
def test_scale_is_a_product_in_place():
    grads = several()
    expected = [g * HALF for g in grads]
    places = [g.data_ptr() for g in grads]
    left = scale_grads_(slots(*grads), HALF)
    assert left == 0
    assert [g.data_ptr() for g in grads] == places
    for grad, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, want, rtol=0, atol=0)
        assert grad.dtype == want.dtype


@on_both
def test_noise_is_the_documented_rule():
    grads = several()
    given = [g.clone() for g in grads]
    scale_and_add_noise_(slots(*grads), HALF, torch.tensor(2.0), seed=3, step=5)
    for index, (grad, g) in enumerate(zip(grads, given, strict=True)):
        h = 2 * g.float().std(correction=0) * gaussian_like(g, 3, 5, index).float()
        want = (0.5 * g.double() + h).to(g.dtype)
        tolerance = {torch.bfloat16: 2e-2}.get(g.dtype, 1e-6)
        torch.testing.assert_close(grad, want, rtol=tolerance, atol=tolerance)


def test_noise_has_the_spread_of_the_unscaled_gradient():
    gradient = 3 * torch.randn(300, 300) + 10
    noisy = gradient.clone()
    scale_and_add_noise_(slots(noisy), torch.tensor(0.0), ONE, seed=0, step=0)
    assert float(noisy.std()) == pytest.approx(float(gradient.std(correction=0)), rel=0.02)
    assert abs(float(noisy.mean())) < 0.05


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("noise", [False, True])
def test_a_gradient_that_is_not_finite_is_left_bit_for_bit(bad: float, noise: bool):
    broken = torch.tensor([[1.0, -0.0], [bad, 2.0]])
    whole = torch.randn(2, 2)
    before, given = bits(broken).clone(), whole.clone()
    both = slots(broken, whole)
    left = scale_and_add_noise_(both, HALF, ONE, 0, 0) if noise else scale_grads_(both, HALF)
    assert left == 1
    assert torch.equal(bits(broken), before)
    assert not torch.equal(whole, given)


@on_both
@pytest.mark.parametrize("noise", [False, True])
def test_nothing_finite(noise: bool):
    own = slots(torch.full((2, 2), NAN))
    assert (scale_and_add_noise_(own, HALF, ONE, 0, 0) if noise else scale_grads_(own, HALF)) == 1


@on_both
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("noise", [False, True])
def test_a_gradient_that_is_not_finite_keeps_its_numbers(bad: float, noise: bool):
    broken, whole = torch.tensor([[1.0, 3.0], [bad, 2.0]]), torch.randn(2, 2)
    before, given = broken.clone(), whole.clone()
    both = slots(broken, whole)
    left = scale_and_add_noise_(both, HALF, ONE, 0, 0) if noise else scale_grads_(both, HALF)
    assert left == 1
    torch.testing.assert_close(broken, before, rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(whole, given)


@on_both
@pytest.mark.parametrize("size", [(), (1,), (1, 1)])
def test_one_element_gets_no_noise(size: tuple[int, ...]):
    grad = torch.full(size, 4.0)
    scale_and_add_noise_(slots(grad), HALF, ONE, 0, 0)
    assert grad.item() == 2


@on_both
def test_zero_gradients_get_no_noise():
    grad = torch.zeros(50, 50)
    scale_and_add_noise_(slots(grad), HALF, ONE, 0, 0)
    assert not grad.any()


@on_both
@pytest.mark.parametrize("conjugate", [False, True])
@pytest.mark.parametrize("size", [(30, 20), (200, 300)])
def test_parts_of_complex_gradients_are_numbers_like_others(conjugate: bool, size: tuple[int, ...]):
    parts = torch.randn(*size, 2) + torch.tensor([1.0, 3.0])
    grad = torch.view_as_complex(parts.clone())
    if conjugate:  # as autograd leaves the gradient of w.conj()
        grad = grad.conj().resolve_conj().conj()
        assert grad.is_conj()
    (slot,) = slots(grad)
    assert scale_and_add_noise_([slot], HALF, ONE, 0, 0) == 0
    assert slot.grad is grad
    scale_and_add_noise_(slots(parts), HALF, ONE, 0, 0)
    assert torch.equal(torch.view_as_real(grad.resolve_conj()), parts)


@on_both
def test_sparse_gradients_are_scaled():
    index = torch.tensor([[0, 2, 0]])
    grad = torch.sparse_coo_tensor(index, torch.arange(6.0).view(3, 2), (4, 2), check_invariants=True)
    dense = grad.to_dense()
    assert scale_grads_(slots(grad), HALF) == 0
    assert torch.equal(grad.to_dense(), dense / 2)
    broken = torch.sparse_coo_tensor(index, torch.full((3, 2), NAN), (4, 2), check_invariants=True)
    assert scale_grads_(slots(broken), HALF) == 1


@pytest.mark.parametrize("size", [4, 600])
def test_gradients_with_a_graph_of_their_own(size: int):
    # As backward(create_graph=True) leaves them; the larger ones are worth several threads.
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        w = torch.randn(size, size, requires_grad=True)
        (g,) = torch.autograd.grad((w**3).sum(), w, create_graph=True)
        parameter = nn.Parameter(torch.zeros_like(g))
        parameter.grad = g
        scale_and_add_noise_([Slot(0, parameter)], HALF, ONE, 0, 0)
    finally:
        torch.set_num_threads(before)
    assert g.requires_grad


def test_the_global_stream_is_left_alone():
    before = torch.get_rng_state()
    scale_and_add_noise_(slots(*several()), HALF, ONE, 0, 0)
    state = torch.get_rng_state()
    torch.set_rng_state(before)
    several()  # what the test itself drew
    assert torch.equal(state, torch.get_rng_state())
