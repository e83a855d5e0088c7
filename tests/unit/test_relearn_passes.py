"""Features from eval passes: what they are, and that nothing else is different afterwards."""

from __future__ import annotations

import builtins
import random
import sys
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

import balanceopt as bo
from balanceopt._undo import Undo
from balanceopt.relearn._diagnosis import options
from balanceopt.relearn._features import collect_samples, leave_undisturbed
from tests.models import (
    BatchDict,
    Concat,
    ConcatOfWrapped,
    HuggingFaceStyle,
    Signal,
    Tokens,
    batch,
    batch_norm,
    train_step,
    watch,
    with_dropout,
)
from tests.relearning import OPTIONS, loaders, random_streams, samples, scheduled, train_epoch, weights


def features_of(monitor, loader, **given):
    chosen = options(0, monitor.group, **{**OPTIONS, **given})
    return collect_samples(loader, "training", monitor, chosen).samples


def eval_features(model, loader, name):
    model.eval()
    with torch.no_grad():
        at = list(model.names).index(name)
        return torch.cat([model.encoders[name](inputs[at]) for *inputs, _ in loader])


@pytest.mark.parametrize("encoder", [batch_norm, with_dropout])
def test_features_are_those_of_the_model_in_eval_mode(encoder):
    model = Concat(3, encoder=encoder)
    loader = loaders(3)[0]
    found = features_of(watch(model), loader)
    for name in model.names:
        torch.testing.assert_close(found[name].features, eval_features(model, loader, name))
        assert torch.equal(found[name].labels, torch.cat([labels for *_, labels in loader]))
        assert not found[name].features.requires_grad


class TestNothingElseChanges:
    def test_modes_buffers_and_gradients(self):
        model, optimizer, scheduler = scheduled(model_options={"encoder": batch_norm})
        train_epoch(model, optimizer, scheduler.train_loader)
        model.encoders["audio"][1].eval()  # a frozen BatchNorm
        modes = [m.training for m in model.modules()]
        before = weights(model)
        grads = [p.grad.clone() for p in model.parameters()]
        scheduler.diagnose()
        assert [m.training for m in model.modules()] == modes
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        assert all(torch.equal(g, p.grad) for g, p in zip(grads, model.parameters(), strict=True))

    @pytest.mark.parametrize("fails", [False, True])
    def test_random_streams(self, fails):
        class Drawing(torch.utils.data.Dataset):
            def __len__(self):
                return 40

            def __getitem__(self, i):
                random.random(), np.random.rand(), torch.rand(1)
                if fails and i == 30:
                    raise RuntimeError("broken file")
                return samples(40)[i]

        _, _, scheduler = scheduled()
        scheduler.train_loader = DataLoader(Drawing(), batch_size=8, shuffle=True)
        before = random_streams()
        if fails:
            with pytest.raises(RuntimeError, match="broken file"):
                scheduler.diagnose()
        else:
            scheduler.diagnose()
        assert random_streams() == before

    def test_generators_of_the_loader(self):
        data, generator = samples(40), torch.Generator().manual_seed(1)
        inner = RandomSampler(data, generator=torch.Generator().manual_seed(2))
        sampled = DataLoader(
            data, sampler=BatchSampler(inner, 8, False), batch_size=None, generator=generator
        )
        shuffled = DataLoader(data, 8, shuffle=True, generator=torch.Generator().manual_seed(3))
        for loader in (sampled, shuffled):
            _, _, scheduler = scheduled()
            scheduler.train_loader = loader
            before = [generator.get_state(), inner.generator.get_state(), shuffled.generator.get_state()]
            scheduler.diagnose()
            after = [generator.get_state(), inner.generator.get_state(), shuffled.generator.get_state()]
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    def test_a_buffer_that_a_forward_writes_to(self):
        class Counting(Concat):
            calls: torch.Tensor

            def __init__(self, modalities):
                super().__init__(modalities)
                self.register_buffer("calls", torch.zeros(()))

            def forward(self, *inputs):
                self.calls += 1
                return super().forward(*inputs)

        model, _, scheduler = scheduled(Counting)
        scheduler.diagnose()
        assert model.calls == 0

    def test_modes_that_train_overrides_would_touch(self):
        class Stubborn(Concat):
            def train(self, mode=True):
                raise AssertionError("switching modes has side effects in some models")

        model, _, scheduler = scheduled(Stubborn)
        scheduler.diagnose()
        assert model.training

    def test_scores_of_a_pass_under_way(self):
        model = Concat()
        monitor = watch(model)
        accumulator = monitor.scores()
        inputs, labels = batch()
        logits = model(*inputs)
        features_of(monitor, loaders()[0])
        torch.nn.functional.cross_entropy(logits, labels).backward()
        found: Any = accumulator.take()
        alone = Concat()
        alone.load_state_dict(model.state_dict())
        watched = watch(alone)
        other = watched.scores()
        train_step(alone, inputs, labels)
        expected: Any = other.take()
        torch.testing.assert_close(found.score, expected.score)

    def test_hooks(self):
        model, _, scheduler = scheduled()
        hooks = [len(m._forward_hooks) for m in model.modules()]
        scheduler.diagnose()
        assert [len(m._forward_hooks) for m in model.modules()] == hooks
        assert not len(scheduler.monitor.hooks.outputs)


class TestBatches:
    def loader(self, form):
        for *inputs, labels in loaders()[0]:
            named = dict(zip(("audio", "visual"), inputs, strict=True))
            yield {
                "tuple": (*inputs, labels),
                "list": [*inputs, labels],
                "labels": {**named, "labels": labels},
                "label": {**named, "label": labels},
                "own": {"x": named, "y": labels},
            }[form]

    @pytest.mark.parametrize(
        ("make", "form"),
        [
            (Concat, "tuple"),
            (Concat, "list"),
            (HuggingFaceStyle, "labels"),
            (HuggingFaceStyle, "label"),
            (BatchDict, "labels"),
        ],
    )
    def test_known_forms(self, make, form):
        model = make()
        found = features_of(watch(model), self.loader(form))
        expected = torch.cat([labels for *_, labels in loaders()[0]])
        assert torch.equal(found["audio"].labels, expected)
        torch.testing.assert_close(found["audio"].features, eval_features(model, loaders()[0], "audio"))

    def test_other_forms_need_forward(self):
        model = BatchDict()

        def forward(model, given):
            model(given["x"])
            return given["y"]

        with pytest.raises(TypeError, match="Pass `forward=`"):
            features_of(watch(model), self.loader("own"))
        found = features_of(watch(model), self.loader("own"), forward=forward)
        assert len(found["visual"]) == 60

    def test_forward_may_return_logits_where_the_batch_shows_its_labels(self):
        model = Concat()
        found = features_of(
            watch(model), self.loader("tuple"), forward=lambda model, given: model(*given[:-1])
        )
        assert len(found["visual"]) == 60

    def test_anything_else_is_refused(self):
        with pytest.raises(TypeError, match="Found Tensor"):
            features_of(watch(Concat()), [torch.zeros(3)])

    def test_ignored_samples_are_left_out(self):
        inputs, labels = batch(8)
        labels[3] = -100
        found = features_of(watch(Concat()), [(*inputs, labels)])
        assert len(found["audio"]) == 7
        assert -100 not in found["audio"].labels

    def test_a_modality_that_a_batch_lacks(self):
        class Partial(Concat):
            def forward(self, *inputs):
                a, v = (*inputs, None)[:2]
                z = torch.zeros(len(a), 4) if v is None else self.encoders["visual"](v)
                return self.head(torch.cat([self.encoders["audio"](a), z], 1))

        (a, v), labels = batch(8)
        found = features_of(watch(Partial()), [(a, v, labels), (a, labels)])
        assert (len(found["audio"]), len(found["visual"])) == (16, 8)


class TestShapes:
    @pytest.mark.parametrize("wrapping", ["tuple", "dict", "dataclass", "pooled"])
    def test_outputs_that_are_more_than_a_tensor(self, wrapping):
        model = ConcatOfWrapped(wrapping)
        found = features_of(watch(model), loaders()[0])
        assert found["audio"].features.shape == (60, 4)

    def test_select_of_the_monitor(self):
        model = ConcatOfWrapped("list")
        select = {"audio": lambda output: output[0][:, :2]}
        monitor = bo.ModalityMonitor(model, model.modalities, select=select)
        assert features_of(monitor, loaders()[0])["audio"].features.shape == (60, 2)

    @pytest.mark.parametrize(
        ("encoder", "pool", "width"),
        [
            (Tokens, "auto", 4),
            (Tokens, "mean", 4),
            (Tokens, "max", 4),
            (Tokens, "flatten", 12),
            (Signal, lambda z: z.amax(2), 4),
        ],
    )
    def test_pooling(self, encoder, pool, width):
        model = Concat(encoder=encoder, between=lambda z: z.flatten(1), joint_width=32)
        monitor = bo.ModalityMonitor(model, model.modalities)
        monitor.model.forward = lambda *inputs: model.encode(*inputs)
        assert features_of(monitor, loaders()[0], pool=pool)["audio"].features.shape == (60, width)

    def test_auto_takes_what_the_head_gets(self):
        model = Concat(encoder=Signal, between=lambda z: z.amax(2))
        monitor = watch(model)
        inputs, labels = batch()
        train_step(model, inputs, labels)
        found = features_of(monitor, [(*inputs, labels)])
        expected = model.encoders["audio"](inputs[0]).amax(2)
        torch.testing.assert_close(found["audio"].features, expected.detach())

    def test_a_pool_of_another_shape_is_refused(self):
        with pytest.raises(ValueError, match="`pool` should return"):
            features_of(watch(Concat()), loaders()[0], pool=lambda z: z.mean())

    def test_rows_that_are_no_samples(self):
        class Frames(nn.Linear):
            def forward(self, x):
                return super().forward(x).repeat(3, 1)

        model = Concat(encoder=Frames)
        inputs, labels = batch()
        monitor, loader = watch(model), [(*inputs, labels)]
        with pytest.raises(
            ValueError, match=r"returned 24 rows for 8 samples.*`select=`.*from the training loader"
        ):
            features_of(monitor, loader, forward=lambda m, given: m.encode(*given[:-1]))


class NeedsMore(Concat):
    """Its forward takes more than the encoders' inputs."""

    def forward(self, *inputs, scale):  # type: ignore[override]
        return super().forward(*inputs) * scale


@pytest.mark.parametrize("form", ["tuple", "mapping"])
def test_a_forward_that_takes_more_inputs_names_forward(form):
    model = NeedsMore()
    inputs, labels = batch()
    given = (*inputs, labels) if form == "tuple" else {"audio": inputs[0], "labels": labels}
    with pytest.raises(TypeError, match=r"the forward of NeedsMore takes. Found .*Pass `forward=`"):
        features_of(watch(model), [given])
    found = features_of(watch(model), [(*inputs, labels)], forward=lambda m, given: m(*given[:-1], scale=2.0))
    assert len(found["audio"]) == len(labels)


class TestProgress:
    def test_asked_for(self, capsys):
        _, _, scheduler = scheduled(progress=True)
        scheduler.diagnose()
        shown = capsys.readouterr()
        assert shown.out == ""
        assert "training features" in shown.err

    @pytest.mark.parametrize("progress", [None, False])
    def test_silent(self, progress, capsys):
        _, _, scheduler = scheduled(progress=progress)
        scheduler.diagnose()
        assert capsys.readouterr() == ("", "")

    def test_without_tqdm(self, monkeypatch):
        found = builtins.__import__

        def missing(name, *args, **kwargs):
            if name == "tqdm":
                raise ImportError(name)
            return found(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", missing)
        monkeypatch.delitem(sys.modules, "tqdm", raising=False)
        assert scheduled()[2].diagnose()
        with pytest.raises(ImportError, match=r"pip install 'balanceopt\[progress\]'"):
            scheduled(progress=True)[2].diagnose()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it
def test_compiled_models():
    torch._dynamo.reset()
    model = Concat(encoder=batch_norm)
    plain = bo.diagnose(*loaders(), monitor=watch(model), seed=0)
    model.encoders["audio"] = cast(nn.Module, torch.compile(model.encoders["audio"], backend="eager"))
    monitor = watch(model)
    whole = torch.compile(model, backend="eager")
    whole(*batch()[0]).sum().backward()
    before = [m.training for m in model.modules()]
    found = bo.diagnose(*loaders(), monitor=monitor, seed=0)
    assert [m.training for m in model.modules()] == before
    assert found.train_count == plain.train_count
    torch._dynamo.reset()


def test_a_monitor_without_hooks_is_refused():
    _, _, scheduler = scheduled()
    scheduler.monitor.remove()
    with pytest.raises(RuntimeError, match="hooks were removed"):
        scheduler.diagnose()


def test_undisturbed_restores_after_an_exception():
    model = Concat(encoder=batch_norm)
    norm: Any = model.get_submodule("encoders.audio.1")

    def fail():
        undo = Undo()
        with undo, undo:
            leave_undisturbed(undo, model, None)
            assert not norm.training
            assert not torch.is_grad_enabled()
            norm.running_mean.add_(1)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert norm.training
    assert torch.is_grad_enabled()
    assert not norm.running_mean.any()
