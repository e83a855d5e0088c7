"""The counter-based Gaussian source: a function of key and index, and Gaussian."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from balanceopt._gaussian import Gaussians, Key, int32
from balanceopt._random import gaussian_like, key_of, keys_of, scale_and_add_gaussians_

KEY = key_of(0, 0, 0)
CPU = torch.device("cpu")


def stream(numel: int, key: Key = KEY, first: int = 0) -> torch.Tensor:
    out = torch.full((numel,), math.nan)
    for place, values in Gaussians(CPU).pieces(numel, key, first):
        out[place] = values
    return out


@pytest.fixture(scope="module")
def long_stream() -> torch.Tensor:
    return stream(2**21 + 77)


@given(first=st.integers(0, 70_000), numel=st.integers(0, 3_000))
def test_an_element_depends_on_its_index_alone(long_stream, first, numel):
    assert torch.equal(stream(numel, first=first), long_stream[first : first + numel])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_changes_nothing(long_stream, threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(stream(2**19 + 5, first=1_001), long_stream[1_001 : 1_001 + 2**19 + 5])
    finally:
        torch.set_num_threads(before)


def test_global_random_stream_is_untouched():
    before = torch.get_rng_state()
    stream(1_000)
    assert torch.equal(torch.get_rng_state(), before)


def test_moments(long_stream):
    z = long_stream.double()
    n = z.numel()
    # Each within 5 standard errors of a standard normal's.
    assert abs(float(z.mean())) < 5 / math.sqrt(n)
    assert abs(float(z.var()) - 1) < 5 * math.sqrt(2 / n)
    assert abs(float((z**3).mean())) < 5 * math.sqrt(15 / n)
    assert abs(float((z**4).mean()) - 3) < 5 * math.sqrt(96 / n)
    assert torch.isfinite(z).all()
    assert 4.5 < float(z.abs().max()) < 7


def test_distribution_is_the_normal_one(long_stream):
    # Kolmogorov's distance; at this n a normal sample exceeds 1.95 / sqrt(n) once in a thousand.
    z, _ = long_stream.double().sort()
    cdf = torch.special.ndtr(z)
    steps = torch.arange(1, z.numel() + 1, dtype=torch.float64) / z.numel()
    assert float((cdf - steps).abs().max()) < 1.95 / math.sqrt(z.numel())


@pytest.mark.parametrize("lag", [1, 2, 255, 256, 257, 512, 2**15, 2**16])
@pytest.mark.parametrize("power", [1, 2])
def test_elements_of_a_stream_are_not_correlated(long_stream, lag, power):
    x = long_stream.double() ** power - (power - 1)
    product = x[lag:] * x[:-lag]
    assert abs(float(product.mean())) < 5 * float(product.std()) / math.sqrt(product.numel())


@pytest.mark.parametrize("other", [(8, 3, 5), (7, 4, 5), (7, 3, 6), (3, 7, 5), (7 + 2**63, 3, 5)])
def test_streams_of_neighbouring_seeds_steps_and_parameters_are_not_correlated(other):
    a, b = stream(2**17, key_of(7, 3, 5)).double(), stream(2**17, key_of(*other)).double()
    for x, y in ((a, b), (a**2 - 1, b**2 - 1)):
        assert abs(float((x * y).mean())) < 5 * float((x * y).std()) / math.sqrt(x.numel())


def test_cross_correlation_of_two_streams_at_any_shift():
    # By FFT: the largest of n correlations of n independent normal products stays below ~5.5 standard errors.
    a, b = stream(2**16).numpy(), stream(2**16, key_of(1, 2, 3)).numpy()
    spectrum = np.fft.rfft(a) * np.conj(np.fft.rfft(b))
    assert np.abs(np.fft.irfft(spectrum)).max() / math.sqrt(a.size) < 5.6


def test_indices_beyond_32_bits_are_another_part_of_the_stream():
    far = stream(4_096, first=2**33)
    near = stream(4_096)
    assert not torch.equal(far, near)
    assert abs(float((far * near).mean())) < 5 / math.sqrt(4_096)


def test_no_element_no_piece():
    assert list(Gaussians(CPU).pieces(0, KEY)) == []


@given(st.lists(st.integers(0, 2_000), min_size=1, max_size=6))
def test_many_streams_at_once_are_the_same_streams(numels):
    keys = keys_of(1, 2, range(len(numels)), CPU)
    source = Gaussians(CPU)
    for _ in range(2):  # memory is used again
        together = source.heads(tuple(numels), keys)
        for index, (numel, head) in enumerate(zip(numels, together, strict=True)):
            assert torch.equal(head, stream(numel, key_of(1, 2, index)))


@given(
    st.integers(-(2**63), 2**64),
    st.integers(0, 2**40),
    st.lists(st.integers(0, 2**40), min_size=1, max_size=9),
)
def test_keys_of_many_parameters_are_those_of_each(seed, step, indices):
    for index, words in zip(indices, keys_of(seed, step, indices, CPU).tolist(), strict=True):
        assert tuple(words) == tuple(int32(word) for word in key_of(seed, step, index))


@pytest.mark.parametrize("shape", [(3, 5), (), (1,), (0,), (40, 600), (2, 3, 130, 131)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_noise_like_a_tensor_is_its_stream_in_logical_order(shape, dtype):
    noise = gaussian_like(torch.empty(shape, dtype=dtype), 1, 2, 3)
    assert noise.dtype == dtype
    assert torch.equal(noise.flatten(), stream(noise.numel(), key_of(1, 2, 3)).to(dtype))


@pytest.mark.parametrize("size", [(2, 8, 3, 3), (4, 64, 16, 16)])
def test_memory_layout_changes_nothing(size):
    plain = gaussian_like(torch.empty(size), 1, 2, 3)
    last = gaussian_like(torch.empty(size).to(memory_format=torch.channels_last), 1, 2, 3)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(plain, last)


def test_each_tensor_gets_its_own_factor_scale_and_index_whatever_its_company():
    tensors = [torch.ones(5), torch.ones(300, 300), torch.ones(7, 2), torch.ones(1, 3)]
    factors, scales = torch.tensor([1.0, 0.25, 1.0, 3.0]), torch.tensor([0.5, 2.0, 0.0, 0.0])
    scale_and_add_gaussians_(tensors, factors, scales, 1, 2, [10, 11, 12, 13])
    given = zip(tensors, factors, scales, (10, 11, 12, 13), strict=True)
    for tensor, factor, scale, index in given:
        alone = torch.ones_like(tensor)
        scale_and_add_gaussians_([alone], factor.view(1), scale.view(1), 1, 2, [index])
        assert torch.equal(tensor, alone)
        assert torch.equal(tensor, factor + scale * gaussian_like(tensor, 1, 2, index))


@pytest.mark.parametrize("first", [2**33 - 1_024, 2**33 - 1_300, 3 * 2**33 - 70_000])
def test_pieces_that_begin_anywhere_agree_where_pairs_begin_to_count_anew(first):
    whole = stream(140_000, first=first)
    for begin in (77, 1_024, 1_500, 69_900):
        assert torch.equal(stream(2_000, first=first + begin), whole[begin : begin + 2_000])


def test_many_small_tensors_are_served_in_groups():
    tensors = [torch.zeros(2**13) for _ in range(40)]
    ones = torch.ones(40)
    scale_and_add_gaussians_(tensors, ones, ones, 1, 2, range(40))
    for index, tensor in enumerate(tensors):
        assert torch.equal(tensor, stream(2**13, key_of(1, 2, index)))
