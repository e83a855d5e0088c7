"""Noise from a pool: a function of (seed, step), normal in every step, and unlike that of other steps and tensors."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

import balanceopt as bo
from balanceopt import _pool
from balanceopt._pool import Pool, rotations
from balanceopt.modulation._noise import Pooled
from tests.training import batches, modulated, same_bits, train

N = 36_864  # a convolution of 64 filters
STEPS = 300
OTHER = 16_640  # another tensor of the same step, large enough for a slice of its own


def noise(pool: Pool, step: int, sizes: tuple[int, ...] = (N,), seed: int = 0) -> list[Tensor]:
    tensors = [torch.zeros(size) for size in sizes]
    ones = torch.ones(len(sizes))
    pool.scale_and_add_(tensors, ones, ones, seed, step, range(len(sizes)), max(sizes))
    return tensors


def run(sizes: tuple[int, ...] = (N,)) -> list[Tensor]:
    """`(STEPS, size)` noise of every tensor."""
    pool = Pool()
    steps = [noise(pool, step, sizes) for step in range(STEPS)]
    return [torch.stack(own) for own in zip(*steps, strict=True)]


@pytest.fixture(scope="module")
def two() -> list[Tensor]:
    return run((N, OTHER))


# -- statistics: what independent noise would do -----------------------------------------------------------------


def test_every_step_is_normal(two):
    # Kolmogorov's distance times sqrt(n): above 2.3 once in 20 000, and there are 600 samples.
    for z in two:
        n = z.shape[1]
        found, _ = torch.special.ndtr(z.double()).sort(dim=1)
        places = torch.arange(1, n + 1, dtype=torch.float64) / n
        distance = (found - places).abs().amax(1) * math.sqrt(n)
        assert float(distance.max()) < 2.3
        # The median over samples of normal numbers is 0.83.
        assert float(distance.median()) == pytest.approx(0.83, abs=0.06)


def test_moments(two):
    z = two[0].double()
    # Over 11 million numbers; parts of the pool stay for 16 steps, so that fewer are independent.
    n = z.numel() / 16
    for power, expected, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((z**power).mean()) - expected) < 5 * math.sqrt(spread / n)


def products(z: Tensor) -> Tensor:
    """Inner products of all pairs of steps, in standard errors of independent noise."""
    pairs = z @ z.T / math.sqrt(z.shape[1])
    return pairs[torch.triu(torch.ones_like(pairs, dtype=torch.bool), 1)]


def test_steps_do_not_repeat_each_other(two):
    found = products(two[0])  # of 44 850 pairs; the largest of as many normal numbers is 4.3 +- 0.3
    assert float(found.std()) == pytest.approx(1, abs=0.03)
    assert float(found.abs().max()) < 5.5


def test_neighbouring_steps_are_not_alike(two):
    z = two[0]
    for lag in range(1, 17):
        found = (z[lag:] * z[:-lag]).sum(1) / math.sqrt(N)
        assert abs(float(found.mean())) < 4 / math.sqrt(len(found))
        assert float(found.std()) == pytest.approx(1, abs=5 / math.sqrt(2 * len(found)))


def test_energies_of_steps_are_not_alike(two):
    found = products((two[0] ** 2 - 1) / math.sqrt(2))
    assert abs(float(found.mean())) < 0.05
    assert float(found.std()) == pytest.approx(1, abs=0.05)
    assert float(found.abs().max()) < 6


def test_the_sum_over_steps_spreads_as_it_should(two):
    for z in two:
        assert float(z.sum(0).var()) / STEPS == pytest.approx(1, abs=0.05)


def test_tensors_of_a_step_are_not_alike(two):
    a, b = two[0][:, :OTHER], two[1]
    found = (a * b).sum(1) / math.sqrt(OTHER)
    assert abs(float(found.mean())) < 4 / math.sqrt(STEPS)
    assert float(found.std()) == pytest.approx(1, abs=5 / math.sqrt(2 * STEPS))
    assert float(found.abs().max()) < 4.5


def test_small_tensors_share_a_slice_and_are_not_alike():
    a, b = run((4_096, 4_096))
    found = (a * b).sum(1) / 64
    assert float(found.std()) == pytest.approx(1, abs=5 / math.sqrt(2 * STEPS))
    assert float(found.abs().max()) < 4.5


def test_a_pool_that_is_not_refreshed_would_repeat_itself(monkeypatch):
    """So the tests above can fail."""
    fill = _pool._fill
    monkeypatch.setattr(_pool, "_fill", lambda part, seed, step: fill(part, seed, step % 16))
    assert float(products(run()[0]).abs().max()) > 8


def test_rotations_are_orthogonal_and_of_either_sign():
    turns = rotations(range(200), 1, 2, torch.device("cpu"))
    eye = torch.eye(8).expand(200, 8, 8)
    torch.testing.assert_close(turns @ turns.mT, eye, rtol=0, atol=1e-6)
    # Every element has mean 0 and variance 1/8, if all directions are alike.
    assert float(turns.mean(0).abs().max()) < 4.5 * math.sqrt(1 / 8 / 200)
    assert 60 < int((torch.linalg.det(turns) > 0).sum()) < 140


# -- what it is a function of ------------------------------------------------------------------------------------


def test_a_new_pool_at_any_step_is_the_old_one():
    old = Pool()
    for step in range(40):
        found = noise(old, step)
        if step in (0, 1, 7, 16, 39):
            assert torch.equal(found[0], noise(Pool(), step)[0])
    assert torch.equal(noise(copy.deepcopy(old), 40)[0], noise(old, 40)[0])


def test_steps_that_made_no_noise_change_nothing():
    pool = Pool()
    noise(pool, 3)
    assert torch.equal(noise(pool, 30)[0], noise(Pool(), 30)[0])
    assert torch.equal(noise(pool, 2)[0], noise(Pool(), 2)[0])


@pytest.mark.parametrize("other", [{"seed": 1}, {"step": 1}])
def test_other_seeds_and_steps_are_other_noise(other):
    a, b = noise(Pool(), 0)[0], noise(Pool(), **{"step": 0, "seed": 0, **other})[0]
    assert abs(float((a * b).sum())) < 5 * math.sqrt(N)


def test_the_global_random_stream_is_untouched():
    before = torch.get_rng_state()
    noise(Pool(), 0)
    assert torch.equal(torch.get_rng_state(), before)


# -- gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1,), (7,), (20, 30), (200, 300), (20_003,), (4, 64, 16, 17)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("on_host", [True, False])
def test_gradients_are_scaled_and_get_noise_of_their_scale(size, dtype, on_host, monkeypatch):
    if not on_host:
        monkeypatch.setattr(_pool, "on_host", lambda tensor: None)
    given = torch.randn(size).to(dtype)
    results = []
    for factor, scale in ((0.5, 2.0), (0.5, 0.0), (0.0, 2.0)):
        gradient = given.clone()
        Pool().scale_and_add_([gradient], torch.tensor([factor]), torch.tensor([scale]), 1, 2, [3], 2**16)
        results.append(gradient.double())
    both, scaled, noise_alone = results
    rounding = {torch.bfloat16: 4e-2}.get(dtype, 1e-5)
    torch.testing.assert_close(scaled, 0.5 * given.double(), rtol=rounding, atol=rounding)
    torch.testing.assert_close(both, scaled + noise_alone, rtol=rounding, atol=rounding)
    if given.numel() > 500:
        assert float(noise_alone.std()) == pytest.approx(2, rel=5 / math.sqrt(2 * given.numel()))


def test_memory_out_of_order():
    plain = torch.zeros(8, 16, 16, 16)
    last = plain.clone(memory_format=torch.channels_last)
    one = torch.ones(1)
    for tensor in (plain, last):
        Pool().scale_and_add_([tensor], one, one, 1, 2, [3], 2**16)
    assert torch.equal(plain, last)


class Sharded:
    """What a DTensor is known by."""

    device_mesh = None


def test_sharded_parameters_are_refused():
    with pytest.raises(NotImplementedError, match="noise=True"):
        Pooled().prepare([Sharded()])  # type: ignore[list-item]


def test_a_resumed_run_is_bit_for_bit_the_same():
    model, optimizer = modulated(bo.OGM(0.5, noise="pool"))
    train(model, optimizer, batches(model, 20))
    twin, other = modulated(bo.OGM(0.5, noise="pool"))
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    for one, its in ((model, optimizer), (twin, other)):
        train(one, its, batches(one, 3, first=20))
    assert same_bits(model, twin)
