"""Sampling of the units that a mask keeps, and their inclusion probabilities.

Each rule has a function for the units of one tensor, and a function `..._padded` for many tensors at once, which
training calls: one row per tensor, padded with zeros, without a Python loop or a device synchronisation. The first
function calls the second with one row, so both give the same masks from the same uniform numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from balanceopt._options import check_count, check_generator, check_number, check_tensor

# Log importance of a unit of importance 0: below every float64 logarithm, so that such a unit comes last, yet
# finite, so that such units are still drawn at random among themselves.
_LOG_OF_NOTHING = -1e4

# Distance from an integer up to which a sum of probabilities counts as that integer.
_INTEGER_SUM_TOLERANCE = 1e-5


def _check_non_negative(name: str, values: Tensor) -> None:
    check_tensor(name, values, "(n,)", dims=(1,))
    if not bool((torch.isfinite(values) & (values >= 0)).all()):
        raise ValueError(f"`{name}` should be finite and non-negative. Found {values}.")


def uniforms_like(values: Tensor, shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
    """Draw float64 numbers in [0, 1) on the generator's device, and move them to the device of `values`."""
    check_generator(generator)
    source = values.device if generator is None else generator.device
    return torch.rand(shape, generator=generator, dtype=torch.float64, device=source).to(values.device)


@torch.no_grad()
def sample_units(importance: Tensor, k: int, generator: torch.Generator | None = None) -> Tensor:
    r"""Draw k units without replacement, each draw proportional to the importance of the remaining units.

    An exponential race: unit j finishes at $-\log(1 - U_j) / s_j$ with $U_j$ uniform, and the first k win.
    The order of arrival is that of successive draws with probability $s_j / \sum s$ of the units left.

    Args:
        importance: `(n,)`, non-negative and finite, of any scale and dtype.
        k: number of units; n are drawn when it is larger.
        generator: random generator, on any device, of one draw of n float64 uniform numbers; None for torch's
            default one. The mask depends on the generator's device, not on that of `importance`.

    Returns:
        bool `(n,)` with exactly min(k, n) units; units of importance 0 come last, at random.

    Raises:
        ValueError: if `importance` is not a vector, is negative or not finite somewhere, or `k` is not a whole
            number of at least 0.
        TypeError: if `importance` is not a tensor, or `generator` not a `torch.Generator`.

    Example:
        >>> sample_units(torch.tensor([0.0, 1.0, 0.0, 5.0]), 2)
        tensor([False,  True, False,  True])

    Reference:
        AMSS, adaptive mask subnetworks considering modal significance: the authors' published code
        (`torch.multinomial` without replacement); the race is that of Efraimidis and Spirakis, Weighted random
        sampling with a reservoir, 2006.
    """
    _check_non_negative("importance", importance)
    check_count("k", k)
    n, device = importance.numel(), importance.device
    uniforms = uniforms_like(importance, (n,), generator)
    size = torch.full((1,), n, dtype=torch.int64, device=device)
    count = torch.full((1,), min(k, n), dtype=torch.int64, device=device)
    return sample_units_padded(importance[None], size, count, uniforms[None])[0]


@torch.no_grad()
def sample_units_padded(importance: Tensor, sizes: Tensor, k: Tensor, uniforms: Tensor) -> Tensor:
    """Draw units of U tensors as `sample_units` does, with one sort.

    Args:
        importance: `(U, n_max)`, row u holds `sizes[u]` units, then padding of any value.
        sizes: `(U,)`, number of units in each row, integers.
        k: `(U,)`, number of units to draw in each row, integers.
        uniforms: `(U, n_max)`, float64 in [0, 1), one number per unit, in the units' order.

    Returns:
        bool `(U, n_max)`, min(k, size) units in each row, none in the padding. A row with negative or
        non-finite importance still gets a mask of that size, which the caller should ignore.

    Raises:
        ValueError: if an argument has another shape or dtype.
        TypeError: if an argument is not a tensor.

    Example:
        >>> importance = torch.tensor([[0.0, 1.0, 5.0], [2.0, 0.0, 0.0]])
        >>> uniforms = torch.rand(2, 3, dtype=torch.float64)
        >>> sample_units_padded(importance, torch.tensor([3, 1]), torch.tensor([2, 2]), uniforms)
        tensor([[False,  True,  True],
                [ True, False, False]])

    Reference:
        As `sample_units`.
    """
    _check_rows("importance", importance, sizes=sizes, k=k)
    _check_same_shape("uniforms", uniforms, importance)
    positions = torch.arange(importance.shape[1], dtype=torch.int64, device=importance.device)
    log_importance = torch.where(importance > 0, importance.double().log(), _LOG_OF_NOTHING)
    # A uniform number of 0 would win whatever the importance, so times are clamped to near the least other one.
    times = (-torch.log1p(-uniforms.double())).clamp_min(2.0**-54).log() - log_importance
    times = torch.where(positions < sizes[:, None], times, math.inf)
    order = times.sort(dim=1, stable=True).indices
    winners = positions < torch.minimum(k, sizes)[:, None]
    return torch.zeros_like(winners).scatter(1, order, winners)


@torch.no_grad()
def inclusion_probabilities(importance: Tensor, budget: float) -> Tensor:
    r"""Compute inclusion probabilities proportional to importance, capped at 1, that sum to a budget.

    $$\pi_j = \min(1, c s_j), \quad \textstyle\sum_j \pi_j = b$$

    With `n * ratio` for the budget and the root of `unit_importance` for the importance, keeping unit j with
    probability $\pi_j$ and weight $1 / \pi_j$ is the unbiased subnetwork of least variance.

    Args:
        importance: `(n,)`, non-negative and finite.
        budget: expected number of units b >= 0. From the number of non-zero importances on, every such unit
            gets probability 1.

    Returns:
        `(n,)`, in the dtype of `importance` (computed in float64); 0 where the importance is 0.

    Raises:
        ValueError: if `importance` is not a vector, is negative or not finite somewhere, or `budget` is
            negative or not finite.
        TypeError: if `importance` is not a tensor.

    Example:
        >>> inclusion_probabilities(torch.tensor([6.0, 1.0, 1.0, 0.0]), 2.0)
        tensor([1.0000, 0.5000, 0.5000, 0.0000])

    Reference:
        Horvitz and Thompson, A generalization of sampling without replacement from a finite universe, 1952.
    """
    _check_non_negative("importance", importance)
    check_number("budget", budget, at_least=0)
    row_budget = torch.full((1,), float(budget), dtype=torch.float64, device=importance.device)
    probabilities = inclusion_probabilities_padded(importance[None], row_budget)[0]
    return probabilities.to(importance.dtype) if importance.is_floating_point() else probabilities.float()


@torch.no_grad()
def inclusion_probabilities_padded(importance: Tensor, budget: Tensor) -> Tensor:
    """Compute `inclusion_probabilities` of the units of U tensors, with one sort.

    Args:
        importance: `(U, n_max)`, non-negative and finite, padded with zeros.
        budget: `(U,)`, expected number of units in each row, >= 0.

    Returns:
        float64 `(U, n_max)`, 0 in the padding. Rows with negative or non-finite importance are meaningless.

    Raises:
        ValueError: if an argument has another shape or dtype.
        TypeError: if an argument is not a tensor.

    Example:
        >>> importance = torch.tensor([[6.0, 1.0, 1.0], [3.0, 1.0, 0.0]])
        >>> inclusion_probabilities_padded(importance, torch.tensor([2.0, 1.0]))
        tensor([[1.0000, 0.5000, 0.5000],
                [0.7500, 0.2500, 0.0000]], dtype=torch.float64)

    Reference:
        As `inclusion_probabilities`.
    """
    _check_rows("importance", importance, budget=budget)
    s = importance.double()
    if s.shape[1] == 0:
        return s
    b = budget.double()[:, None]
    # Normalised so that sums stay finite at any scale; the clamp avoids a division by 0 in an all-zero row.
    s = s / s.amax(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    ranked, order = s.sort(dim=1, descending=True, stable=True)
    positions = torch.arange(s.shape[1], dtype=torch.int64, device=s.device)
    # With the a largest capped, c = (b - a) / (sum of the others); unit a + 1 is capped too while c s >= 1.
    # Once false the condition stays false, so the capped units are a prefix.
    tails = _suffix_sums(ranked)
    capped = (((b - positions) * ranked >= tails) & (ranked > 0)).int().cummin(dim=1).values.bool()
    count = capped.sum(1, keepdim=True)
    rest = torch.cat([tails, tails.new_zeros(len(tails), 1)], 1).gather(1, count)
    scale = torch.where(rest > 0, (b - count) / rest, 0.0)
    shares = torch.where(capped, 1.0, (ranked * scale).clamp(0, 1))
    shares = torch.zeros_like(s).scatter(1, order, shares)
    positive = importance > 0
    return torch.where(b >= positive.sum(1, keepdim=True), positive.double(), shares)


def _suffix_sums(values: Tensor) -> Tensor:
    """Sum from each column to the last by doubling, so that a row's sums do not depend on the padding.

    The order of addition of `cumsum` depends on the device and the length, and a GPU refuses `cumsum` under
    `torch.use_deterministic_algorithms`.
    """
    sums, step = values, 1
    while step < values.shape[1]:
        sums = sums + torch.nn.functional.pad(sums[:, step:], (0, step))
        step *= 2
    return sums


@torch.no_grad()
def systematic_sample(probabilities: Tensor, generator: torch.Generator | None = None) -> Tensor:
    r"""Draw a fixed number of units with exactly the given inclusion probabilities.

    The units stand in random order on a line, unit j taking the length $\pi_j$; those that hold one of the
    points $u, u + 1, u + 2, \dots$ are taken, with one uniform $u$.

    Args:
        probabilities: `(n,)`, finite, at least 0; a unit with 1 or more is always taken, one with 0 never.
        generator: random generator of one draw of n + 1 float64 uniform numbers; None for torch's default one.

    Returns:
        bool `(n,)`. The number of units is the sum of the probabilities rounded down or up, and exactly that
        sum where the sum is an integer within 1e-5.

    Raises:
        ValueError: if `probabilities` is not a vector, or is negative or not finite somewhere.
        TypeError: if `probabilities` is not a tensor, or `generator` not a `torch.Generator`.

    Example:
        >>> int(systematic_sample(torch.tensor([1.0, 0.25, 0.25, 0.5])).sum())
        2

    Reference:
        Madow, On the theory of systematic sampling II, 1949, on a random order of the units.
    """
    _check_non_negative("probabilities", probabilities)
    draws = uniforms_like(probabilities, (probabilities.numel() + 1,), generator)
    return systematic_sample_padded(probabilities[None], draws[:1], draws[None, 1:])[0]


@torch.no_grad()
def systematic_sample_padded(probabilities: Tensor, start: Tensor, uniforms: Tensor) -> Tensor:
    """Draw a `systematic_sample` of the units of each of U tensors, with one sort.

    Args:
        probabilities: `(U, n_max)`, finite, at least 0, padded with zeros.
        start: `(U,)`, float64 uniform numbers in [0, 1), which set the points on the line.
        uniforms: `(U, n_max)`, float64 uniform numbers in [0, 1), which set the order of the units.

    Returns:
        bool `(U, n_max)`, False in the padding.

    Raises:
        ValueError: if an argument has another shape or dtype.
        TypeError: if an argument is not a tensor.

    Example:
        >>> probabilities = torch.tensor([[1.0, 0.5, 0.5], [0.25, 0.75, 0.0]])
        >>> start, uniforms = torch.rand(2, dtype=torch.float64), torch.rand(2, 3, dtype=torch.float64)
        >>> systematic_sample_padded(probabilities, start, uniforms).sum(1)
        tensor([2, 1])

    Reference:
        As `systematic_sample`.
    """
    _check_rows("probabilities", probabilities, start=start)
    _check_same_shape("uniforms", uniforms, probabilities)
    certain = probabilities >= 1
    # On a line of 2^bits steps per unit every sum is exact, hence equal on each device and with any padding.
    bits = min(40, 61 - probabilities.shape[1].bit_length())
    one = 2**bits
    lengths = torch.where(certain, 0.0, probabilities.double()).mul(one).round().long()
    order = uniforms.sort(dim=1, stable=True).indices
    ends = lengths.gather(1, order).cumsum(1)
    total = lengths.sum(1, keepdim=True)
    # Where the total is almost an integer, starts are limited to a part of (0, 1] that gives that many points.
    excess = (total + one // 2) % one - one // 2
    excess = torch.where(excess.abs() <= round(_INTEGER_SUM_TOLERANCE * one), excess, 0)
    room = one - excess.abs()
    first = excess.clamp_min(0) + (start.double()[:, None] * room).long().clamp(max=room - 1)
    # Counts the points first, first + one, ... below each end.
    points = (ends - first + one - 1).div(one, rounding_mode="floor")
    before = torch.nn.functional.pad(points[:, :-1], (1, 0))
    return certain | torch.zeros_like(certain).scatter(1, order, points > before)


def _check_rows(name: str, values: Tensor, **by_row: Tensor) -> None:
    """Check a real matrix, and vectors with one number for each row of the matrix."""
    check_tensor(name, values, "(U, n_max)", dims=(2,))
    for other, numbers in by_row.items():
        check_tensor(other, numbers, f"({len(values)},)", dims=(1,))
        if len(numbers) != len(values):
            raise ValueError(
                f"`{other}` should have one entry for each of the {len(values)} rows of `{name}`. Found {len(numbers)}."
            )


def _check_same_shape(name: str, values: Tensor, like: Tensor) -> None:
    check_tensor(name, values, "(U, n_max)", dims=(2,))
    if values.shape != like.shape:
        raise ValueError(f"`{name}` should have shape {tuple(like.shape)}. Found {tuple(values.shape)}.")
