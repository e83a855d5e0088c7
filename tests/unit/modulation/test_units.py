"""What is masked as one piece: units by module type, by the user's rule, by attention head."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from balanceopt import MaskUnits, attention_heads
from balanceopt.functional import unit_importance
from balanceopt.modulation._units import UnitRule, UnitView, find_units


def units_of(
    module: nn.Module, name: str, rule: UnitRule | None = None, min_ndim: int = 2
) -> UnitView | None:
    (found,) = find_units([module.get_parameter(name)], module, rule, min_ndim)
    return found


def numbers(module: nn.Module, name: str, rule: UnitRule | None = None) -> Tensor:
    """The unit of each element of a parameter."""
    units = units_of(module, name, rule)
    assert units is not None
    parameter = module.get_parameter(name)
    found = units.numbers(parameter.device).expand_as(parameter)
    assert found.max() + 1 == units.count
    return found


def made_by(output: Tensor, parameter: Tensor) -> Tensor:
    """Which elements of the parameter the output depends on."""
    (gradient,) = torch.autograd.grad(output.sum(), parameter, retain_graph=True)
    return gradient != 0


LAYERS = {
    "linear": (nn.Linear(3, 4), (3,), -1),
    "conv1d": (nn.Conv1d(2, 4, 3), (2, 5), 1),
    "conv2d": (nn.Conv2d(2, 4, 3), (2, 5, 5), 1),
    "conv3d": (nn.Conv3d(2, 3, 2), (2, 3, 3, 3), 1),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (4, 5, 5), 1),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4), (4, 5, 5), 1),
    "transposed 1d": (nn.ConvTranspose1d(2, 5, 3), (2, 4), 1),
    "transposed 2d": (nn.ConvTranspose2d(2, 4, 3), (2, 4, 4), 1),
    "transposed grouped": (nn.ConvTranspose2d(4, 6, 3, groups=2), (4, 4, 4), 1),
    "transposed depthwise": (nn.ConvTranspose2d(4, 4, 3, groups=4), (4, 4, 4), 1),
    "bilinear": (nn.Bilinear(2, 3, 4), (2,), -1),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_unit_is_all_that_makes_one_output_channel(kind):
    layer, shape, channel = LAYERS[kind]
    inputs = [torch.rand(2, *shape) + 1]
    if kind == "bilinear":
        inputs.append(torch.rand(2, 3) + 1)
    output = layer(*inputs)
    unit = numbers(layer, "weight")
    assert unit.max() + 1 == output.shape[channel]
    for j in range(output.shape[channel]):
        assert torch.equal(unit == j, made_by(output.select(channel, j), layer.get_parameter("weight")))


def attention(**options):
    """Attention whose output is what its heads say, side by side."""
    module = nn.MultiheadAttention(6, 3, batch_first=True, **options)
    with torch.no_grad():
        module.out_proj.weight.copy_(torch.eye(6))
    return module


@pytest.mark.parametrize("name", ["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"])
def test_a_unit_of_attention_is_all_that_one_head_needs(name):
    packed = name == "in_proj_weight"
    module = attention() if packed else attention(kdim=4, vdim=5)
    x, k, v = (
        torch.randn(2, 7, 6),
        torch.randn(2, 7, 6 if packed else 4),
        torch.randn(2, 7, 6 if packed else 5),
    )
    output, _ = module(x, x if packed else k, x if packed else v)
    unit = numbers(module, name)
    assert unit.max() + 1 == 3
    for head in range(3):
        own = output[..., 2 * head : 2 * head + 2]
        assert torch.equal(unit == head, made_by(own, module.get_parameter(name)))


def test_a_unit_of_the_output_projection_is_what_one_head_feeds():
    unit = numbers(attention(), "out_proj.weight")
    assert torch.equal(unit, torch.tensor([0, 0, 1, 1, 2, 2]).expand(6, 6))


@pytest.mark.parametrize(
    ("layer", "name", "count"),
    [
        (nn.Embedding(7, 3), "weight", 7),
        (nn.EmbeddingBag(7, 3), "weight", 7),
        (nn.LSTM(3, 5), "weight_hh_l0", 20),  # a gate of a cell
        (nn.GRU(3, 5), "weight_ih_l0", 15),
        (nn.RNNCell(3, 5), "weight_ih", 5),
        (nn.ParameterDict({"token": nn.Parameter(torch.randn(2, 1, 3))}), "token", 2),
    ],
)
def test_any_other_tensor_falls_into_rows(layer, name, count):
    unit = numbers(layer, name)
    parameter = layer.get_parameter(name)
    rows = torch.arange(count).view(-1, *[1] * (parameter.dim() - 1))
    assert torch.equal(unit, rows.expand_as(parameter))


class OwnBias(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, 3))


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (nn.LayerNorm((3, 4)), "weight"),
        (nn.RMSNorm((3, 4)), "weight"),
        (nn.GroupNorm(2, 4), "weight"),
        (nn.BatchNorm2d(4), "weight"),
        (nn.Linear(3, 4), "bias"),
        (nn.MultiheadAttention(4, 2, add_bias_kv=True), "bias_k"),
        (nn.MultiheadAttention(4, 2, add_bias_kv=True), "bias_v"),
        (nn.MultiheadAttention(4, 2), "in_proj_bias"),
        (OwnBias(), "bias"),
        (nn.ParameterDict({"scale": nn.Parameter(torch.tensor(1.0))}), "scale"),
        (nn.ParameterDict({"none": nn.Parameter(torch.zeros(0, 3))}), "none"),
    ],
)
def test_norms_biases_and_small_tensors_are_whole(layer, name):
    assert units_of(layer, name) is None


def test_min_ndim_leaves_more_whole():
    assert units_of(nn.Linear(3, 4), "weight", min_ndim=3) is None
    assert units_of(nn.Conv2d(3, 4, 1), "weight", min_ndim=3) is not None


def test_a_parametrized_weight_has_the_units_of_its_module():
    layer = nn.utils.parametrizations.spectral_norm(nn.ConvTranspose1d(2, 5, 3))
    units = units_of(layer, "parametrizations.weight.original")
    assert units is not None
    assert units.count == 5


def test_a_parameter_that_no_module_holds_falls_into_rows():
    p = nn.Parameter(torch.randn(3, 4))
    (units,) = find_units([p], nn.Linear(1, 1), None, 2)
    assert units == UnitView(((3,), (4,)), (0,))


# -- the user's rule ----------------------------------------------------------------------------------------------


def test_a_rule_by_module_parameter_or_class():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(4, 6), nn.LSTM(3, 5), nn.LayerNorm((2, 3)))
    rule: UnitRule = {
        model[0]: MaskUnits(3),
        model[1].weight: MaskUnits(2, dim=1),
        model[1].bias: MaskUnits(2),
        nn.RNNBase: MaskUnits(parts=4),
        nn.LayerNorm: "element",
    }
    assert numbers(model, "0.weight", rule)[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert units_of(model, "0.bias", rule) is None  # fewer dimensions than min_ndim
    assert numbers(model, "1.weight", rule)[0].tolist() == [0, 0, 1, 1]
    assert numbers(model, "1.bias", rule).tolist() == [0, 0, 0, 1, 1, 1]
    assert numbers(model, "2.weight_hh_l0", rule)[:, 0].tolist() == [0, 1, 2, 3, 4] * 4
    assert numbers(model, "3.weight", rule).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_rule_that_is_a_function():
    model = nn.Sequential(nn.Linear(4, 6), nn.Conv1d(2, 4, 3))

    def rule(module, name, parameter):
        if isinstance(module, nn.Linear):
            return "whole" if name == "weight" else "element"
        return None

    assert units_of(model, "0.weight", rule) is None
    assert numbers(model, "0.bias", rule).tolist() == [0, 1, 2, 3, 4, 5]
    assert numbers(model, "1.weight", rule)[:, 0, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        ({nn.Linear(1, 1): MaskUnits(2)}, ValueError, "`units` should map .* of the monitor's model"),
        ({nn.Linear: MaskUnits(4)}, ValueError, "`units` of 'weight' in Linear: .*should divide dimension 0"),
        ({nn.Linear: MaskUnits(parts=7)}, ValueError, "should divide dimension 0"),
        ({nn.Linear: MaskUnits(2, dim=2)}, ValueError, "needs a tensor with that dimension"),
        ({nn.Linear: 3}, TypeError, "`units` should give MaskUnits, 'whole', 'element' or None"),
    ],
)
def test_a_rule_that_does_not_fit_is_refused(rule, error, message):
    with pytest.raises(error, match=message):
        units_of(nn.Linear(3, 6), "weight", rule)


@pytest.mark.parametrize("options", [{"count": 0}, {"parts": 0}])
def test_units_need_at_least_one(options):
    with pytest.raises(ValueError, match="should be a whole number of at least 1"):
        MaskUnits(**options)


@pytest.mark.parametrize(
    "units", [MaskUnits(), MaskUnits(2, dim=1), MaskUnits(2, parts=3), MaskUnits(3, dim=-2)]
)
def test_view_and_spread_agree_with_numbers(units):
    x = torch.randn(6, 4, dtype=torch.float64)
    view = units.on(x.shape)
    unit = view.numbers(x.device).expand_as(x)
    for j, importance in enumerate(unit_importance(view.view(x), view.unit_dims)):
        assert importance == pytest.approx(x[unit == j].square().sum().item())
    spread = view.spread(torch.arange(view.count)).expand(view.sizes).reshape(x.shape)
    assert torch.equal(spread, unit)


def test_views_of_channels_last_memory():
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    units = MaskUnits(2).on(weight.shape)
    units.view(weight).mul_(units.spread(torch.tensor([0.0, 1.0])))
    assert weight[:2].count_nonzero() == 0
    assert weight[2:].count_nonzero() == 24


# -- attention made of linear layers --------------------------------------------------------------------------------


class Attention(nn.Module):
    """Projections by name, with or without a number of heads."""

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)

    def __init__(self, heads=None, **layers):
        super().__init__()
        if heads:
            self.num_heads = heads
        for name, layer in layers.items():
            setattr(self, name, layer)


class Conv1D(nn.Module):
    """As transformers': a linear layer whose weight is (in, out)."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))


def projections(*names, outputs=6):
    return {name: nn.Linear(6, outputs) for name in names}


@pytest.mark.parametrize(
    "names",
    [
        ("query", "key", "value", "dense"),
        ("q_proj", "k_proj", "v_proj", "out_proj"),
        ("q_proj", "k_proj", "v_proj", "o_proj"),
        ("q_lin", "k_lin", "v_lin", "out_lin"),
        ("q", "k", "v", "o"),
    ],
)
def test_heads_of_separate_projections(names):
    module = Attention(3, **projections(*names))
    found = {id(layer): units for layer, units in attention_heads(nn.Sequential(module)).items()}
    expected = [MaskUnits(3)] * 3 + [MaskUnits(3, dim=1)]
    assert [found[id(getattr(module, name))] for name in names] == expected
    assert len(found) == 4


def test_heads_of_bert_whose_output_stands_beside_the_attention():
    inner = Attention(2, **projections("query", "key", "value"))
    outer = Attention(attention=inner, output=Attention(dense=nn.Linear(6, 6)))
    layer = Attention(attention=outer, output=Attention(dense=nn.Linear(12, 6)))
    found = attention_heads(layer)
    assert found.keys() == {inner.query, inner.key, inner.value, outer.output.dense}
    assert found[outer.output.dense] == MaskUnits(2, dim=1)


def test_heads_of_grouped_query_attention():
    module = Attention(3, q_proj=nn.Linear(6, 12), k_proj=nn.Linear(6, 4), v_proj=nn.Linear(6, 4))
    assert attention_heads(module)[module.k_proj] == MaskUnits(1)
    assert attention_heads(module)[module.q_proj] == MaskUnits(3)


def test_heads_of_fused_projections():
    timm = Attention(2, qkv=nn.Linear(6, 18), proj=nn.Linear(6, 6))
    gpt2 = Attention(2, c_attn=Conv1D(6, 18), c_proj=Conv1D(6, 6))
    neox = Attention(2, query_key_value=nn.Linear(6, 18), dense=nn.Linear(6, 6))
    assert list(attention_heads(timm).values()) == [MaskUnits(2, parts=3), MaskUnits(2, dim=1)]
    assert list(attention_heads(gpt2).values()) == [MaskUnits(2, dim=1, parts=3), MaskUnits(2, dim=0)]
    assert list(attention_heads(neox).values()) == [MaskUnits(2), MaskUnits(2, dim=1)]


def test_the_number_of_heads_may_be_in_the_configuration():
    own: dict[str, Any] = {"config": SimpleNamespace(num_attention_heads=2)}
    module = Attention(**projections("q_proj", "k_proj", "v_proj"), **own)
    assert attention_heads(module)[module.v_proj] == MaskUnits(2)


def test_attention_without_a_number_of_heads_is_refused():
    with pytest.raises(ValueError, match="Attention has no number of heads"):
        attention_heads(Attention(**projections("query", "key", "value")))


def test_a_model_without_attention_is_refused():
    with pytest.raises(ValueError, match="Found none in Linear"):
        attention_heads(nn.Linear(2, 2))
