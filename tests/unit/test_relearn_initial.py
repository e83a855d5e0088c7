"""The weights that encoders go back to."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import nn

import balanceopt as bo
from tests.models import CLASSES, Concat, batch_norm, watch
from tests.relearning import loaders, move_away, scheduled, train_epoch, weights


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.audio, self.visual = nn.LazyLinear(4), nn.Sequential(nn.LazyLinear(6), nn.LazyBatchNorm1d())
        self.head = nn.Linear(10, CLASSES)

    def forward(self, a, v):
        return self.head(torch.cat([self.audio(a), self.visual(v)], 1))


def scheduler_of(model, encoders, **options):
    monitor = bo.ModalityMonitor(model, encoders, head="head")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return optimizer, bo.ReLearnScheduler(
        optimizer, monitor, *loaders(), every=1, lam=50.0, seed=0, epochs=99, **options
    )


class TestLazy:
    def test_copied_before_the_first_step(self):
        model = Lazy()
        optimizer, scheduler = scheduler_of(model, {"audio": "audio", "visual": "visual"})
        assert scheduler.snapshot_bytes == 0
        start: dict[str, Any] = {}

        def note(optimizer, args, kwargs):
            start.setdefault("weights", weights(model))

        optimizer.register_step_pre_hook(note)
        train_epoch(model, optimizer, scheduler.train_loader)
        saved = scheduler.state_dict()["initial"]
        assert {"audio.weight", "audio.bias", "visual.1.weight"} <= set(saved)
        for name, value in saved.items():
            assert torch.equal(value, start["weights"][name])
        assert scheduler.step() is not None

    def test_a_checkpoint_may_come_before_the_first_pass(self):
        model = Lazy()
        optimizer, scheduler = scheduler_of(model, {"audio": "audio", "visual": "visual"})
        train_epoch(model, optimizer, scheduler.train_loader)
        state = scheduler.state_dict()
        fresh = Lazy()
        _, again = scheduler_of(fresh, {"audio": "audio", "visual": "visual"})
        again.load_state_dict(state)
        train_epoch(fresh, torch.optim.SGD(fresh.parameters(), lr=0.1), again.train_loader)
        assert torch.equal(again.state_dict()["initial"]["audio.weight"], state["initial"]["audio.weight"])


def test_unfrozen_later():
    model, optimizer, scheduler = scheduled(lam=50.0)
    model = Concat()
    model.encoders["visual"].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = bo.ReLearnScheduler(optimizer, watch(model), *loaders(), every=1, lam=50.0, epochs=99)
    frozen = sum(p.numel() for p in model.encoders["audio"].parameters())
    assert scheduler.snapshot_bytes == 4 * frozen
    start = weights(model)
    model.encoders["visual"].requires_grad_(True)
    train_epoch(model, optimizer, scheduler.train_loader)
    current = weights(model)
    found: Any = scheduler.step()
    alpha = found.strength["visual"]
    for name in ("encoders.visual.0.weight", "encoders.visual.2.bias"):
        expected = (1 - alpha) * current[name] + alpha * start[name]
        torch.testing.assert_close(model.get_parameter(name).detach(), expected)


def test_parameters_that_came_later_are_left_alone_and_said():
    model, _, scheduler = scheduled(lam=50.0, equal_counts=False)
    move_away(model)
    model.encoders["audio"].register_parameter("added", nn.Parameter(torch.ones(2)))
    model.encoders["visual"].register_parameter("added", nn.Parameter(torch.ones(2)))
    with pytest.warns(UserWarning, match="came after the scheduler was built"):
        scheduler.step()
    assert torch.equal(model.encoders["visual"].added, torch.ones(2))


class TestSurgery:
    """Layers that were taken out leave nothing to go back to, whatever the names of those in their place."""

    @pytest.mark.parametrize("width", [8, 5], ids=["same shapes", "others"])
    @pytest.mark.parametrize("reached", [False, True], ids=["left alone", "resumed"])
    def test_new_layers_stay_and_old_ones_go_back(self, width, reached):
        model, _, scheduler = scheduled(lam=50.0, equal_counts=False)
        start = weights(model)
        move_away(model)
        audio = model.encoders["audio"]
        hidden = audio[0].out_features
        audio[0] = nn.Linear(audio[0].in_features, hidden if width == 8 else width)
        if width != 8:
            audio[2] = nn.Linear(width, audio[2].out_features)
        before = weights(model)
        if reached:
            state = scheduler.state_dict()
            scheduler.load_state_dict(state)
            assert state["initial"]["encoders.audio.0.weight"] is None
        with pytest.warns(UserWarning, match=r"\['encoders.audio.0.weight', 'encoders.audio.0.bias'"):
            found: Any = scheduler.step()
        assert found.strength["audio"] > 0
        alpha = found.strength["visual"]
        for name, value in model.state_dict().items():
            if "audio.0" in name or (width != 8 and "audio" in name):
                assert torch.equal(value, before[name])
            elif "encoders" in name:
                alpha = found.strength["audio" if "audio" in name else "visual"]
                torch.testing.assert_close(value, (1 - alpha) * before[name] + alpha * start[name])

    def test_a_layer_that_moves_to_another_name_keeps_its_start(self):
        model, _, scheduler = scheduled(lam=50.0, equal_counts=False)
        start = weights(model)
        move_away(model)
        model.encoders["audio"].insert(0, nn.Identity())
        saved = scheduler.state_dict()["initial"]
        assert torch.equal(saved["encoders.audio.1.weight"], start["encoders.audio.0.weight"])

    def test_what_was_taken_out_is_not_counted_any_more(self):
        model, optimizer, scheduler = scheduled()
        model.encoders["audio"][0] = nn.Identity()
        optimizer.param_groups[0]["params"] = list(model.parameters())
        gc.collect()
        left = [p for m in model.modalities.values() for p in m.parameters()]
        assert scheduler.snapshot_bytes == sum(4 * p.numel() for p in left)


class TestGiven:
    def back_to(self, initial, model, **options):
        scheduler = bo.ReLearnScheduler(
            torch.optim.SGD(model.parameters(), lr=0.1),
            watch(model),
            *loaders(),
            initial=initial,
            epochs=99,
            **options,
        )
        return scheduler.state_dict()["initial"]

    def test_of_the_whole_model(self):
        model, pretrained = Concat(), Concat()
        for prefix in ("", "module.", "_orig_mod."):
            state = {prefix + name: value for name, value in pretrained.state_dict().items()}
            found = self.back_to(state, model)
            assert set(found) == {n for n, _ in model.named_parameters() if n.startswith("encoders.")}
            assert all(torch.equal(found[n], pretrained.state_dict()[n]) for n in found)

    def test_of_each_encoder(self):
        model, pretrained = Concat(), Concat()
        state = {name: encoder.state_dict() for name, encoder in pretrained.modalities.items()}
        found = self.back_to(state, model)
        assert all(torch.equal(found[n], pretrained.state_dict()[n]) for n in found)

    def test_is_a_copy(self):
        model = Concat()
        state = copy.deepcopy(model.state_dict())
        found = self.back_to(state, model)
        state["encoders.audio.0.weight"].zero_()
        assert found["encoders.audio.0.weight"].any()

    def test_missing_and_misshapen(self):
        model = Concat()
        state = dict(model.state_dict())
        del state["encoders.audio.0.bias"]
        with pytest.raises(ValueError, match=r"Missing: \['encoders.audio.0.bias'\]"):
            self.back_to(state, model)
        with pytest.raises(ValueError, match="should have shape"):
            self.back_to({**model.state_dict(), "encoders.audio.0.bias": torch.zeros(3)}, model)


def test_snapshot_is_a_copy_on_the_device_asked_for():
    model, optimizer, scheduler = scheduled(snapshot_device="cpu")
    start = weights(model)
    train_epoch(model, optimizer, scheduler.train_loader)
    found = scheduler.state_dict()["initial"]
    assert all(torch.equal(value, start[name]) for name, value in found.items())
    assert all(value.device.type == "cpu" for value in found.values())


def test_a_meta_snapshot_device_is_used():
    _, _, scheduler = scheduled(snapshot_device="meta")
    assert all(value.is_meta for value in scheduler.state_dict()["initial"].values())


def test_names_do_not_depend_on_compilation():
    model: Any = Concat(encoder=batch_norm)
    plain = bo.ReLearnScheduler(torch.optim.SGD(model.parameters(), 0.1), watch(model), *loaders(), epochs=99)
    model.encoders["audio"] = torch.compile(model.encoders["audio"], backend="eager")
    compiled = bo.ReLearnScheduler(
        torch.optim.SGD(model.parameters(), 0.1), watch(model), *loaders(), epochs=99
    )
    assert set(compiled.state_dict()["initial"]) == set(plain.state_dict()["initial"])


def test_remove_takes_the_taps_off():
    model = Lazy()
    _, scheduler = scheduler_of(model, {"audio": "audio", "visual": "visual"})
    assert len(scheduler.monitor.hooks.outputs) == 1
    scheduler.remove()
    scheduler.remove()
    assert not len(scheduler.monitor.hooks.outputs)


def test_nothing_listens_once_all_is_copied():
    model = Lazy()
    optimizer, scheduler = scheduler_of(model, {"audio": "audio", "visual": "visual"})
    train_epoch(model, optimizer, scheduler.train_loader)
    assert len(scheduler.monitor.hooks.outputs) == 0


def test_a_dropped_scheduler_leaves_nothing_behind():
    _, scheduler = scheduler_of(Lazy(), {"audio": "audio", "visual": "visual"})
    monitor = scheduler.monitor
    assert len(monitor.hooks.outputs) == 1
    del scheduler
    gc.collect()
    assert len(monitor.hooks.outputs) == 0


def test_copies_of_the_model_leave_the_scheduler_behind():
    model = Concat()
    model.encoders["visual"].requires_grad_(False)
    _, scheduler = scheduler_of(model, model.modalities)
    twin = copy.deepcopy(scheduler.monitor)
    assert not len(twin.hooks.outputs)
    assert len(scheduler.monitor.hooks.outputs) == 1
