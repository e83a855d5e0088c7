"""AMSS at work: which gradients are masked, and by what."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import balanceopt as bo
from balanceopt.modulation import _amss, _masks
from tests.masking import Encoders, factors, fill_gradients, kept, mask, step_of, sums
from tests.training import backward, batch, bits, grad_of, modulated

INF, NAN = float("inf"), float("nan")
# Keep ratios 0.2142 and 0.7858 at temperature 0.2.
TWO = (0.34, 0.08)
WEIGHT = "encoders.{}.weight"


def two(n: int = 50, **options) -> Encoders:
    torch.manual_seed(0)
    return Encoders(audio=nn.Linear(3, n, **options), visual=nn.Linear(3, n, **options))


def counts(found: dict[str, Tensor]) -> list[int]:
    return [kept(found[WEIGHT.format(name)]) for name in ("audio", "visual")]


def test_the_dominant_modality_keeps_fewer_units():
    assert counts(mask(bo.AMSS(), two(), *TWO)) == [math.ceil(50 * 0.2142), math.ceil(50 * 0.7858)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"temperature": 0.4}, [18, 33]),  # 1 / (1 + exp(0.65)) = 0.343
        ({"clamp": (0.3, 0.6)}, [15, 30]),
        ({"clamp": (0.0, 0.0)}, [1, 1]),
        ({"clamp": (1.0, 1.0)}, [50, 50]),
        ({"offset": -1.0}, [25, 25]),  # no significance is positive
    ],
)
def test_options_of_the_ratio(options, expected):
    assert counts(mask(bo.AMSS(**options), two(), *TWO)) == expected


def test_without_information_every_modality_keeps_the_balanced_part():
    net = Encoders(a=nn.Linear(2, 30), b=nn.Linear(2, 30), c=nn.Linear(2, 30))
    found = mask(bo.AMSS(), net, 0.3, -0.1, 0.2)
    assert [kept(found[WEIGHT.format(name)]) for name in "abc"] == [20, 20, 20]


def test_norms_biases_and_the_head_are_left_alone():
    encoder = nn.Sequential(nn.Linear(3, 9), nn.LayerNorm((3, 3)), nn.BatchNorm1d(9))
    net = Encoders(audio=encoder, visual=nn.Linear(3, 9))
    found = mask(bo.AMSS(), net, *TWO)
    masked = {name for name, factor in found.items() if not bool((factor == 1).all())}
    assert masked == {"encoders.audio.0.weight", "encoders.visual.weight"}


def test_kept_units_keep_their_gradient_bit_for_bit():
    net = two()
    before = fill_gradients(net)
    bo.AMSS().modulate(step_of(net, sums(*TWO)))
    for name, p in net.named_parameters():
        same = (grad_of(p) == before[name]).flatten(1).all(1) if p.dim() > 1 else torch.tensor(True)
        assert torch.equal(bits(grad_of(p)[same]), bits(before[name][same]))


def test_attention_is_masked_by_heads():
    net = Encoders(audio=nn.MultiheadAttention(8, 4), visual=nn.Linear(2, 2))
    found = mask(bo.AMSS(clamp=(0.5, 0.5)), net, *TWO)
    packed = found["encoders.audio.in_proj_weight"].unflatten(0, (3, 4, 2))
    assert kept(packed, dim=1) == 2
    assert kept(found["encoders.audio.out_proj.weight"].unflatten(1, (4, 2)), dim=1) == 2


def test_the_official_weight():
    net = two(20)
    before = fill_gradients(net)
    bo.AMSS(scale="official").modulate(step_of(net, sums(*TWO)))
    factor = factors(net, before)[WEIGHT.format("visual")][:, 0]
    squares = before[WEIGHT.format("visual")].square().sum(1)
    expected = 1 / (squares / squares.sum() + 1 / 20)
    torch.testing.assert_close(factor[factor > 0], expected[factor > 0])


def test_unbiased_weights_are_one_where_all_units_are_certain():
    found = mask(bo.AMSS(scale="unbiased", clamp=(1, 1)), two(), *TWO)
    assert all(bool((factor == 1).all()) for factor in found.values())


def test_masks_are_a_function_of_seed_step_and_parameter():
    def drawn(**options):
        return mask(bo.AMSS(clamp=(0.5, 0.5)), two(), *TWO, **options)

    one, again = drawn(seed=1, number=3), drawn(seed=1, number=3)
    assert all(torch.equal(one[name], again[name]) for name in one)
    name = WEIGHT.format("audio")
    assert not torch.equal(one[name], drawn(seed=2, number=3)[name])
    assert not torch.equal(one[name], drawn(seed=1, number=4)[name])
    assert not torch.equal(one[name], one[WEIGHT.format("visual")])


def test_the_global_random_stream_is_left_alone():
    net, modulation = two(), bo.AMSS(scale="unbiased")
    before = torch.get_rng_state()
    mask(modulation, net, *TWO)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_measured_in_float32(dtype):
    net = two().to(dtype)
    fill_gradients(net)
    for p in net.parameters():
        grad_of(p).mul_(2e-4)  # squares underflow in float16
    before = {name: grad_of(p).clone() for name, p in net.named_parameters()}
    bo.AMSS().modulate(step_of(net, sums(*TWO)))
    found = {name: grad_of(p) != 0 for name, p in net.named_parameters()}
    for name in ("audio", "visual"):
        own = (before[WEIGHT.format(name)] != 0).any(1)
        assert int(own.sum()) > 40
    assert int(found[WEIGHT.format("audio")].any(1).sum()) == 11


def test_the_way_of_an_accelerator_waits_for_nothing_and_gives_the_same(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the device was waited for")

    for modulation in (
        bo.AMSS(),
        bo.AMSS(scale="unbiased"),
        bo.AMSS(scale="official"),
    ):
        net = two()
        here = mask(modulation, net, *TWO)
        before = fill_gradients(net)
        step = step_of(net, sums(*TWO))
        with monkeypatch.context() as patch:
            patch.setattr(_amss, "on_host", lambda tensor: None)
            patch.setattr(_masks, "on_host", lambda tensor: None)
            for name in ("item", "tolist", "nonzero", "cpu", "numpy", "__bool__", "__float__", "__int__"):
                patch.setattr(Tensor, name, refuse)
            modulation.modulate(step)
        there = factors(net, before)
        assert all(torch.equal(here[name], there[name]) for name in here)


def test_it_can_be_copied_and_pickled_after_steps():
    modulation, net = bo.AMSS(), two()
    first = mask(modulation, net, *TWO)
    for again in (copy.deepcopy(modulation), pickle.loads(pickle.dumps(modulation))):
        assert repr(again) == repr(modulation)
        second = mask(again, two(), *TWO)
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "`temperature` should be a finite number above 0. Found temperature = 0"),
        ({"clamp": (0.5, 0.2)}, "`clamp` should be a pair"),
        (
            {"scale": "ht"},
            r"`scale` should be one of \('none', 'unbiased', 'official'\). Found scale = 'ht'",
        ),
        ({"offset": NAN}, "`offset` should be a finite number. Found offset = nan"),
        ({"min_ndim": -1}, "`min_ndim` should be a whole number of at least 0"),
        ({"start": 3, "end": 2}, "`end` should not be less than `start`"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        bo.AMSS(**options)


def test_repr_shows_the_options_and_not_the_whole_rule():
    shown = repr(bo.AMSS(0.5, scale="unbiased", units={nn.Linear: "whole"}))
    assert shown.startswith("AMSS(temperature=0.5, scale='unbiased', clamp=")
    assert "units='...'" in shown


def test_it_needs_the_monitor():
    net = two()
    fill_gradients(net)
    step = step_of(net, sums(*TWO))
    with pytest.raises(ValueError, match="needs the step's monitor"):
        bo.AMSS().modulate(type(step)(**{**vars(step), "monitor": None}))


def test_functional_linear_layers_are_masked_by_rows():
    class Bare(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(outputs, inputs))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.matrix)

    model, optimizer = modulated(bo.AMSS(clamp=(0.5, 0.5)), encoder=Bare)
    backward(model, batch(0, model))
    optimizer.step()
    assert [kept(grad_of(e.get_parameter("matrix"))) for e in model.modalities.values()] == [2, 2]
