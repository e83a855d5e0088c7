"""The compiled Gaussian kernel: the numbers of plain torch, but for rounding."""

from __future__ import annotations

import shutil

import pytest
import torch

import balanceopt as bo
from balanceopt import _gaussian_compiled
from balanceopt._gaussian import Key
from balanceopt._random import gaussian_like, scale_and_add_gaussians_
from tests.models import watch
from tests.training import batches, distance, groups_of, modulated, same_bits, sgd, small_model, train

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")

# Four units in the last place of the largest numbers, which are below 8: by sine and cosine of half the angle.
ROUNDING = 2e-6


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    _gaussian_compiled.warm_up([(torch.device("cpu"), torch.float32)])


def compiled_noise(numels: list[int], seed: int = 1, step: int = 2) -> list[torch.Tensor]:
    tensors, ones = [torch.zeros(n) for n in numels], torch.ones(len(numels))
    scale_and_add_gaussians_(tensors, ones, ones, seed, step, range(len(numels)), compiled=True)
    return tensors


# Less than a block; a block; several small ones; large ones that end in the middle of a block.
@pytest.mark.parametrize("numels", [[3], [512], [1, 700, 40, 5_000], [2**14 + 1], [2**17 + 333, 9, 2**15]])
def test_the_numbers_are_those_of_plain_torch(numels):
    for index, noise in enumerate(compiled_noise(numels)):
        torch.testing.assert_close(noise, gaussian_like(noise, 1, 2, index), rtol=0, atol=ROUNDING)


def test_part_of_a_stream_is_the_same_wherever_it_begins():
    key = Key(1, 2, 3)
    one = torch.ones(())

    def stream(first: int, numel: int) -> torch.Tensor:
        numbers = torch.zeros(numel)
        _gaussian_compiled.scale_and_add_blocks_(numbers, one, one, key, first)
        return numbers

    for start in (0, 2**33 - 2_048):  # pairs beyond 2**32 count anew
        whole = stream(start, 8_192)
        assert torch.equal(stream(start + 1_024, 4_096), whole[1_024:5_120])


def test_gradients_are_scaled_on_the_way():
    tensors = [torch.randn(200, 200), torch.randn(30, 50)]
    given = [t.clone() for t in tensors]
    factors, scales = torch.tensor([0.25, 0.5]), torch.tensor([2.0, 3.0])
    scale_and_add_gaussians_(tensors, factors, scales, 1, 2, [4, 5], compiled=True)
    for i, (tensor, before) in enumerate(zip(tensors, given, strict=True)):
        want = factors[i] * before + scales[i] * gaussian_like(before, 1, 2, 4 + i)
        torch.testing.assert_close(tensor, want, rtol=0, atol=3 * ROUNDING)


def test_training_is_that_with_plain_noise_but_for_rounding():
    model, optimizer = modulated(bo.OGM(0.5, noise="compiled"))
    twin, plain = modulated(bo.OGM(0.5))
    bare, alone = modulated(bo.OGM(0.5, noise=False))
    for one, other in ((model, optimizer), (twin, plain), (bare, alone)):
        train(one, other, batches(one, 5))
    assert distance(model, twin) < 1e-5
    assert distance(model, bare) > 1e-2


def test_a_resumed_run_is_bit_for_bit_the_same():
    model, optimizer = modulated(bo.OGM(0.5, noise="compiled"))
    train(model, optimizer, batches(model, 2))
    twin, other = modulated(bo.OGM(0.5, noise="compiled"))
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    for one, its in ((model, optimizer), (twin, other)):
        train(one, its, batches(one, 2, first=2))
    assert same_bits(model, twin)


def test_one_kernel_serves_tensors_of_any_size_also_after_a_reset():
    torch._dynamo.reset()
    _gaussian_compiled.warm_up([(torch.device("cpu"), torch.float32)])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in (2**15, 2**14 + 512, 2**16 + 3):
            compiled_noise([size, 700, 900])


def test_without_a_compiler_the_optimizer_is_not_built(monkeypatch):
    def fails(*args: object) -> None:
        raise OSError("no compiler")

    monkeypatch.setattr(_gaussian_compiled, "_compiled", lambda function: fails)
    model = small_model()
    with pytest.raises(RuntimeError, match="Use noise=True"):
        bo.ModulatedOptimizer(sgd(groups_of(model)), watch(model), bo.OGM(noise="compiled"))


def test_nothing_is_compiled_where_no_noise_is_made(monkeypatch):
    monkeypatch.setattr(_gaussian_compiled, "warm_up", lambda kinds: pytest.fail("compiled for nothing"))
    modulated(bo.OGM(0.5, noise="compiled", noise_scale=0))
    modulated(bo.OGM(0.5))
