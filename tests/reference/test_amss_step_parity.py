"""AMSS draws all tensors' masks together; here each is made by itself, by the naive rule and the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import balanceopt as bo
from balanceopt._random import uniforms
from balanceopt.functional import keep_ratio, kept_units, sample_units_padded, unit_importance
from balanceopt.modulation._masks import _SALT
from tests.masking import Encoders, factors, fill_gradients, step_of, sums
from tests.reference import amss_step
from tests.reference.splitmix import uniform
from tests.training import grad_of

SIGNIFICANCE = (0.34, 0.08, 0.2)
SCALES = ("none", "official", "unbiased")


def model() -> Encoders:
    torch.manual_seed(0)
    return Encoders(
        audio=nn.Sequential(nn.Linear(3, 40), nn.Conv2d(2, 11, 3), nn.Linear(5, 1)),
        visual=nn.Sequential(nn.Conv1d(2, 300, 3), nn.BatchNorm1d(8), nn.Embedding(70, 4)),
        text=nn.Sequential(nn.Linear(4, 2), nn.Linear(4, 4)),
    )


def expected(
    net: Encoders, before: dict[str, torch.Tensor], seed: int, number: int, scale: str
) -> dict[str, torch.Tensor]:
    ratio = keep_ratio(torch.tensor(SIGNIFICANCE)).tolist()
    places = {id(p): i for i, p in enumerate(net.parameters())}  # encoders come first in the optimizer, too
    found = {}
    for name, p in net.named_parameters():
        found[name] = torch.ones_like(p)
        if p.dim() < 2 or name.startswith("head"):
            continue
        modality = list(net.modalities).index(name.split(".")[1])
        rows = before[name].double().flatten(1).tolist()
        count = len(rows) + (scale == "unbiased")
        numbers = uniform(seed ^ _SALT, number, places[id(p)], count)
        weights = amss_step.weights(rows, ratio[modality], numbers, scale)
        found[name] *= torch.tensor(weights).view(-1, *[1] * (p.dim() - 1))
    return found


@pytest.mark.parametrize("scale", SCALES)
def test_a_step_is_the_naive_loop(scale):
    net = model()
    before = fill_gradients(net)
    for number, seed in ((0, 1), (5, 12345678901234567)):
        for name, p in net.named_parameters():
            p.grad = before[name].clone()
        bo.AMSS(scale=scale).modulate(step_of(net, sums(*SIGNIFICANCE), number=number, seed=seed))
        found = factors(net, before)
        for name, weight in expected(net, before, seed, number, scale).items():
            torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-6)


def test_a_mask_is_that_of_the_public_rules():
    net = Encoders(audio=nn.Linear(3, 40), visual=nn.Linear(3, 7))
    before = fill_gradients(net)
    bo.AMSS().modulate(step_of(net, sums(0.34, 0.08), seed=3, number=2))
    ratio = keep_ratio(torch.tensor([0.34, 0.08]))
    for index, (name, r) in enumerate(zip(("audio", "visual"), ratio, strict=True)):
        gradient = before[f"encoders.{name}.weight"]
        k = int(kept_units(len(gradient), r))
        numbers = torch.tensor([uniform(3 ^ _SALT, 2, 2 * index, len(gradient))])
        count = torch.tensor([len(gradient)])
        mask = sample_units_padded(unit_importance(gradient)[None], count, torch.tensor([k]), numbers)[0]
        masked = grad_of(net.get_parameter(f"encoders.{name}.weight"))
        assert torch.equal(masked, gradient * mask[:, None])


@pytest.mark.parametrize("seed", [0, 7, 2**63 + 5, -3])
def test_uniform_numbers_are_those_of_splitmix64(seed):
    streams = [0, 1, 2**40 + 3]
    found = uniforms(seed, 11, torch.tensor(streams), 50)
    assert found.tolist() == [uniform(seed, 11, stream, 50) for stream in streams]
