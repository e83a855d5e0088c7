"""What AMSS leaves alone: broken gradients, useless scores, absent modalities, sparse gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import balanceopt as bo
from tests.masking import Encoders, factors, fill_gradients, kept, mask, step_of, sums
from tests.models import Concat, watch
from tests.training import backward, batch, bits, grad_of, groups_of, small_model

INF, NAN = float("inf"), float("nan")
# Keep ratios 0.2142 and 0.7858 at temperature 0.2.
TWO = (0.34, 0.08)
WEIGHT = "encoders.{}.weight"


def two(n: int = 50, **options) -> Encoders:
    torch.manual_seed(0)
    return Encoders(audio=nn.Linear(3, n, **options), visual=nn.Linear(3, n, **options))


def counts(found: dict[str, Tensor]) -> list[int]:
    return [kept(found[WEIGHT.format(name)]) for name in ("audio", "visual")]


@pytest.mark.parametrize("scale", ["none", "unbiased", "official"])
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
        if missing is not None:
            net.get_parameter(WEIGHT.format(missing)).grad = None
        modulation.modulate(step_of(net, sums(*TWO)))
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
