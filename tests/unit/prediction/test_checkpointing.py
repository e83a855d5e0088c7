"""Activation checkpointing runs encoders a second time, with the same mask; compiled models are dropped from too."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import balanceopt as bo
from tests.dropping import fused, kept
from tests.models import Concat, SumHeads, batch, watch
from tests.training import backward, batches, class_zero, groups_of, same_bits, sgd, small_model

REGIONS = [
    *(("encoders", reentrant) for reentrant in (False, True)),
    *(("inside", reentrant) for reentrant in (False, True)),
    ("all", False),
    ("nested", False),
]


class Checkpointed(Concat):
    """`region` of its forward is run again in backward."""

    region = "none"
    reentrant = False

    def again(self, function, *args):
        return checkpoint(function, *args, use_reentrant=self.reentrant)

    def run_encoders(self, *inputs):
        pairs = zip(self.encoders.values(), inputs, strict=True)
        if self.region in ("encoders", "nested"):
            return [self.again(encoder, x) for encoder, x in pairs]
        if self.region == "inside":  # as frameworks do: parts of an encoder, not the whole
            return [self.run_inside(encoder, x) for encoder, x in pairs]
        return [encoder(x) for encoder, x in pairs]

    def run_inside(self, encoder, x):
        first, second, third = encoder.children()
        forward = encoder.forward
        encoder.forward = lambda z: third(self.again(lambda t: second(first(t)), z))
        try:
            return encoder(x)
        finally:
            encoder.forward = forward

    def forward(self, *inputs):
        def whole(*inputs):
            return self.fuse(self.run_encoders(*inputs))

        return self.again(whole, *inputs) if self.region in ("all", "nested") else whole(*inputs)


def model_of(region, reentrant):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = Checkpointed()
    model.region, model.reentrant = region, reentrant
    return model


def gradients(region, reentrant, *, forwards=1, **options):
    """Of three steps, each with `forwards` forwards before one backward."""
    model = model_of(region, reentrant)
    modulator = bo.OPM(watch(model), q_base=0.9, seed=1, **options)
    found = []
    for number in range(3):
        model.zero_grad()
        losses = []
        for i in range(forwards):
            inputs, labels = batch(6 + i)
            losses.append(F.cross_entropy(model(*[x.requires_grad_() for x in inputs]), labels))
        torch.stack(losses).sum().backward()
        found += [p.grad.clone() for p in model.parameters()] + [torch.tensor(float(number))]
    return found, modulator


@pytest.mark.parametrize("forwards", [1, 3])
@pytest.mark.parametrize(("region", "reentrant"), REGIONS)
def test_gradients_are_those_without_checkpointing(region, reentrant, forwards):
    torch.manual_seed(4)
    expected, plain = gradients("none", False, forwards=forwards, rescale="official")
    torch.manual_seed(4)
    found, modulator = gradients(region, reentrant, forwards=forwards, rescale="official")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert modulator.stats() == plain.stats()
    assert modulator.stats()["dropping"] >= 2
    assert modulator.stats()["updates"] >= 2


def test_heads_inside_a_checkpointed_region_are_heard():
    class Model(SumHeads):
        def forward(self, *inputs):
            return checkpoint(super().forward, *inputs, use_reentrant=False)

    model = Model()
    modulator = bo.OPM(watch(model), seed=0)
    for _ in range(3):
        inputs, labels = batch()
        backward(model, ([x.requires_grad_() for x in inputs], labels))
    assert modulator.stats()["updates"] == 2


def test_a_backward_in_eval_mode_is_not_dropped_from():
    model = model_of("encoders", reentrant=False)
    modulator = bo.OPM(watch(model), q_base=1, lam=0, seed=0)
    for number in range(2):
        backward(model, class_zero(model, number))
    model.eval()
    inputs, labels = class_zero(model)
    grads = []
    for region in ("none", "encoders"):
        model.region = region
        model.zero_grad()
        backward(model, (inputs, labels))
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(grads[0], grads[1])
    assert modulator.stats()["forwards"] == 2


def run(model, prepare):
    """Three steps of SGD."""
    optimizer = sgd(groups_of(model))
    call = prepare(model)
    modulator = bo.OPM(watch(model), seed=2)
    for inputs, labels in batches(model, 3):
        optimizer.zero_grad()
        F.cross_entropy(call(*inputs), labels).backward()
        optimizer.step()
    return modulator


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it
@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_is_dropped_from(in_place):
    torch._dynamo.reset()
    plain, model = small_model(), small_model()

    def compiled(net):
        if in_place:
            net.compile(backend="eager")
            return net
        return torch.compile(net, backend="eager")

    expected = run(plain, lambda net: net)
    modulator = run(model, compiled)
    assert same_bits(plain, model)
    assert modulator.stats() == expected.stats()
    assert modulator.stats()["dropping"] == 2
    assert not kept(fused(model)).all()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_model_compiled_and_called_before_says_so():
    torch._dynamo.reset()
    model = small_model()
    model.compile(backend="eager")
    backward(model, class_zero(model))
    modulator = bo.OPM(watch(model), seed=0)

    def often():
        for number in range(10):
            backward(model, class_zero(model, number))

    with pytest.raises(
        RuntimeError, match=r"no call of it was seen.*torch\._dynamo\.reset\(\).*nothing is dropped"
    ):
        often()
    assert modulator.stats()["forwards"] == 0
