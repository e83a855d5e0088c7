"""Gaussian noise: a function of (seed, step, parameter) whatever makes it, and Gaussian."""

from __future__ import annotations

import math
import multiprocessing
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from balanceopt.modulation import _noise
from balanceopt.modulation._noise import scale_and_add_gaussians_
from tests.noise import gaussian_like

# What processors may differ by. The angle, a float32 number up to 2 pi, is rounded twice, by 2^-22 each, and
# once more by sine or cosine. That is multiplied by the radius, at most 5.8 for uniform numbers of 24 bits, and
# as inexact itself.
ROUNDING = 5.8 * 4 * 2**-22
CHUNK = 2**18


def noise(*shape: int, seed: int = 0, step: int = 0, index: int = 0) -> Tensor:
    return gaussian_like(torch.empty(shape), seed, step, index)


@pytest.fixture(scope="module")
def long() -> Tensor:
    """The elements of some chunks."""
    return noise(2**21 + 77)


@pytest.fixture
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_noise, "_CHUNK", 24)
    monkeypatch.setattr(_noise, "_SMALL", 12)
    monkeypatch.setattr(_noise, "_PIECE", 5)


# -- of what it is a function ------------------------------------------------------------------------------------


OTHERS = [{"seed": 1}, {"step": 1}, {"index": 1}, {"seed": 2**40}, {"seed": 2**63}, {"seed": -1}]


@pytest.mark.parametrize("shape", [(), (1,), (15,), (16,), (3, 5), (400, 700), (3, 2**18 + 5)])
@pytest.mark.parametrize("other", OTHERS)
def test_a_function_of_seed_step_and_parameter(shape, other):
    assert torch.equal(noise(*shape, seed=0, step=0, index=0), noise(*shape))
    assert not torch.equal(noise(*shape, **other), noise(*shape))


def test_a_function_of_no_other_tensor():
    shapes = [(5,), (300, 300), (7, 2), (600, 700), (1, 3), ()]
    factors, scales = torch.tensor([1, 0.25, 1, 0.5, 3, 2]), torch.tensor([0.5, 2, 0, 1, 0, 1.5])
    tensors = [torch.ones(shape) for shape in shapes]
    scale_and_add_gaussians_(tensors, factors, scales, 1, 2, range(10, 16))
    for i, tensor in enumerate(tensors):
        want = factors[i] + scales[i] * noise(*shapes[i], seed=1, step=2, index=10 + i)
        torch.testing.assert_close(tensor, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_changes_nothing(long, threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(noise(2**21 + 77), long)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_the_processor_changes_roundings_alone(tmp_path):
    """Without vector instructions, in a process of its own."""
    shapes = [(3,), (17,), (50, 40), (CHUNK + 1_003,)]
    script = (
        "import sys, torch; from tests.noise import gaussian_like; "
        f"torch.save([gaussian_like(torch.empty(s), 1, 2, 3) for s in {shapes}], sys.argv[1])"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "2"}
    root = Path(__file__).parents[3]
    saved = tmp_path / "noise.pt"
    subprocess.run([sys.executable, "-c", script, saved], env=environment, cwd=root, check=True)
    for shape, other in zip(shapes, torch.load(saved), strict=True):
        torch.testing.assert_close(noise(*shape, seed=1, step=2, index=3), other, rtol=0, atol=ROUNDING)


LAYOUTS: dict[str, Any] = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "part of a larger one": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("size", [(2, 8, 3, 3), (4, 64, 16, 16), (2, 3, 400, 500)])
def test_memory_layout_changes_nothing(name, size):
    x = torch.randn(size)
    other = LAYOUTS[name](x)
    assert not other.is_contiguous()
    for tensor in (x, other):
        scale_and_add_gaussians_([tensor], torch.tensor([0.5]), torch.tensor([2.0]), 1, 2, [3])
    assert torch.equal(x, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5), (), (0,), (40, 600), (2, 3, 230, 231)])
def test_other_dtypes_get_the_same_rounded(dtype, shape):
    found = gaussian_like(torch.empty(shape, dtype=dtype), 1, 2, 3)
    assert torch.equal(found, noise(*shape, seed=1, step=2, index=3).to(dtype))


# -- chunks ------------------------------------------------------------------------------------------------------


SHAPES = st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple)


@given(SHAPES, st.integers(1, 40))
def test_boxes_hold_every_element_once(shape, most):
    times = torch.zeros(shape)
    for box in _noise._boxes(shape, most):
        assert times[box].numel() <= most
        times[box] += 1
    assert bool((times == 1).all())


@dataclass
class Shard:
    """What a process holds of a tensor: some elements along each dimension."""

    local: Tensor
    offset: tuple[int, ...]
    shape: torch.Size


@pytest.mark.usefixtures("_small_chunks")
@given(SHAPES, st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shard_gets_its_part(shape, data):
    ends = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    place = tuple(slice(start, stop) for start, stop in ends)
    whole = noise(*shape)
    shard = Shard(torch.zeros(shape)[place], tuple(start for start, _ in ends), torch.Size(shape))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_noise, "local_box", lambda tensor: (tensor.local, tensor.offset))
        one = torch.ones(1)
        scale_and_add_gaussians_([shard], one, one, 0, 0, [0])  # type: ignore[list-item]
    assert torch.equal(shard.local, whole[place])


@pytest.mark.usefixtures("_small_chunks")
@given(SHAPES, st.integers(1, 4))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_each_element_is_scaled_and_gets_noise_once(shape, threads):
    x = torch.randn(shape)
    want = 0.25 * x + 3 * noise(*shape)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        scale_and_add_gaussians_([x], torch.tensor([0.25]), torch.tensor([3.0]), 0, 0, [0])
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(x, want, rtol=1e-6, atol=1e-6)


# -- threads -----------------------------------------------------------------------------------------------------


@pytest.fixture
def _three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_three_threads")
def test_threads_end_and_leave_the_global_random_stream_and_grad_mode_alone(long):
    state, running = torch.get_rng_state(), threading.enumerate()
    with torch.enable_grad():
        x = (torch.zeros(len(long), requires_grad=True) * 1).detach().requires_grad_()
        one = torch.ones(1)
        scale_and_add_gaussians_([x], one, one, 0, 0, [0])
        assert torch.is_grad_enabled()
    assert x.is_leaf
    assert torch.equal(x.detach(), long)
    assert torch.equal(torch.get_rng_state(), state)
    assert threading.enumerate() == running


@pytest.mark.usefixtures("_three_threads")
def test_what_is_raised_in_a_thread_is_raised(monkeypatch):
    apply, calls = _noise._apply, []

    def fails(*given: Any) -> None:
        calls.append(threading.current_thread())
        if len(calls) == 4:
            raise MemoryError("no more")
        apply(*given)

    monkeypatch.setattr(_noise, "_apply", fails)
    running = threading.enumerate()
    with pytest.raises(MemoryError, match="no more"):
        noise(2**21)
    assert threading.main_thread() not in calls
    assert threading.enumerate() == running


def _in_child(queue: Any) -> None:
    torch.set_num_threads(1)  # as a DataLoader's worker does
    queue.put(noise(3 * CHUNK).numpy())


@pytest.mark.usefixtures("_three_threads")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_a_fork():
    want = noise(3 * CHUNK)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue,), daemon=True)
    child.start()
    assert torch.equal(torch.from_numpy(queue.get(timeout=60)), want)
    child.join(10)
    assert child.exitcode == 0


# -- distribution ------------------------------------------------------------------------------------------------


def test_moments(long):
    z = long.double()
    n = z.numel()
    # Each within 5 standard errors of a standard normal's.
    assert abs(float(z.mean())) < 5 / math.sqrt(n)
    assert abs(float(z.var()) - 1) < 5 * math.sqrt(2 / n)
    assert abs(float((z**3).mean())) < 5 * math.sqrt(15 / n)
    assert abs(float((z**4).mean()) - 3) < 5 * math.sqrt(96 / n)
    assert 4.5 < float(z.abs().max()) < 7


def test_distribution_is_the_normal_one(long):
    # Kolmogorov's distance; at this n a normal sample exceeds 1.95 / sqrt(n) once in a thousand.
    z, _ = long.double().sort()
    cdf = torch.special.ndtr(z)
    steps = torch.arange(1, z.numel() + 1, dtype=torch.float64) / z.numel()
    assert float((cdf - steps).abs().max()) < 1.95 / math.sqrt(z.numel())


@pytest.mark.parametrize("lag", [1, 2, 8, 16, 624, 2**15, CHUNK - 1, CHUNK, CHUNK + 1])
@pytest.mark.parametrize("power", [1, 2])
def test_elements_are_not_correlated(long, lag, power):
    x = long.double() ** power - (power - 1)
    product = x[lag:] * x[:-lag]
    assert abs(float(product.mean())) < 5 * float(product.std()) / math.sqrt(product.numel())


@pytest.mark.parametrize("other", OTHERS)
def test_neighbouring_streams_are_not_correlated(other):
    a, b = noise(2**17).double(), noise(2**17, **other).double()
    for x, y in ((a, b), (a**2 - 1, b**2 - 1)):
        assert abs(float((x * y).mean())) < 5 * float((x * y).std()) / math.sqrt(x.numel())


def test_two_streams_are_not_correlated_at_any_shift():
    # By FFT: the largest of n correlations of n independent normal products stays below ~5.5 standard errors.
    a, b = noise(2**16).numpy(), noise(2**16, seed=1, step=2, index=3).numpy()
    spectrum = np.fft.rfft(a) * np.conj(np.fft.rfft(b))
    assert np.abs(np.fft.irfft(spectrum)).max() / math.sqrt(a.size) < 5.6


def test_steps_are_independent():
    steps = torch.stack([noise(1000, step=step) for step in range(200)])
    off_diagonal = torch.corrcoef(steps).triu(1)
    assert float(off_diagonal.abs().max()) < 5.5 / 1000**0.5
    assert float(steps.sum(0).var()) == pytest.approx(200, rel=0.2)
