"""What must hold of modality dropout for any rates: nobody loses all, the rates, the limits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from balanceopt.functional import kept_but_one, kept_modalities

rates = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=5)
seeds = st.integers(0, 2**32)
MANY = 20_000


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(rates, st.integers(0, 20), seeds)
def test_nobody_loses_all_and_nothing_else_is_touched(p: list[float], samples: int, seed: int):
    given_rates = torch.tensor(p)
    state = torch.get_rng_state()
    kept = kept_modalities(given_rates, samples, generator(seed))
    assert kept.shape == (len(p), samples)
    assert bool(kept.any(0).all())
    assert bool(kept[given_rates == 0].all())
    assert torch.equal(given_rates, torch.tensor(p))
    assert torch.equal(torch.get_rng_state(), state)


@given(st.integers(1, 5), st.integers(0, 20), seeds, st.randoms())
def test_with_equal_chances_at_most_one_is_lost_and_never_the_only_one(
    modalities: int, samples: int, seed: int, random: object
):
    flags = [[random.random() < 0.5 for _ in range(samples)] for _ in range(modalities)]  # type: ignore[attr-defined]
    present = torch.tensor(flags, dtype=torch.bool).view(modalities, samples)
    lost = ~kept_but_one(modalities, samples, generator(seed), present)
    assert bool((lost.sum(0) <= 1).all())
    assert not bool((lost & ~present).any())
    assert not bool(lost[:, present.sum(0) == 1].any())


def within(count: int, share: float) -> bool:
    """Six standard deviations of a binomial of MANY trials: one false alarm in 5e8."""
    return abs(count - MANY * share) <= 6 * (MANY * share * (1 - share)) ** 0.5


def test_rates_are_those_asked_for():
    lost = ~kept_modalities(torch.tensor([0.3, 0.0]), MANY, generator(0))
    assert within(int(lost[0].sum()), 0.3)
    both = ~kept_modalities(torch.tensor([0.5, 0.5]), MANY, generator(0))
    # Lost alone, or one of the samples that would lose both and of which each modality is spared as often.
    assert all(within(int(row.sum()), 0.5 - 0.5**2 / 2) for row in both)


@pytest.mark.parametrize("modalities", [2, 3])
def test_each_case_of_equal_chances_comes_as_often(modalities: int):
    lost = ~kept_but_one(modalities, MANY, generator(0))
    cases = [*lost.sum(1).tolist(), int((~lost.any(0)).sum())]
    assert all(within(count, 1 / (modalities + 1)) for count in cases)
