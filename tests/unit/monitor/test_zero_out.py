"""scores="zero-out": the fusion run again with the other modalities' features zero, and no trace of it left."""

from __future__ import annotations

import copy
import random
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import balanceopt as bo
from tests.models import (
    WRAPPINGS,
    ZERO_OUT,
    Concat,
    ConcatOfWrapped,
    Gated,
    Inline,
    MLPHead,
    Signal,
    Wrapped,
    batch,
    batch_norm,
    compiled,
    mlp,
    train_step,
    watch,
    with_dropout,
)
from tests.unit.monitor.helpers import Spy, score, step, sums_of, unimodal_of


def by_hand(model, inputs):
    """Each modality's logits from a copy in eval mode."""
    twin = copy.deepcopy(model).eval()
    features = [encoder(x).detach() for encoder, x in zip(model.modalities.values(), inputs, strict=True)]
    found = {}
    for i, name in enumerate(model.names):
        alone = [z if j == i else torch.zeros_like(z) for j, z in enumerate(features)]
        if isinstance(model, Inline):
            found[name] = F.linear(torch.cat(alone, 1).tanh(), twin.weight, twin.bias).detach()
        else:
            found[name] = twin.fuse(alone).detach()
    return found


@pytest.mark.parametrize("modalities", [2, 3, 6])
@pytest.mark.parametrize("fusion", ZERO_OUT)
def test_equals_a_forward_zeroed_by_hand(fusion, modalities):
    model = ZERO_OUT[fusion](modalities)
    inputs, labels = batch(8, modalities)
    with watch(model) as monitor:
        spy = Spy(monitor)
        sums = step(monitor, model, inputs, labels)
        assert monitor.stats()["scores"] == "zero-out"
    expected = by_hand(model, inputs)  # now: with BatchNorm's statistics of the training forward
    assert sums is not None
    for i, (name, logits) in enumerate(expected.items()):
        torch.testing.assert_close(spy.unimodal[0][name], logits)
        assert sums.score[i].item() == pytest.approx(score(logits, labels), rel=1e-5)


def test_of_a_linear_head_has_the_whole_bias():
    model = Concat()
    inputs, labels = batch(8)
    split = unimodal_of(model, inputs, labels)
    zeroed = unimodal_of(model, inputs, labels, scores="zero-out")
    for name in model.names:
        torch.testing.assert_close(zeroed[name], split[name] + model.head.bias.detach() / 2)


# No trace


class Random(Gated):
    """A fusion that draws from every global stream, in every mode."""

    def fuse(self, features):
        noise = torch.rand(()) + np.random.rand() + random.random()
        return super().fuse([z * float(noise) for z in features])


def state_after_three_steps(make, encoder, *, watched):
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    model = make(encoder=encoder)
    monitor = watch(model) if watched else None
    scores = monitor.scores() if monitor else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        inputs, labels = batch(8)
        optimizer.zero_grad()
        train_step(model, inputs, labels)
        optimizer.step()
        assert scores is None or scores.take() is not None
    if monitor:
        monitor.remove()
    return SimpleNamespace(
        tensors=model.state_dict(),
        modes=[module.training for module in model.modules()],
        streams=(torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()),  # type: ignore[index]
        attributes=[sorted(vars(module)) for module in model.modules()],
    )


@pytest.mark.parametrize("encoder", [mlp, batch_norm, with_dropout], ids=lambda encoder: encoder.__name__)
@pytest.mark.parametrize("make", [*ZERO_OUT.values(), Random])
def test_training_goes_on_bit_for_bit_as_without_a_monitor(make, encoder):
    plain = state_after_three_steps(make, encoder, watched=False)
    watched = state_after_three_steps(make, encoder, watched=True)
    assert all(torch.equal(plain.tensors[k], watched.tensors[k]) for k in plain.tensors)
    assert plain.streams == watched.streams
    assert plain.modes == watched.modes
    assert plain.attributes == watched.attributes


def test_modes_that_the_user_mixed_stay():
    model = MLPHead()
    model.head[1].eval()
    sums_of(model, *batch(8))
    assert [m.training for m in model.head] == [True, False, True, True, True]


def test_users_hooks_on_the_fusion_are_not_called_again():
    model = MLPHead()
    calls: Counter[str] = Counter()
    inputs, labels = batch(8)
    inputs = [x.requires_grad_() for x in inputs]
    for module in (model, model.head, model.head[0]):
        module.register_forward_pre_hook(lambda *_: calls.update(["pre"]))
        module.register_forward_hook(lambda *_: calls.update(["forward"]))
        module.register_full_backward_hook(lambda *_: calls.update(["backward"]))
    assert sums_of(model, inputs, labels) is not None
    assert calls == {"pre": 3, "forward": 3, "backward": 3}
    assert all(len(m._forward_hooks) == 1 for m in (model, model.head, model.head[0]))


def test_global_hooks_are_not_called_again():
    from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

    model = MLPHead()
    calls: Counter[str] = Counter()
    handles = [
        register_module_forward_pre_hook(lambda module, args: calls.update([type(module).__name__])),
        register_module_forward_hook(lambda module, args, output: None),
    ]
    try:
        assert sums_of(model, *batch(8)) is not None
    finally:
        for handle in handles:
            handle.remove()
    assert calls["BatchNorm1d"] == 1
    assert calls["MLPHead"] == 1


def test_encoders_do_not_run_again():
    model = Gated(encoder=batch_norm)
    calls: Counter[str] = Counter()
    for name, encoder in model.modalities.items():
        forward = encoder.forward
        encoder.forward = lambda x, name=name, forward=forward: calls.update([name]) or forward(x)
    assert sums_of(model, *batch(8)) is not None
    assert calls == {"audio": 1, "visual": 1}


def test_a_layer_shared_by_encoder_and_fusion_keeps_its_statistics():
    class Shared(Gated):
        def __init__(self, **options):
            super().__init__(**options)
            self.norm = nn.BatchNorm1d(4)
            self.encoders["audio"] = nn.Sequential(self.encoders["audio"], self.norm)

        def fuse(self, features):
            return super().fuse([self.norm(z) for z in features])

    assert_same_training(Shared)


def test_a_layer_put_in_after_the_monitor_was_built_keeps_its_statistics():
    model, plain = MLPHead(), MLPHead()
    plain.load_state_dict(model.state_dict())
    new = nn.BatchNorm1d(7)
    inputs, labels = batch(8)
    with watch(model) as monitor:
        model.head[1], plain.head[1] = new, copy.deepcopy(new)
        torch.manual_seed(3)
        assert step(monitor, model, inputs, labels) is not None
    torch.manual_seed(3)
    train_step(plain, inputs, labels)
    assert all(
        torch.equal(a, b) for a, b in zip(plain.head[1].buffers(), model.head[1].buffers(), strict=True)
    )


def assert_same_training(make):
    plain = state_after_three_steps(make, mlp, watched=False)
    watched = state_after_three_steps(make, mlp, watched=True)
    assert all(torch.equal(plain.tensors[k], watched.tensors[k]) for k in plain.tensors)


class InPlace(Gated):
    """A fusion that changes features in place, as `x += position` does."""

    def fuse(self, features):
        a, b = features
        a += 1.0
        b.mul_(2.0)
        return super().fuse([a, b])


def test_a_fusion_that_works_in_place():
    assert_same_training(InPlace)
    model = InPlace()
    inputs, labels = batch(8)
    features = [z.detach() for z in model.encode(*inputs)]
    expected = {
        "audio": Gated.fuse(model, [features[0] + 1, torch.zeros(8, 4)]).detach(),
        "visual": Gated.fuse(model, [torch.ones(8, 4), features[1] * 2]).detach(),
    }
    for name, logits in unimodal_of(model, inputs, labels).items():
        torch.testing.assert_close(logits, expected[name])


# Kinds of models


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_encoders_that_return_more_than_a_tensor(wrapping):
    model = ConcatOfWrapped(wrapping)
    inputs, labels = batch(8)
    zeroed = unimodal_of(model, inputs, labels, scores="zero-out")
    split = unimodal_of(model, inputs, labels, scores="split")
    for name in model.names:
        torch.testing.assert_close(zeroed[name], split[name] + model.head.bias.detach() / 2)


def test_an_output_in_which_nothing_can_be_zeroed_is_an_error():
    class Box:
        def __init__(self, value):
            self.value = value

    class Boxed(Gated):
        def fuse(self, features):
            return super().fuse([box.value for box in features])

    model = Boxed(encoder=lambda n, d: Wrapped(mlp(n, d), Box))
    select = dict.fromkeys(model.names, lambda box: box.value)
    with pytest.raises(RuntimeError, match="'audio' returns a Box, in which nothing can be set to zero"):
        sums_of(model, *batch(8), select=select)


def test_masks_among_the_outputs_stay():
    class Masked(Gated):
        def fuse(self, features):
            assert all(mask.all() for _, mask in features)
            return super().fuse([z for z, _ in features])

    model = Masked(
        encoder=lambda n, d: Wrapped(mlp(n, d), lambda z: (z, torch.ones(len(z), dtype=torch.bool)))
    )
    assert sums_of(model, *batch(8)) is not None


def test_an_encoder_called_twice_gives_both_outputs_again():
    class TwoViews(MLPHead):
        def forward(self, *inputs):
            a, b = self.encoders.values()
            return self.fuse([a(inputs[0]), b(inputs[1]) + 2 * b(-inputs[1])])

        def alone(self, z):
            return self.eval().fuse(z).detach()

    model = TwoViews()
    (x, y), labels = batch(8)
    a, b = model.encoders.values()
    logits = unimodal_of(model, [x, y], labels)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(logits["audio"], twin.alone([a(x), torch.zeros(8, 4)]))
    torch.testing.assert_close(logits["visual"], twin.alone([torch.zeros(8, 4), b(y) + 2 * b(-y)]))


def test_a_forward_that_catches_exceptions():
    class Careful(Gated):
        def fuse(self, features):
            try:
                return super().fuse(features)
            except Exception:
                return torch.zeros(8, 5)

    model = Careful()
    inputs, labels = batch(8)
    torch.testing.assert_close(unimodal_of(model, inputs, labels), by_hand(model, inputs))


def test_a_forward_that_takes_its_batch_apart():
    class Popping(Gated):
        def forward(self, batch):  # type: ignore[override]
            batch.pop("labels", None)
            return self.fuse([encoder(batch["inputs"].pop(0)) for encoder in self.encoders.values()])

    model = Popping()
    inputs, labels = batch(8)
    expected = by_hand(model, inputs)
    given = {"inputs": list(inputs), "labels": labels}
    with watch(model) as monitor:
        spy = Spy(monitor)
        F.cross_entropy(model(given), labels).backward()
    torch.testing.assert_close(spy.unimodal, [expected])
    assert given == {"inputs": []}


def test_what_comes_after_the_head_does_not_run():
    class Loud(Gated):
        runs = 0

        def forward(self, *inputs):
            logits = super().forward(*inputs)
            self.runs += 1
            return {"logits": logits, "loss": None}

    model = Loud()
    inputs, labels = batch(8)
    with watch(model) as monitor:
        scores = monitor.scores()
        F.cross_entropy(model(*inputs)["logits"], labels).backward()
        assert scores.take() is not None
    assert model.runs == 1


def test_the_last_of_several_calls_of_the_head_counts():
    """As in scripts that call the head on each modality by itself, then on both."""

    class Thrice(MLPHead):
        def forward(self, *inputs):
            a, b = self.encode(*inputs)
            for pair in ([a, torch.zeros_like(b)], [torch.zeros_like(a), b]):
                self.fuse(pair)
            return self.fuse([a, b])

    model = Thrice()
    inputs, labels = batch(8)
    with watch(model) as monitor:
        spy = Spy(monitor)
        sums = step(monitor, model, inputs, labels)
    torch.testing.assert_close(spy.unimodal, [by_hand(model, inputs)])
    assert sums is not None
    assert sums.label_counts.tolist() == torch.bincount(labels, minlength=5).tolist()


def test_a_modality_that_the_batch_lacks():
    class Optional(Gated):
        def forward(self, *inputs):
            encoders = self.encoders.values()
            features = [
                e(x) if x is not None else torch.zeros(8, 4) for e, x in zip(encoders, inputs, strict=True)
            ]
            return self.fuse(features)

    model = Optional(3)
    (x, _, z), labels = batch(8, 3)
    with watch(model) as monitor:
        sums = step(monitor, model, [x, None, z], labels)  # type: ignore[list-item]
        assert monitor.stats()["missing"] == {"audio": 0, "visual": 1, "text": 0}
    assert sums is not None
    assert sums.count.tolist() == [8, 0, 8]
    assert sums.present.tolist() == [True, False, True]


# Compiled parts


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's own
@pytest.mark.parametrize("how", ["wrapper", "in place", "a part of the head", "function"])
def test_compiled_parts_of_the_fusion(how):
    model, plain = MLPHead(), MLPHead()
    model.head[3] = plain.head[3] = nn.Identity()  # compiled code draws its dropout masks in another way
    plain.load_state_dict(model.state_dict())
    inputs, labels = batch(8)
    runs: list[int] = []
    model.head[4].register_forward_hook(lambda *_: runs.append(1))
    if how == "wrapper":
        model.head = compiled(model.head)
    elif how == "in place":
        model.head.compile(backend="eager")
    elif how == "a part of the head":
        model.head[0] = compiled(model.head[0])
    else:
        model.fuse = torch.compile(model.fuse, backend="eager")  # type: ignore[method-assign]
    with watch(model) as monitor:
        for _ in range(2):
            spy = Spy(monitor)
            assert step(monitor, model, inputs, labels) is not None
            train_step(plain, inputs, labels)
            torch.testing.assert_close(spy.unimodal, [by_hand(plain, inputs)])
    assert all(map(torch.equal, model.buffers(), plain.buffers()))
    assert len(runs) == 2
    assert all(m.training for m in model.modules())
    torch._dynamo.reset()


# Errors


def test_a_fusion_that_can_not_run_with_zeros():
    class Picky(Gated):
        def fuse(self, features):
            if any(not z.any() for z in features):
                raise ValueError("no zeros, please")
            return super().fuse(features)

    with pytest.raises(RuntimeError, match="could not run the model again with some features zero") as error:
        sums_of(Picky(), *batch(8))
    assert isinstance(error.value.__cause__, ValueError)


def test_a_loop_that_calls_only_the_parts():
    model = Gated()
    inputs, labels = batch(8)
    with watch(model) as monitor:
        _held = monitor.scores()
        with pytest.raises(RuntimeError, match="the model itself was not called, only its parts"):
            F.cross_entropy(model.fuse(model.encode(*inputs)), labels).backward()


def test_a_head_whose_classes_stand_in_front_of_positions():
    """Dense prediction: a 1x1 convolution as head, logits (B, C, H, W)."""

    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Signal(5, 4), Signal(6, 4)
            self.head = nn.Conv1d(8, 5, 1)

        def forward(self, x, y):
            return self.head(torch.cat([self.a(x), self.b(y)], 1).tanh())

    model = Dense()
    inputs, _ = batch(6)
    labels = torch.randint(5, (6, 4))
    with bo.ModalityMonitor(model, {"a": "a", "b": "b"}, "head") as monitor:
        spy, recovered = Spy(monitor), step(monitor, model, inputs, labels)
        monitor.observe(labels)
        observed = step(monitor, model, inputs, labels)
    assert recovered is not None
    assert observed is not None
    assert recovered.count.tolist() == [6, 6]
    torch.testing.assert_close(recovered.score, observed.score)
    alone = model.head(torch.cat([model.a(inputs[0]), torch.zeros(6, 4, 4)], 1).tanh())
    torch.testing.assert_close(spy.unimodal[0]["a"], alone.detach().movedim(1, -1).flatten(0, 1))
