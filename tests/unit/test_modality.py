"""Tagging: which parameter belongs to which modality."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import balanceopt as bo
from balanceopt.modality import find_module, modality_parameters, unwrap
from tests.models import INPUTS, Concat, SumHeads, compiled, linear


def tags(groups):
    return [(group["modality"], len(group["params"])) for group in groups]


def ids(parameters):
    return [id(p) for p in parameters]


@pytest.mark.parametrize("modalities", [1, 2, 3, 6])
def test_every_parameter_is_in_exactly_one_group_in_the_models_order(modalities):
    model = Concat(modalities)
    groups = bo.modality_groups(model, model.modalities)
    assert [g["modality"] for g in groups] == [*model.names, None]
    for name in model.names:
        (own,) = (g["params"] for g in groups if g["modality"] == name)
        assert ids(own) == ids(model.encoders[name].parameters())
    assert ids(groups[-1]["params"]) == ids(model.head.parameters())
    assert sorted(ids(p for g in groups for p in g["params"])) == sorted(ids(model.parameters()))


def test_the_rest_is_left_out_when_empty():
    model = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(2, 3)})
    assert tags(bo.modality_groups(model, {"b": "b", "a": "a"})) == [("b", 2), ("a", 2)]


def test_defaults_are_in_every_group_and_reach_the_optimizer():
    model = Concat()
    groups = bo.modality_groups(model, model.modalities, lr=0.3, weight_decay=0.1)
    optimizer = torch.optim.SGD(groups, lr=1.0)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.3, 0.1)] * 3


@pytest.mark.parametrize("reserved", ["params", "modality"])
def test_reserved_defaults_are_refused(reserved):
    with pytest.raises(ValueError, match=f"should not set \\['{reserved}'\\]"):
        bo.modality_groups(Concat(), {"audio": "encoders.audio"}, **{reserved: 1})


def test_names_and_modules_mean_the_same():
    model = Concat()
    by_name = bo.modality_groups(model, {"x": "encoders.audio", "y": "encoders.visual"})
    by_module = bo.modality_groups(model, {"x": model.encoders["audio"], "y": model.encoders["visual"]})
    assert [(g["modality"], ids(g["params"])) for g in by_name] == [
        (g["modality"], ids(g["params"])) for g in by_module
    ]


def test_names_of_parameters_do_not_matter():
    model = nn.ModuleDict({"audio_visual": nn.Linear(2, 3), "visual": nn.Linear(2, 3), "fc": nn.Linear(6, 2)})
    groups = bo.modality_groups(model, {"visual": model["audio_visual"], "audio": model["visual"]})
    assert ids(groups[0]["params"]) == ids(model["audio_visual"].parameters())
    assert ids(groups[1]["params"]) == ids(model["visual"].parameters())


def test_frozen_parameters_stay_in_their_group():
    model = Concat()
    model.encoders["audio"].requires_grad_(False)
    assert tags(bo.modality_groups(model, model.modalities)) == [("audio", 4), ("visual", 4), (None, 2)]


# Shared parameters


class TiedEncoders(nn.Module):
    def __init__(self):
        super().__init__()
        shared = nn.Linear(4, 4)
        self.left = nn.Sequential(nn.Linear(5, 4), shared)
        self.right = nn.Sequential(nn.Linear(6, 4), shared)
        self.fc = nn.Linear(8, 3)


def test_a_module_shared_by_encoders_belongs_to_nobody():
    model = TiedEncoders()
    groups = bo.modality_groups(model, {"left": "left", "right": "right"})
    assert tags(groups) == [("left", 2), ("right", 2), (None, 4)]
    assert {id(model.left[1].weight), id(model.fc.weight)} <= set(ids(groups[-1]["params"]))


def test_a_parameter_tied_to_the_head_belongs_to_nobody():
    model = Concat(width=5, encoder=linear)
    model.head = tied = nn.Linear(5, 5)
    model.encoders["audio"].weight = tied.weight
    groups = bo.modality_groups(model, model.modalities)
    assert tags(groups) == [("audio", 1), ("visual", 2), (None, 2)]
    assert id(model.head.weight) in ids(groups[-1]["params"])


def test_a_parameter_that_the_model_itself_holds_too_belongs_to_nobody():
    model = Concat()
    model.register_parameter("scale", next(model.encoders["audio"].parameters()))
    assert tags(bo.modality_groups(model, model.modalities)) == [("audio", 3), ("visual", 4), (None, 3)]


def test_a_parameter_shared_within_one_encoder_is_its_own():
    model = Concat()
    model.encoders["audio"] = nn.Sequential(shared := nn.Linear(5, 5), nn.Tanh(), shared)
    assert tags(bo.modality_groups(model, model.modalities))[0] == ("audio", 2)


def test_an_encoder_with_only_shared_parameters_is_refused():
    model = Concat(encoder=linear)
    model.twin = nn.Linear(5, 4)
    for name, parameter in model.encoders["audio"].named_parameters():
        model.twin.register_parameter(name, parameter)
    with pytest.raises(ValueError, match=r"encoders\['audio'\].*only parameters shared with other modules"):
        bo.modality_groups(model, model.modalities)


# Errors


def test_unknown_name():
    with pytest.raises(
        ValueError, match=r"encoders\['a'\] should name a module of Concat.*'encoders', 'head'"
    ):
        bo.modality_groups(Concat(), {"a": "encoders.nowhere"})


def test_module_outside_the_model():
    with pytest.raises(ValueError, match="Found a Linear outside of it"):
        bo.modality_groups(Concat(), {"a": nn.Linear(2, 2)})


@pytest.mark.parametrize("encoders", [{}, [], None, ["encoders.audio"]])
def test_not_a_mapping_or_empty(encoders):
    with pytest.raises(ValueError, match="`encoders` should map each modality to its module"):
        bo.modality_groups(Concat(), encoders)


def test_neither_module_nor_name():
    with pytest.raises(
        TypeError, match=r"encoders\['a'\] should be a module or the dotted name of one. Found 3"
    ):
        bo.modality_groups(Concat(), {"a": 3})  # type: ignore[dict-item]


def test_encoder_without_parameters():
    model = nn.ModuleDict({"a": nn.ReLU(), "b": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"encoders\['a'\] should have parameters of its own. Found none"):
        bo.modality_groups(model, {"a": "a", "b": "b"})


def test_the_same_encoder_twice():
    model = Concat()
    with pytest.raises(ValueError, match="'y' is the same module as that of 'x'"):
        bo.modality_groups(model, {"x": "encoders.audio", "y": model.encoders["audio"]})


@pytest.mark.parametrize("swapped", [False, True])
def test_nested_encoders(swapped):
    model = Concat()
    pairs = [("outer", "encoders.audio"), ("inner", "encoders.audio.0")]
    with pytest.raises(ValueError, match="'inner' is inside that of 'outer'"):
        bo.modality_groups(model, dict(pairs[::-1] if swapped else pairs))


@pytest.mark.parametrize("whole", [lambda model: model, lambda model: ""])
def test_the_whole_model_is_no_encoder(whole):
    model = Concat()
    with pytest.raises(
        ValueError, match=r"encoders\['a'\] should be a part of Concat. Found the model itself"
    ):
        bo.modality_groups(model, {"a": whole(model)})


# Wrappers and special modules


def test_compiled_model_and_compiled_encoder():
    model = Concat()
    outer = compiled(model)
    expected = ids(model.encoders["audio"].parameters())
    for encoders in ({"a": "encoders.audio"}, {"a": outer.encoders["audio"]}):
        assert ids(bo.modality_groups(outer, encoders)[0]["params"]) == expected
    model.encoders["audio"] = compiled(model.encoders["audio"])
    assert ids(bo.modality_groups(model, model.modalities)[0]["params"]) == expected


def test_unwrap_reaches_the_users_own_module():
    model = Concat()
    assert unwrap(compiled(model)) is model
    assert unwrap(compiled(nn.DataParallel(model))) is model


def test_lazy_modules_keep_their_place():
    model = nn.ModuleDict({"a": nn.LazyLinear(4), "b": nn.Linear(3, 4), "fc": nn.LazyLinear(2)})
    groups = bo.modality_groups(model, {"a": "a", "b": "b"})
    optimizer = torch.optim.SGD(groups, lr=0.1)
    model["fc"](torch.cat([model["a"](torch.randn(2, 5)), model["b"](torch.randn(2, 3))], 1)).sum().backward()
    optimizer.step()
    assert ids(optimizer.param_groups[0]["params"]) == ids(model["a"].parameters())
    assert model["a"].weight.shape == (4, 5)


def test_copies_have_groups_of_their_own():
    model = Concat()
    twin = copy.deepcopy(model)
    assert not set(ids(twin.parameters())) & {
        id(p) for g in bo.modality_groups(model, model.modalities) for p in g["params"]
    }
    with pytest.raises(ValueError, match="outside of it"):
        bo.modality_groups(twin, model.modalities)


def test_parameters_by_modality_leave_the_model_alone():
    model = SumHeads(3)
    before = {name: p.clone() for name, p in model.named_parameters()}
    own = modality_parameters(model, model.modalities)
    assert list(own) == list(model.names)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert find_module(model, "own_heads.audio", "`head`") is model.own_heads["audio"]
    assert own["audio"][0].shape[1] == INPUTS[0]


@pytest.mark.parametrize("container", [nn.ModuleList, lambda layers: nn.ModuleDict({"0": layers[0]})])
def test_a_container_that_is_never_called_is_no_encoder(container):
    model = nn.ModuleDict({"a": container([nn.Linear(2, 2)]), "b": nn.Linear(2, 2)})
    with pytest.raises(
        ValueError, match=r"encoders\['a'\] should be a module that the model calls. Found a Module"
    ):
        bo.ModalityMonitor(model, {"a": "a", "b": "b"})


def test_a_module_dict_of_encoders_is_a_mapping():
    encoders = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model = nn.ModuleDict({"encoders": encoders})
    assert bo.ModalityMonitor(model, encoders).modalities == ("a", "b")
    assert [group["modality"] for group in bo.modality_groups(model, encoders)] == ["a", "b"]
