"""What AMSS and AMSS+ promise for any gradient: unbiasedness and its variance, numbers of units, SGD elsewhere."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import balanceopt as bo
from balanceopt.functional import (
    inclusion_probabilities,
    keep_ratio,
    kept_units,
    systematic_sample_padded,
    unit_importance,
)
from balanceopt.modulation import MaskUnits, Slot
from balanceopt.modulation._masks import Masks, Part
from tests.masking import Encoders, factors, fill_gradients, mask, step_of, sums
from tests.masking import masked as build
from tests.training import bare, batches, grad_of, same_bits, sgd, train

TWO = (0.34, 0.08)
NAME = "encoders.audio.weight"
norms = st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=12)
part = st.floats(0.05, 0.95)


def net(n: int, rows: list[float] | None = None) -> Encoders:
    torch.manual_seed(0)
    model = Encoders(audio=nn.Linear(4, n), visual=nn.Linear(4, 2))
    fill_gradients(model)
    if rows is not None:
        with torch.no_grad():
            gradient = model.get_parameter(NAME).grad
            assert gradient is not None
            gradient.copy_(torch.nn.functional.normalize(gradient) * torch.tensor(rows)[:, None])
    return model


def drawn(model: Encoders, count: int, **options: Any) -> Tensor:
    """Weights `(count, n)` of the audio encoder's units: as if it were as many parameters with the same gradient."""
    modulation = bo.AMSS(**options)
    step = step_of(model, sums(*TWO))
    p = model.get_parameter(NAME)
    units = MaskUnits().on(p.shape)
    parts = [Part(Slot(index, p), 0, units) for index in range(count)]
    importances = [unit_importance(grad_of(p))] * count
    ratio, _ = modulation.ratios(step)
    weights, _ = Masks(parts).draw(importances, ratio, ratio > 0, modulation.scale, 5, 0)
    return torch.stack(weights).double()


# -- unbiasedness -----------------------------------------------------------------------------------------------


@given(norms, part, st.randoms(use_true_random=False))
def test_the_mean_weight_is_one_exactly(importance, ratio, random):
    """Over the random start the mask is constant between breakpoints: the mean is a finite sum, for every order."""
    s = torch.tensor(importance, dtype=torch.float64)
    pi = inclusion_probabilities(s, ratio * len(importance))
    order = torch.tensor([random.random() for _ in importance], dtype=torch.float64)
    lengths = torch.where(pi < 1, pi, 0)[order.argsort()]
    breaks = torch.cat([torch.tensor([0.0, 1.0]), lengths.cumsum(0) % 1]).sort().values
    widths, middles = breaks.diff(), (breaks[1:] + breaks[:-1]) / 2
    taken = systematic_sample_padded(
        pi.expand(len(middles), -1), middles, order.expand(len(middles), -1).contiguous()
    )
    mean = (widths[:, None] * taken / pi).sum(0)
    torch.testing.assert_close(mean, torch.ones_like(mean), rtol=0, atol=2e-4)  # 1e-5 of rounding over 0.05


DRAWS = 4000
# Of the (at most 40) means below none is more than this many standard errors off, but once in 40,000 such tests.
ERRORS = 5.0


@pytest.mark.parametrize("ratio", [0.1, 0.37, 0.8])
def test_the_masked_gradient_has_the_mean_and_the_variance_of_the_formula(ratio):
    rows = torch.logspace(-0.5, 0.5, 40).tolist()  # of the least probable units some draws must have a few
    model = net(40, rows)
    found = drawn(model, DRAWS, scale="unbiased", clamp=(ratio, ratio))
    g2 = torch.tensor(rows, dtype=torch.float64).square()
    pi = inclusion_probabilities(g2.sqrt(), 40 * ratio)
    error = (found.mean(0) - 1).abs()
    assert bool((error <= ERRORS * ((1 / pi - 1) / DRAWS).sqrt() + 1e-6).all())

    squared = ((found - 1).square() * g2).sum(1)  # ||masked g - g||^2
    expected = float((g2 * (1 / pi - 1)).sum())
    spread = float(squared.std()) / math.sqrt(DRAWS)
    assert abs(float(squared.mean()) - expected) <= ERRORS * spread + 1e-4 * expected


def test_without_weights_units_of_small_gradient_get_less():
    plain = drawn(net(40, torch.logspace(-2, 1, 40).tolist()), DRAWS, scale="none", clamp=(0.3, 0.3)).mean(0)
    assert float(plain.max()) <= 1
    assert float(plain[:20].max()) < 0.5  # the units of small gradients are hardly ever there


def test_the_published_weight_is_not_unbiased():
    mean = drawn(net(64, [1.0] * 64), 1000, scale="official", clamp=(0.5, 0.5)).mean()
    assert float(mean) == pytest.approx(0.5 * 64 / 2, rel=0.01)  # r n / 2


@given(norms, part)
def test_the_norm_has_the_least_variance(values, ratio):
    g2 = torch.tensor(values, dtype=torch.float64).square()

    def error(s: Tensor) -> float:
        return float((g2 * (1 / inclusion_probabilities(s, ratio * len(values)) - 1)).sum())

    best = error(g2.sqrt())
    assert best <= error(torch.ones_like(g2)) * (1 + 1e-9)
    assert best <= error(g2) * (1 + 1e-9)


@given(norms, part)
def test_without_caps_the_square_is_no_better_than_uniform_sampling(values, ratio):
    g2 = torch.tensor(values, dtype=torch.float64).square()
    pi = inclusion_probabilities(g2, ratio * len(values))
    if float(pi.max()) < 1:
        error = float((g2 * (1 / pi - 1)).sum())
        assert error == pytest.approx(float(g2.sum()) * (1 / ratio - 1), rel=1e-6)


# -- numbers of units ----------------------------------------------------------------------------------------------


@given(st.integers(1, 40), part, st.sampled_from(["none", "official"]), st.integers(0, 99))
def test_as_many_units_as_the_ratio_stands_for(n, ratio, scale, number):
    found = mask(bo.AMSS(scale=scale, clamp=(ratio, ratio)), net(n), *TWO, number=number)[NAME]
    rows = (found != 0).all(1)
    assert torch.equal(rows, (found != 0).any(1))
    assert int(rows.sum()) == int(kept_units(n, torch.tensor(ratio)))


@given(st.integers(1, 40), part, st.integers(0, 99))
def test_the_unbiased_mask_has_the_budget_rounded_up_or_down(n, ratio, number):
    found = mask(bo.AMSS(scale="unbiased", clamp=(ratio, ratio)), net(n), *TWO, number=number)
    count = int((found[NAME] != 0).all(1).sum())
    assert math.floor(n * ratio - 1e-4) <= count <= math.ceil(n * ratio + 1e-4)


# -- symmetries ----------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=5), st.randoms(use_true_random=False))
def test_modalities_may_come_in_any_order(values, random):
    order = list(range(len(values)))
    random.shuffle(order)
    u = torch.tensor(values)
    torch.testing.assert_close(keep_ratio(u)[order], keep_ratio(u[order]))
    left_out = torch.cat([u, torch.tensor([math.nan])])
    here = torch.tensor([True] * len(values) + [False])
    torch.testing.assert_close(keep_ratio(left_out, present=here)[:-1], keep_ratio(u))


@given(st.integers(-20, 20), st.sampled_from(["none", "unbiased", "official"]))
def test_masks_do_not_depend_on_the_scale_of_the_loss(exponent, scale):
    found = []
    for power in (0, exponent):
        model = net(20)
        for p in model.parameters():
            assert p.grad is not None
            p.grad.mul_(2.0**power)
        before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        bo.AMSS(scale=scale).modulate(step_of(model, sums(*TWO)))
        found.append(factors(model, before)[NAME])
    assert torch.equal(*found)


# -- SGD where no mask acts ----------------------------------------------------------------------------------------


@st.composite
def sgd_options(draw_from: Any) -> dict[str, Any]:
    momentum = draw_from(st.sampled_from([0.0, 0.5, 0.9]))
    nesterov = momentum > 0 and draw_from(st.booleans())
    kernel = draw_from(st.sampled_from([{}, {"foreach": True}, {"foreach": False}, {"fused": True}]))
    return {
        "lr": draw_from(st.floats(1e-4, 0.2)),
        "momentum": momentum,
        "dampening": 0.0 if nesterov else draw_from(st.sampled_from([0.0, 0.3])),
        "weight_decay": draw_from(st.sampled_from([0.0, 0.01])),
        "nesterov": nesterov,
        "maximize": draw_from(st.booleans()),
        **kernel,
    }


@given(sgd_options(), st.sampled_from(["none", "unbiased"]))
def test_with_every_unit_kept_it_is_sgd_bit_for_bit(options, scale):
    model, optimizer = build(scale=scale, clamp=(1, 1), offset=100, **options)
    twin, plain = bare(lambda groups: sgd(groups, **options))
    train(model, optimizer, batches(model, 3))
    train(twin, plain, batches(twin, 3))
    assert same_bits(model, twin)
