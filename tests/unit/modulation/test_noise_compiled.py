"""Noise by the compiled kernel: a function of (seed, step, parameter) as well, of numbers of its own."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor.utils import run_and_get_code

import balanceopt as bo
from balanceopt.modulation import _noise, _noise_compiled, _ogm
from balanceopt.modulation._noise import scale_and_add_gaussians_
from tests.models import watch
from tests.noise import gaussian_like
from tests.training import batches, distance, groups_of, modulated, same_bits, sgd, small_model, train
from tests.unit.optim.test_memory import CHUNK, step

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")

CPU = torch.device("cpu")
# A thread's last numbers are made one by one, with other fused operations than those of vectors: some units in the last
# place of numbers below 8.
ROUNDING = 4e-6


@pytest.fixture(scope="module", autouse=True)
def code() -> Iterator[str]:
    """The kernel for two threads, which all tests share, since a compilation takes most of a minute."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch._dynamo.reset()
    yield "".join(run_and_get_code(_noise_compiled.warm_up, CPU)[1])
    torch.set_num_threads(before)


def noise(*shape: int, seed: int = 0, step: int = 0, index: int = 0) -> torch.Tensor:
    return gaussian_like(torch.empty(shape), seed, step, index, compiled=True)


@pytest.fixture(scope="module")
def long() -> torch.Tensor:
    """The elements of some chunks."""
    return noise(3 * 2**20 + 77)


def test_a_function_of_seed_step_and_parameter(long):
    assert torch.equal(noise(len(long)), long)
    for other in ({"seed": 1}, {"step": 1}, {"index": 1}, {"seed": 2**40}, {"seed": -1}):
        x, y = noise(2**17, **other).double(), noise(2**17).double()
        for a, b in ((x, y), (x**2 - 1, y**2 - 1)):
            assert abs(float((a * b).mean())) < 5 * float((a * b).std()) / math.sqrt(x.numel())


def test_the_numbers_are_its_own():
    assert not torch.equal(noise(2**16), gaussian_like(torch.empty(2**16), 0, 0, 0))


def test_small_tensors_get_those_of_plain_torch():
    assert torch.equal(noise(2**15), gaussian_like(torch.empty(2**15), 0, 0, 0))


def test_distribution(long):
    z = long.double()
    n = z.numel()
    # Each within 5 standard errors of a standard normal's.
    assert abs(float(z.mean())) < 5 / math.sqrt(n)
    assert abs(float(z.var()) - 1) < 5 * math.sqrt(2 / n)
    assert abs(float((z**3).mean())) < 5 * math.sqrt(15 / n)
    assert abs(float((z**4).mean()) - 3) < 5 * math.sqrt(96 / n)
    # Kolmogorov's distance; at this n a normal sample exceeds 1.95 / sqrt(n) once in a thousand.
    steps = torch.arange(1, n + 1, dtype=torch.float64) / n
    assert float((torch.special.ndtr(z.sort().values) - steps).abs().max()) < 1.95 / math.sqrt(n)


@pytest.mark.parametrize("lag", [1, 2, 16, 2**19 - 1, 2**19, 2**19 + 1, 2**20])
@pytest.mark.parametrize("power", [1, 2])
def test_elements_are_not_correlated(long, lag, power):
    x = long.double() ** power - (power - 1)
    product = x[lag:] * x[:-lag]
    assert abs(float(product.mean())) < 5 * float(product.std()) / math.sqrt(product.numel())


@pytest.mark.parametrize("threads", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_the_number_of_threads_changes_roundings_alone(long, threads):
    torch.set_num_threads(threads)
    try:
        torch.testing.assert_close(noise(len(long)), long, rtol=0, atol=ROUNDING)
    finally:
        torch.set_num_threads(2)


# In place; through memory of its own: an odd number, other dtypes, other layouts.
TENSORS: dict[str, Any] = {
    "float32": lambda: torch.randn(300, 400),
    "odd": lambda: torch.randn(301, 401),
    "several chunks": lambda: torch.randn(3, 700_001),
    "bfloat16": lambda: torch.randn(300, 400).bfloat16(),
    "float64": lambda: torch.randn(300, 400).double(),
    "transposed": lambda: torch.randn(400, 300).t(),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_are_scaled_and_get_noise(name):
    x = TENSORS[name]()
    given = x.double().clone()
    scale_and_add_gaussians_([x], torch.tensor([0.25]), torch.tensor([2.0]), 1, 2, [3], compiled=True)
    want = 0.25 * given + 2 * noise(*x.shape, seed=1, step=2, index=3).double()
    tolerance = 1e-2 if x.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(x.double(), want, rtol=tolerance, atol=tolerance)


def test_it_is_made_in_chunks():
    peak, kept = step(bo.OGM(0.5, noise="compiled"))
    assert peak < CHUNK
    assert kept < 0.01


def test_training_and_resuming():
    model, optimizer = modulated(bo.OGM(0.5, noise="compiled"))
    bare, alone = modulated(bo.OGM(0.5, noise=False))
    train(model, optimizer, batches(model, 2))
    train(bare, alone, batches(bare, 2))
    assert distance(model, bare) > 1e-2
    twin, other = modulated(bo.OGM(0.5, noise="compiled"))
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    for one, its in ((model, optimizer), (twin, other)):
        train(one, its, batches(one, 2, first=2))
    assert same_bits(model, twin)


def test_one_kernel_that_threads_share_serves_tensors_of_any_size_also_after_a_reset(code):
    assert "#pragma omp parallel" in code
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in (2**16, 2**15 + 2, 2**16 + 3, 2**20 + 2**16):
            noise(size)


@pytest.mark.parametrize("x", [2.0**-32, 1e-7, 0.5, 0.5**0.5, 0.70711, 0.999, 1 - 2.0**-24, 1.0])
def test_logarithm(x):
    number = torch.tensor(x)
    want = -2 * number.double().log()
    found = _noise_compiled._minus_twice_logarithm(number).double()
    # The polynomial's 2e-7, and some roundings of 2^-24.
    torch.testing.assert_close(found, want, rtol=6e-7, atol=0)


def test_without_a_compiler_the_optimizer_is_not_built(monkeypatch):
    def fails(*args: object) -> None:
        raise OSError("no compiler")

    monkeypatch.setattr(_noise_compiled, "_kernel", lambda: fails)
    model = small_model()
    with pytest.raises(RuntimeError, match=r"could not be compiled for cpu.*a C\+\+ compiler.*noise=True"):
        bo.ModulatedOptimizer(sgd(groups_of(model)), watch(model), bo.OGM(noise="compiled"))


def test_nothing_is_compiled_where_no_noise_is_made(monkeypatch):
    monkeypatch.setattr(_ogm, "warm_up", lambda device: pytest.fail("compiled for nothing"))
    modulated(bo.OGM(0.5, noise="compiled", noise_scale=0))
    modulated(bo.OGM(0.5))


def test_large_chunks_are_compiled(monkeypatch):
    monkeypatch.setattr(_noise_compiled, "scale_and_add_", lambda *given: pytest.fail("compiled"))
    noise(_noise._SMALL)
    with pytest.raises(pytest.fail.Exception, match="compiled"):
        noise(_noise._SMALL + 1)


@pytest.mark.slow
def test_kernels_of_another_processor_in_the_cache_are_no_hindrance(tmp_path: Path):
    code = "import torch; from balanceopt.modulation._noise_compiled import warm_up; warm_up(torch.device('cpu'))"
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = str(Path(bo.__file__).parent.parent)
    for kernels in ("avx2", "default", "avx2"):
        environment["ATEN_CPU_CAPABILITY"] = kernels
        subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=200)
