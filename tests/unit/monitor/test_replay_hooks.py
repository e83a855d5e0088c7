"""Which hooks run when the fusion runs once more: those that are part of the model's function, and no observer."""

from __future__ import annotations

import warnings
from collections import Counter
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import balanceopt as bo
from tests.models import Gated, batch, watch
from tests.unit.monitor.helpers import no_hooks

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecated, and still used
    weight_norm, spectral_norm = nn.utils.weight_norm, nn.utils.spectral_norm


class Mixed(Gated):
    """A gated fusion with a layer on each feature."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def fuse(self, features):
        return super().fuse([self.mix(z) for z in features])


def scores_of(model, steps=2):
    """The scores of the last of some training passes, and what a copy in eval mode with its hooks answers."""
    with watch(model) as monitor:
        accumulator = monitor.scores()
        for _ in range(steps):
            inputs, labels = batch(8)
            F.cross_entropy(model(*inputs), labels).backward()
            taken = accumulator.take()
        assert monitor.stats()["scores"] == "zero-out"
        assert taken is not None
        modes = [module.training for module in model.modules()]
    model.eval()
    with torch.no_grad():
        a, b = model.encode(*inputs)
        alone = [model.fuse([a, torch.zeros_like(b)]), model.fuse([torch.zeros_like(a), b])]
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    expected = torch.stack([z.softmax(-1).gather(1, labels[:, None]).sum() for z in alone])
    torch.testing.assert_close(taken.score, expected)
    return taken


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize(
    "norm", [weight_norm, spectral_norm, partial(prune.l1_unstructured, name="weight", amount=0.5)]
)
def test_torchs_own_reparametrisation_by_hooks(norm):
    model = Mixed()
    norm(model.mix)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model) as monitor:
        accumulator = monitor.scores()
        for _ in range(3):
            inputs, labels = batch(8)
            optimizer.zero_grad()
            logits = model(*inputs)
            computed = model.mix.weight
            assert computed.requires_grad
            F.cross_entropy(logits, labels).backward()
            optimizer.step()
            assert accumulator.take() is not None
    scores_of(model)


def twice(module, args, output):
    return 2 * output


def shifted(module, args):
    return tuple(x + 1 for x in args)


def in_place(module, args, output):
    output.mul_(2)


def by_keyword(module, args, kwargs):
    return args, {**kwargs, "input": kwargs["input"] + 1} if kwargs else kwargs


@pytest.mark.parametrize("hook", [twice, in_place])
def test_a_hook_that_changes_an_output(hook):
    model = Mixed()
    model.mix.register_forward_hook(hook)
    scores_of(model)
    scores_of(model, steps=1)


def test_a_hook_that_changes_an_input():
    model = Mixed()
    model.mix.register_forward_pre_hook(shifted)
    model.gate.register_forward_pre_hook(by_keyword, with_kwargs=True)
    scores_of(model)


def test_a_hook_on_the_head():
    model = Mixed()
    model.head.register_forward_hook(twice)
    scores_of(model)


def test_a_hook_on_an_encoder_acts_on_what_it_gives_again():
    model = Mixed()
    model.encoders["audio"].register_forward_hook(lambda module, args, output: output + 1)
    with watch(model) as monitor:
        accumulator = monitor.scores()
        inputs, labels = batch(8)
        F.cross_entropy(model(*inputs), labels).backward()
        taken = accumulator.take()
    assert taken is not None
    a, b = (e.forward(x) for e, x in zip(model.encoders.values(), inputs, strict=True))
    for i, features in enumerate(([a + 1, 0 * b], [0 * a + 1, b])):
        expected = model.fuse(features).softmax(-1).gather(1, labels[:, None]).sum()
        torch.testing.assert_close(taken.score[i], expected.detach())


class Collecting(Gated):
    """As Transformers collects hidden states: by hooks on layers, which the forward reads."""

    how = "closure"

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(4, 4)
        self.collected: list[torch.Tensor] = []
        if self.how == "closure":
            self.mix.register_forward_hook(lambda module, args, output: self.collected.append(output))
        elif self.how == "method":
            self.mix.register_forward_hook(self.collect)
        else:
            self.mix.register_forward_hook(partial(Collecting.collect, self))

    def collect(self, module, args, output):
        self.collected.append(output)

    def fuse(self, features):
        self.collected = []
        for z in features:
            self.mix(z)
        assert len(self.collected) == 2
        return super().fuse(self.collected)


class CollectingByMethod(Collecting):
    how = "method"


class CollectingByPartial(Collecting):
    how = "partial"


@pytest.mark.parametrize("make", [Collecting, CollectingByMethod, CollectingByPartial])
def test_a_model_that_collects_by_hooks_of_its_own(make):
    scores_of(make())


@pytest.mark.parametrize("kind", ["pre", "forward"])
def test_observers_are_not_called_again(kind):
    model = Mixed()
    calls: Counter[str] = Counter()

    def look(name, *_):
        calls.update([name])

    def looking(name):
        return partial(look, name)

    places = {"mix": model.mix, "head": model.head, "model": model, **model.modalities}
    for name, module in places.items():
        register = module.register_forward_pre_hook if kind == "pre" else module.register_forward_hook
        register(looking(name))
    inputs, labels = batch(8)
    with watch(model) as monitor:
        accumulator = monitor.scores()
        for _ in range(2):
            F.cross_entropy(model(*inputs), labels).backward()
            assert accumulator.take() is not None
        model.mix.register_forward_hook(looking("later"))
        F.cross_entropy(model(*inputs), labels).backward()
        assert accumulator.take() is not None
    assert calls == {"mix": 6, "head": 3, "model": 3, "audio": 3, "visual": 3, "later": 2}


def test_observers_of_an_encoder_are_not_called_again_where_opm_drops():
    model = Mixed()
    calls: list[str] = []
    for name, encoder in model.modalities.items():
        encoder.register_forward_hook(lambda *_, name=name: calls.append(name))
    with watch(model) as monitor, bo.OPM(monitor, q_base=0.9) as opm:
        for _ in range(3):
            inputs, labels = batch(8)
            F.cross_entropy(model(*inputs), labels).backward()
        assert opm.stats()["dropping"]
    assert calls == ["audio", "visual"] * 3


def test_no_probe_is_left():
    model = Mixed()
    handle = model.mix.register_forward_hook(lambda *_: None)
    monitor = watch(model)
    accumulator = monitor.scores()
    inputs, labels = batch(8)
    F.cross_entropy(model(*inputs), labels).backward()
    assert len(model.mix._forward_hooks) == 3
    del monitor, accumulator
    handle.remove()
    assert no_hooks(model)


def test_hooks_of_another_monitor_are_not_called():
    model = Mixed()
    with watch(model) as first, watch(model) as second:
        accumulators = [first.scores(), second.scores()]
        inputs, labels = batch(8)
        F.cross_entropy(model(*inputs), labels).backward()
        assert all(a.take() is not None for a in accumulators)
        assert first.stats()["passes"] == second.stats()["passes"] == 1
