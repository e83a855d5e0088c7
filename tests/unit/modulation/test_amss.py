"""AMSS at work: which gradients are masked, by what, and what is left alone."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import balanceopt as bo
from balanceopt.modulation import _amss, _parts
from tests.masking import Encoders, factors, fill_gradients, kept, mask, step_of, sums
from tests.models import Concat, MLPHead, SumHeads, watch
from tests.training import backward, batch, bits, grad_of, groups_of, modulated, sgd, small_model, train

INF, NAN = float("inf"), float("nan")
# Keep ratios 0.2142 and 0.7858 at temperature 0.2.
TWO = (0.34, 0.08)
WEIGHT = "encoders.{}.weight"


def two(n: int = 50, **options) -> Encoders:
    torch.manual_seed(0)
    return Encoders(audio=nn.Linear(3, n, **options), visual=nn.Linear(3, n, **options))


def counts(found: dict[str, Tensor]) -> list[int]:
    return [kept(found[WEIGHT.format(name)]) for name in ("audio", "visual")]


# -- the rule -----------------------------------------------------------------------------------------------------


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


def test_topk_keeps_the_most_important_units():
    net = two(4)
    before = fill_gradients(net)
    bo.AMSS(sampling="topk", clamp=(0.5, 0.5)).modulate(step_of(net, sums(*TWO)))
    norms = before[WEIGHT.format("audio")].norm(dim=1)
    chosen = factors(net, before)[WEIGHT.format("audio")][:, 0] == 1
    assert norms[chosen].min() > norms[~chosen].max()
    assert int(chosen.sum()) == 2


def test_uniform_sampling_does_not_look_at_the_gradients():
    found = []
    for seed in (1, 2):
        net = two()
        before = fill_gradients(net, seed)
        bo.AMSS(sampling="uniform").modulate(step_of(net, sums(*TWO)))
        found.append(factors(net, before)[WEIGHT.format("audio")])
    assert torch.equal(*found)


def test_the_official_weight():
    net = two(20)
    before = fill_gradients(net)
    bo.AMSS(scale="official").modulate(step_of(net, sums(*TWO)))
    factor = factors(net, before)[WEIGHT.format("visual")][:, 0]
    squares = before[WEIGHT.format("visual")].square().sum(1)
    expected = 1 / (squares / squares.sum() + 1 / 20)
    torch.testing.assert_close(factor[factor > 0], expected[factor > 0])


@pytest.mark.parametrize("scale", ["unbiased", "ratio", "official"])
def test_max_weight_caps(scale):
    free = mask(bo.AMSS(scale=scale), two(), *TWO)[WEIGHT.format("audio")]
    capped = mask(bo.AMSS(scale=scale, max_weight=1.5), two(), *TWO)[WEIGHT.format("audio")]
    r = 0.2142 if scale == "ratio" else 1
    torch.testing.assert_close(capped, free.clamp(max=1.5 * r), rtol=1e-3, atol=0)
    assert bool((free > 1.5 * r).any())


def test_unbiased_weights_are_one_where_all_units_are_certain():
    found = mask(bo.AMSS(scale="unbiased", clamp=(1, 1)), two(), *TWO)
    assert all(bool((factor == 1).all()) for factor in found.values())


# -- what can't be masked ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["none", "unbiased", "ratio", "official"])
def test_gradients_that_are_zero_or_not_finite_are_left_as_they_are(scale):
    net = Encoders(
        audio=nn.Sequential(nn.Linear(2, 9), nn.Linear(2, 9), nn.Linear(2, 9)), visual=nn.Linear(2, 9)
    )
    fill_gradients(net)
    grads = [grad_of(net.get_parameter(f"encoders.audio.{i}.weight")) for i in range(3)]
    grads[0].zero_()
    grads[1][4, 1] = NAN
    before = [g.clone() for g in grads]
    counted: dict[str, Tensor] = {}
    step = step_of(net, sums(*TWO))
    step = type(step)(**{**vars(step), "count": counted.__setitem__})
    bo.AMSS(scale=scale).modulate(step)
    assert torch.equal(bits(grads[0]), bits(before[0]))
    assert torch.equal(bits(grads[1]), bits(before[1]))
    assert not torch.equal(grads[2], before[2])
    assert {name: int(n) for name, n in counted.items()} == {"unusable_scores": 0, "nonfinite_gradients": 1}


@pytest.mark.parametrize("scale", ["none", "unbiased"])
def test_fewer_units_with_a_gradient_than_are_kept(scale):
    net = two()
    before = fill_gradients(net)
    p = net.get_parameter(WEIGHT.format("visual"))
    grad_of(p)[3:] = 0
    bo.AMSS(scale=scale).modulate(step_of(net, sums(*TWO)))
    assert torch.equal(grad_of(p)[:3], before[WEIGHT.format("visual")][:3])


@pytest.mark.parametrize("n", [1, 2])
def test_a_tensor_of_one_unit_is_always_kept(n):
    found = mask(bo.AMSS(clamp=(0.1, 0.1)), two(n), *TWO)
    assert counts(found) == [1, 1]


def test_an_absent_modality_is_not_masked_and_the_others_share():
    net = Encoders(a=nn.Linear(2, 50), b=nn.Linear(2, 50), c=nn.Linear(2, 50))
    for scale in ("none", "official"):
        found = mask(bo.AMSS(scale=scale), net, TWO[0], None, TWO[1])
        assert bool((found[WEIGHT.format("b")] == 1).all())
        assert [kept(found[WEIGHT.format(name)]) for name in "ac"] == [11, 40]


@pytest.mark.parametrize("given", [(0.3, None), (0.3, NAN), (None, None)])
def test_scores_that_can_not_be_used_leave_the_step_alone(given):
    found = mask(bo.AMSS(scale="official"), two(), *given)
    assert all(bool((factor == 1).all()) for factor in found.values())


@pytest.mark.parametrize("scores", [[NAN, 1.0], [0.0, 0.0], [INF, 1.0]])
def test_so_do_scores_that_are_zero_or_not_finite(scores):
    net = two()
    before = fill_gradients(net)
    given = sums(*TWO)
    given = type(given)(**{**vars(given), "score": torch.tensor(scores)})
    bo.AMSS().modulate(step_of(net, given))
    assert all(bool((factor == 1).all()) for factor in factors(net, before).values())


def test_parameters_without_a_gradient_come_and_go():
    net, modulation = two(), bo.AMSS()
    for missing in ("audio", "visual", None, "audio"):
        before = fill_gradients(net)
        step = step_of(net, sums(*TWO))
        if missing is not None:
            net.get_parameter(WEIGHT.format(missing)).grad = None
            step.slots[missing].pop(0)
        modulation.modulate(step)
        for name in {"audio", "visual"} - {missing}:
            p = net.get_parameter(WEIGHT.format(name))
            assert kept(grad_of(p) / before[WEIGHT.format(name)]) == {"audio": 11, "visual": 40}[name]


class Words(nn.Module):
    """An embedding with sparse gradients, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4, sparse=True)
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.table(x.abs().long().clamp(max=6)).mean(1))


def with_words(**options):
    model = Concat(encoder=lambda n, d: Words() if n == 5 else nn.Linear(n, d))
    optimizer = bo.MaskedSubnetworkSGD(groups_of(model), watch(model), lr=0.1, seed=0, **options)
    backward(model, batch(0, small_model()))
    return model, optimizer


def test_sparse_gradients_are_refused_before_anything_changes():
    model, optimizer = with_words()
    before = [p.detach().clone() for p in model.parameters()]
    grads = [grad_of(p).to_dense().clone() for p in model.parameters()]
    with pytest.raises(NotImplementedError, match="an encoder has sparse gradients, which AMSS can't mask"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert all(torch.equal(grad_of(p).to_dense(), g) for p, g in zip(model.parameters(), grads, strict=True))


def test_an_embedding_with_sparse_gradients_can_be_left_whole():
    _, optimizer = with_words(units={nn.Embedding: "whole"})
    optimizer.step()
    assert optimizer.stats()["modulated"] == 1


# -- the head --------------------------------------------------------------------------------------------------


def head_factors(model: Concat | SumHeads, **options) -> list[Tensor]:
    optimizer = bo.MaskedSubnetworkSGD(
        groups_of(model), watch(model), lr=0.1, seed=0, mask_head=True, clamp=(0.3, 0.3), **options
    )
    backward(model, batch(0, small_model(len(model.names))))
    before = {name: grad_of(p).clone() for name, p in model.named_parameters()}
    optimizer.step()
    found = factors(model, before)
    return [factor for name, factor in found.items() if "head" in name]


def test_the_fused_head_is_masked_by_weight_within_each_modality():
    weight, bias = head_factors(small_model(3, order=[2, 0, 1]))
    assert bool((bias == 1).all())
    assert [int(block.count_nonzero()) for block in weight.split(4, dim=1)] == [6, 6, 6]  # 0.3 of 5 x 4
    assert len({tuple(block.flatten().tolist()) for block in weight.split(4, dim=1)}) == 3


def test_heads_of_their_own_are_masked_by_weight():
    torch.manual_seed(0)
    found = head_factors(SumHeads())
    assert [int(factor.count_nonzero()) for factor in found] == [6, 5, 6, 5]


def test_a_head_that_is_not_linear_can_not_be_masked():
    with pytest.raises(
        ValueError, match=r"`mask_head=True` needs a linear head.*Found Sequential, .*'zero-out'"
    ):
        head_factors(MLPHead())


def test_a_head_that_the_optimizer_does_not_hold_is_left_alone():
    model = small_model()
    groups = [group for group in groups_of(model) if group["modality"]]
    optimizer = bo.MaskedSubnetworkSGD(groups, watch(model), lr=0.1, seed=0, mask_head=True)
    train(model, optimizer, [batch(0, model)])
    assert optimizer.stats()["modulated"] == 1


# -- randomness, numbers, memory ------------------------------------------------------------------------------------


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

    for options in (
        {},
        {"scale": "unbiased"},
        {"scale": "official", "sampling": "topk"},
        {"masked": "frozen"},
    ):
        modulation, net = bo.AMSS(**options), two()
        here = mask(modulation, net, *TWO)
        before = fill_gradients(net)
        step = step_of(net, sums(*TWO))
        with monkeypatch.context() as patch:
            patch.setattr(_amss, "on_host", lambda tensor: None)
            patch.setattr(_parts, "on_host", lambda tensor: None)
            for name in ("item", "tolist", "nonzero", "cpu", "numpy", "__bool__", "__float__", "__int__"):
                patch.setattr(Tensor, name, refuse)
            modulation.modulate(step)
        there = factors(net, before)
        assert all(torch.equal(here[name], there[name]) for name in here)


def test_it_can_be_copied_and_pickled_after_steps():
    modulation, net = bo.AMSS(masked="frozen"), two()
    first = mask(modulation, net, *TWO)
    for again in (copy.deepcopy(modulation), pickle.loads(pickle.dumps(modulation))):
        assert repr(again) == repr(modulation)
        second = mask(again, two(), *TWO)
        assert all(torch.equal(first[name], second[name]) for name in first)


# -- in an optimizer ------------------------------------------------------------------------------------------


def test_significance_and_keep_ratio_are_recorded():
    model, optimizer = modulated(bo.AMSS(2.0), modalities=3)
    with bo.Recorder(optimizer) as recorder:
        train(model, optimizer, [batch(i, model) for i in range(3)])
    for quantity in ("significance", "keep_ratio"):
        assert {name: len(v) for name, (_, v) in recorder.series(quantity).items()} == dict.fromkeys(
            model.names, 3
        )
    ratios = [values for _, values in recorder.series("keep_ratio").values()]
    assert [sum(step) for step in zip(*ratios, strict=True)] == pytest.approx([2, 2, 2], abs=1e-5)


def test_the_window_is_inclusive():
    model, optimizer = modulated(bo.AMSS(start=1, end=2))
    train(model, optimizer, [batch(i, model) for i in range(4)])
    assert optimizer.stats()["modulated"] == 2
    assert optimizer.stats()["outside_window"] == 2


def test_after_ogm_the_masked_units_have_no_noise():
    model, optimizer = modulated([bo.OGM(0.5), bo.AMSS(clamp=(0.3, 0.3))])
    backward(model, batch(0, model))
    optimizer.step()
    for encoder in model.modalities.values():
        assert kept(grad_of(encoder.get_parameter("0.weight"))) == 2  # 0.3 of 6
        assert kept(grad_of(encoder.get_parameter("2.weight"))) == 2  # 0.3 of 4


def test_it_shares_a_monitor_with_opm():
    model = small_model()
    monitor = watch(model)
    optimizer = bo.MaskedSubnetworkSGD(groups_of(model), monitor, lr=0.1, seed=0)
    with bo.PredictionModulator(monitor, seed=0):
        train(model, optimizer, [batch(i, model) for i in range(5)])
        assert optimizer.stats()["modulated"] == 5


def test_attach_masks_too():
    model = small_model()
    base = sgd(groups_of(model))
    twin, wrapped = modulated(bo.AMSS(masked="frozen"))
    with bo.attach(base, watch(model), bo.AMSS(masked="frozen"), seed=7):
        train(model, base, [batch(i, model) for i in range(3)])
    train(twin, wrapped, [batch(i, twin) for i in range(3)])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_single_modality_is_not_masked():
    with pytest.warns(UserWarning, match="nothing to balance"):
        model, optimizer = modulated(bo.AMSS(), modalities=1)
    twin = small_model(1)
    train(model, optimizer, [batch(0, model)])
    train(twin, sgd(groups_of(twin)), [batch(0, twin)])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("scale", ["ratio", "official"])
def test_a_hint_where_the_base_takes_the_factor_out(scale):
    model = small_model()
    with pytest.warns(bo.OptimizerHint, match="Adam divides a constant gradient factor out again"):
        bo.ModulatedOptimizer(torch.optim.Adam(groups_of(model)), watch(model), bo.AMSS(scale=scale))


def test_a_line_search_sees_other_masks_each_time():
    model = small_model()
    base = torch.optim.LBFGS(model.parameters())
    with pytest.warns(bo.OptimizerHint, match="sees another mask"):
        bo.ModulatedOptimizer(base, watch(model), bo.AMSS())
    with pytest.raises(NotImplementedError, match="Use masked='gradient'"):
        bo.ModulatedOptimizer(base, watch(model), bo.AMSS(masked="frozen"))


# -- options ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "`temperature` should be positive. Found 0"),
        ({"clamp": (0.5, 0.2)}, "`clamp` should be a pair"),
        (
            {"scale": "ht"},
            r"`scale` should be one of \('none', 'unbiased', 'ratio', 'official'\). Found 'ht'",
        ),
        ({"sampling": "random"}, "`sampling` should be one of"),
        ({"importance": "gn"}, "`importance` should be one of"),
        ({"importance": ""}, "`importance` should be one of"),
        ({"masked": "update"}, "`masked` should be one of"),
        ({"offset": NAN}, "`offset` should be finite"),
        ({"max_weight": 0}, "`max_weight` should be positive"),
        ({"min_ndim": -1}, "`min_ndim` should be non-negative"),
        ({"start": 3, "end": 2}, "`start` and `end`"),
        ({"scale": "unbiased", "sampling": "topk"}, "'topk' draws none"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        bo.AMSS(**options)


def test_the_importance_goes_with_the_scale():
    found = {scale: bo.AMSS(scale=scale).importance for scale in ("none", "official", "unbiased", "ratio")}
    assert found == {"none": "norm2", "official": "norm2", "unbiased": "norm", "ratio": "norm"}
    assert bo.AMSS(scale="unbiased", importance="norm2").importance == "norm2"


def test_repr_shows_the_options_and_not_the_whole_rule():
    shown = repr(bo.AMSS(0.5, scale="unbiased", units={nn.Linear: "whole"}))
    assert shown.startswith(
        "AMSS(temperature=0.5, scale='unbiased', sampling='importance', importance='norm', clamp="
    )
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
