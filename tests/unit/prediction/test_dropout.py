"""ModalityDropout in training: who loses what, when, and that a run resumes bit for bit."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch

import balanceopt as bo
from tests.dropping import fused, kept
from tests.models import Concat, MLPHead, watch
from tests.training import backward, batch, batches, same_bits, sgd, small_model, train


def dropout(model: Any, head: bool = True, **options: Any) -> bo.ModalityDropout:
    """Past the first forward, which drops nothing."""
    monitor = watch(model) if head else watch(model, head=None)
    method = bo.ModalityDropout(monitor, **{"seed": 0, **options})
    if head:
        fused(model)
    return method


@pytest.mark.parametrize("head", [True, False])
def test_the_fusion_gets_zeros_and_each_sample_keeps_something(head: bool):
    model = small_model()
    method = dropout(model, head, p=0.5)
    inputs = [torch.randn(200, 5), torch.randn(200, 6)]
    clean = fused(small_model(), inputs=inputs)
    sent = fused(model, inputs=inputs)
    stays = kept(sent)
    assert 0 < int((~stays[0]).sum()) < 200
    assert bool(stays.any(0).all())
    assert torch.equal(sent, clean * stays.repeat_interleave(4, 0).T)
    assert method.stats() == {"forwards": 1 + head, "dropping": 1}


def test_one_that_never_drops_is_the_base_bit_for_bit():
    model, twin = small_model(), small_model()
    method = bo.ModalityDropout(watch(model), p=0, seed=0)
    for one in (model, twin):
        train(one, sgd(one.parameters()), batches(one, 3))
    assert same_bits(model, twin)
    assert method.stats()["dropping"] == 0


def test_one_that_always_drops_leaves_one_modality_of_each_sample():
    model = small_model()
    method = dropout(model, p=1)
    assert kept(fused(model)).sum(0).tolist() == [1] * 8
    method.remove()
    assert bool(kept(fused(model)).all())


def test_a_modality_that_is_not_named_stays():
    model = small_model()
    method = dropout(model, p={"audio": 1})
    assert kept(fused(model)).tolist() == [[False] * 8, [True] * 8]
    assert repr(method) == "ModalityDropout(p={'audio': 1}, start=0, end=None, unit='step', seed=0)"


def test_equal_chances():
    model = small_model(3)
    method = dropout(model, p="equal")
    inputs = [torch.randn(300, n) for n in (5, 6, 7)]
    stays = kept(fused(model, inputs=inputs))
    assert sorted(stays.sum(0).unique().tolist()) == [2, 3]
    assert bool((~stays).any(1).all())
    assert method.options()["p"] == "equal"


def test_eval_and_the_outside_of_the_window_are_clean():
    model, clean = small_model(), fused(small_model())
    method = dropout(model, p=1, start=1, end=1)
    assert not bool(kept(fused(model)).all())
    assert torch.equal(fused(model), clean)
    method.end = None
    model.eval()
    assert torch.equal(fused(model), clean)


def test_absent_modalities_are_not_all_that_a_sample_keeps():
    model = small_model()
    method = dropout(model, p=1)
    present = torch.arange(8) < 3
    inputs, labels = batch(1, model)
    method.monitor.observe(labels)  # of the forward that was
    method.monitor.observe(labels, present={"visual": present})
    stays = kept(fused(model, inputs=inputs))
    assert stays[0, 3:].all()  # all that they have
    assert stays[:, :3].sum(0).tolist() == [1] * 3


def run(steps: range, *, load: bytes = b"", **options: Any) -> tuple[Concat, bytes]:
    model = small_model()
    method = bo.ModalityDropout(watch(model), **{"p": 0.5, "seed": 3, **options})
    optimizer = sgd(model.parameters(), momentum=0.9)
    if load:
        weights, state, rest = torch.load(io.BytesIO(load), weights_only=True)
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        method.load_state_dict(rest)
    train(model, optimizer, [batch(number, model) for number in steps])
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), method.state_dict()], file)
    return model, file.getvalue()


@pytest.mark.parametrize("p", [0.5, "equal"])
def test_a_resumed_run_goes_on_bit_for_bit(p: Any):
    whole, _ = run(range(6), p=p)
    _, half = run(range(3), p=p)
    resumed, _ = run(range(3, 6), load=half, p=p, seed=99)
    assert same_bits(whole, resumed)


def test_a_state_of_other_modalities_is_refused_and_changes_nothing():
    method = bo.ModalityDropout(watch(small_model()), seed=1)
    state = bo.ModalityDropout(watch(small_model(3)), seed=2).state_dict()
    with pytest.raises(ValueError, match="the state should be of modalities"):
        method.load_state_dict(state)
    assert method.seed == 1


def test_it_is_the_same_when_checkpointing_repeats_the_encoders():
    def trained(checkpointed: bool) -> Any:
        model = small_model()
        method = bo.ModalityDropout(watch(model, head=None), p=0.5, seed=0)
        inputs, labels = batch(0, model)
        encode = torch.utils.checkpoint.checkpoint
        features = [
            encode(encoder, x, use_reentrant=False) if checkpointed else encoder(x)
            for encoder, x in zip(model.modalities.values(), inputs, strict=True)
        ]
        torch.nn.functional.cross_entropy(model.head(torch.cat(features, 1)), labels).backward()
        assert method.forwards == 1
        return [p.grad for p in model.parameters()]

    for p, q in zip(trained(False), trained(True), strict=True):
        assert torch.equal(p, q)


def test_other_methods_score_the_clean_features():
    model = MLPHead()
    monitor = watch(model)
    method = bo.ModalityDropout(monitor, p=0.5, seed=0)
    optimizer = bo.ModulatedOptimizer(sgd(model.parameters()), monitor, bo.OGM(0.5))
    for number in range(3):
        optimizer.zero_grad()
        inputs, _ = batch(number, small_model())
        backward(model, (inputs, torch.randint(5, (8,))))
        optimizer.step()
    assert optimizer.stats()["modulated"] == 3
    assert method.stats()["dropping"] == 2


@pytest.mark.parametrize("first", [bo.OPM, bo.ModalityDropout])
@pytest.mark.parametrize("second", [bo.OPM, bo.ModalityDropout])
def test_two_methods_that_drop_are_refused(first: Any, second: Any):
    monitor = watch(small_model())
    with (
        first(monitor, seed=0),
        pytest.raises(ValueError, match=f"dropped by another method already: {first.__name__}"),
    ):
        second(monitor, seed=0)
    second(monitor, seed=0).remove()


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan, None, True, "0.5", {"audio": 2}])
def test_rates_that_are_no_probabilities(p: Any):
    with pytest.raises(ValueError, match=r"`p(\['audio'\])?` should be a"):
        bo.ModalityDropout(watch(small_model()), p=p)


def test_an_unknown_modality():
    with pytest.raises(KeyError, match=r"should name modalities of .*Found \['sound'\]"):
        bo.ModalityDropout(watch(small_model()), p={"sound": 0.5})


def test_a_single_modality_is_never_dropped():
    model = small_model(1)
    with pytest.warns(UserWarning, match="nothing is dropped"):
        bo.ModalityDropout(watch(model), p=1)
    assert bool((fused(model) != 0).any())
