"""Gaussian numbers by a compiled kernel: a hash of (seed, pair) and the Box-Muller transform in one loop.

The numbers differ from those of torch's generators. Logarithm, cosine and sine are short polynomials, whose rounding
depends on processor and compiler, so that numbers differ between machines by a few units in the last place.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from balanceopt._deferred import sent
from balanceopt._random import mixed_in
from balanceopt._torch import inductor_options

_BITS = 2.0**-32
# Shifts and factors of the hash, round by round, and an odd factor between the words of radius and angle.
_SHIFTS = (17, 11, 15, 14)
_FACTORS = (0xED5AD4BB - 2**32, 0xAC4C1B51 - 2**32, 0x31848BAB)
_GOLDEN = 0x9E3779B1 - 2**32
# Least squares on Chebyshev nodes: sin(x) / x and cos(x) in x^2, for |x| <= pi / 2, to 4e-9 and 2e-10;
# -2 log(1 + x) / x for 1 + x from sqrt(1/2) to sqrt(2), to 2e-7.
_SINE = (0.99999999571, -0.16666657968, 0.00833305058, -0.000198090432, 2.60515895e-6)
_COSINE = (0.99999999978, -0.49999999357, 0.04166663620, -0.00138883608, 2.476013213e-5, -2.60510154e-7)
_LOGARITHM = (
    *(-1.99999989, 1.00000726, -0.666702283, 0.499401434),
    *(-0.397971301, 0.344940266, -0.324683796, 0.202681135),
)
# Bits of the float32 numbers 1 and sqrt(1/2), and the mask of the fraction's bits.
_ONE, _ROOT, _FRACTION = 0x3F800000, 0x3F3504F3, 0x7FFFFF
# A large size, because the compiler decides by the first size whether threads share the loop.
_WARM_UP_SIZE = 2**18
# Options of the compiler, where this torch has them, for one loop without buffers and for fused multiply-add.
_OPTIONS: dict[str, int | str] = {
    "realize_opcount_threshold": 1000,
    "realize_reads_threshold": 1000,
    "cpp.enable_floating_point_contract_flag": "fast",
    # Off, because the cache's key lacks the vector instructions: a graph cached under others does not compile.
    "fx_graph_cache": False,
}


def takes(target: Tensor) -> bool:
    """Whether `scale_and_add_` works on `target` in place."""
    return target.dtype == torch.float32 and target.is_contiguous() and target.numel() % 2 == 0


@torch.no_grad()
def scale_and_add_(flat: Tensor, factor: Tensor, scale: Tensor, seed: int) -> None:
    """Set `flat` to `factor * flat + scale * z` in place, with the Gaussian numbers z of a stream.

    Args:
        flat: float32 vector with an even number of elements; each half gets one number of each pair.
        factor: 0-d factor of `flat`.
        scale: 0-d standard deviation of the noise.
        seed: 64-bit seed of the stream.
    """
    words = (seed, seed >> 32, mixed_in(seed, 0))
    signed = [(word & 0xFFFFFFFF) - ((word & 0x80000000) << 1) for word in words]
    key = sent(torch.tensor(signed, dtype=torch.int32, device="cpu"), flat.device)
    # Passed as unrelated tensors, because compiled code copies views of one tensor before it changes them.
    halves = [from_dlpack(half) for half in flat.detach().view(2, -1).unbind()]
    _kernel()(*halves, factor, scale, key)


def warm_up(device: torch.device) -> None:
    """Compile the kernel for a device.

    Raises:
        RuntimeError: if the kernel can't be compiled on this machine.
    """
    factor, scale = (torch.ones((), dtype=torch.float32, device=device) for _ in range(2))
    try:
        with warnings.catch_warnings():  # of torch, about torch
            warnings.simplefilter("ignore")
            scale_and_add_(torch.zeros(_WARM_UP_SIZE, dtype=torch.float32, device=device), factor, scale, 0)
    except Exception as error:  # a missing compiler raises differently on each platform
        raise RuntimeError(
            f"noise='compiled' could not be compiled for {device.type}: the error above says why. It needs what "
            "torch.compile needs, a C++ compiler (CPU) or Triton (CUDA). noise=True needs neither, and is slower."
        ) from error


@lru_cache(maxsize=1)
def _kernel() -> Callable[..., Any]:
    known = inductor_options()
    options: dict[str, Any] = {
        name: value
        for name, value in _OPTIONS.items()
        if name in known and (known[name] is None or type(known[name]) is type(value))
    }
    return torch.compile(_scale_and_add, fullgraph=True, dynamic=True, options=options)


def _scale_and_add(first: Tensor, second: Tensor, factor: Tensor, scale: Tensor, key: Tensor) -> None:
    pairs = torch.arange(first.numel(), dtype=torch.int32, device=first.device)
    for half, z in zip((first, second), _normal(pairs, *key.unbind()), strict=True):
        half.mul_(factor).add_(z * scale)


def _normal(pairs: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Return both Gaussian numbers of each pair: three rounds of the hash give the radius, a fourth the angle."""
    word = _mix(pairs ^ a, _SHIFTS[0]) * _FACTORS[0]
    word = (_mix(word, _SHIFTS[1]) + b) * _FACTORS[1]
    word = _mix(_mix(word, _SHIFTS[2]) * _FACTORS[2], _SHIFTS[3])
    half = (_mix(word * _GOLDEN, _SHIFTS[2]) + c).to(torch.float32) * (math.pi * _BITS)
    # The lower 31 bits plus half of the last one, so that the number is above 0 and at most 1.
    uniform = (word & 0x7FFFFFFF).to(torch.float32) * (2 * _BITS) + _BITS
    radius = _minus_twice_logarithm(uniform).sqrt()
    # Polynomials of half the angle, because this needs no range reduction; then doubled.
    square = half * half
    cosine, sine = _polynomial(_COSINE, square), _polynomial(_SINE, square) * half
    return (1 - 2 * sine * sine) * radius, 2 * sine * cosine * radius


def _minus_twice_logarithm(x: Tensor) -> Tensor:
    """Return `-2 log(x)`, with x split by its bits into a power of two and a number around 1."""
    bits = x.view(torch.int32) + (_ONE - _ROOT)
    exponent = ((bits >> 23) - (_ONE >> 23)).to(torch.float32)
    beyond_one = ((bits & _FRACTION) + _ROOT).view(torch.float32) - 1
    return exponent * (-2 * math.log(2)) + _polynomial(_LOGARITHM, beyond_one) * beyond_one


def _polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    *others, last = coefficients
    value = torch.full_like(x, last)
    for coefficient in reversed(others):
        value = value * x + coefficient
    return value


def _mix(word: Tensor, shift: int) -> Tensor:
    return word ^ (
        (word >> shift) & ((1 << (32 - shift)) - 1)
    )  # torch's shift copies the sign bit, which a hash needs cleared
