"""ReLearnScheduler: when it fires, what it changes, what it keeps."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_optimizer
from torch import nn

import balanceopt as bo
from balanceopt.functional import soft_reinit_
from balanceopt.relearn import _initial, _scheduler
from tests.interrupts import first_and_last, interrupted, lines_of
from tests.models import FUSIONS, INPUTS, Concat, batch, batch_norm, watch
from tests.relearning import loaders, move_away, samples, scheduled, train_epoch, weights


def lerped(start: dict, current: dict, name: str, alpha: float) -> torch.Tensor:
    return (1 - alpha) * current[name] + alpha * start[name]


class TestWhen:
    def test_fires_at_every_nth_step(self):
        _, _, scheduler = scheduled(every=3, max_relearns=None)
        fired = [n for n in range(1, 10) if scheduler.step() is not None]
        assert fired == [3, 6, 9]
        assert scheduler.last_epoch == 9

    @pytest.mark.parametrize(
        ("every", "epochs", "first", "expected"),
        [
            (2, 6, None, [2, 4]),
            (2, 7, None, [2, 4]),
            (2, 8, None, [2, 4, 6]),
            (3, 9, 1, [1, 4]),
            (2, 9, 3, [3, 5, 7]),
            (1, 2, None, [1]),
        ],
    )
    def test_no_later_than_training_can_make_good(self, every, epochs, first, expected):
        _, _, scheduler = scheduled(every=every, epochs=epochs, first=first, max_relearns=None)
        assert [n for n in range(1, epochs + 1) if scheduler.step() is not None] == expected

    def test_the_published_epochs(self):
        _, _, scheduler = scheduled(every=20, epochs=90, first=21)
        assert [n for n in range(1, 91) if scheduler.step() is not None] == [21, 41, 61]

    def test_a_run_of_no_known_length_is_said(self):
        with pytest.warns(UserWarning, match="without `epochs=` encoders go back after every 20 epochs"):
            _, _, scheduler = scheduled(every=20, epochs=None)
        scheduler.last_epoch = 19
        assert scheduler.step() is not None

    @pytest.mark.parametrize("options", [{"every": 20, "epochs": 39}, {"every": 2, "first": 5, "epochs": 6}])
    def test_a_run_too_short_to_fire_is_said(self, options):
        with pytest.warns(UserWarning, match=f"nothing fires in a run of {options['epochs']} epochs"):
            _, _, scheduler = scheduled(**options)
        assert all(scheduler.step() is None for _ in range(options["epochs"]))

    @pytest.mark.parametrize(("limit", "expected"), [(0, []), (2, [1, 2]), (None, [1, 2, 3, 4])])
    def test_no_more_often_than_asked(self, limit, expected):
        _, _, scheduler = scheduled(max_relearns=limit)
        assert [n for n in range(1, 5) if scheduler.step() is not None] == expected

    def test_no_pass_between(self):
        model, _, scheduler = scheduled(every=2)
        calls = []
        model.register_forward_hook(lambda *_: calls.append(1))
        scheduler.step()
        assert calls == []
        scheduler.step()
        assert len(calls) == 4 + 3

    def test_the_diagnosis_tells_its_epoch(self):
        _, _, scheduler = scheduled(every=2)
        assert scheduler.step() is None
        found = scheduler.step()
        assert found is not None
        assert found.epoch == 2


class TestWhat:
    @pytest.mark.parametrize("make", FUSIONS.values(), ids=FUSIONS)
    @pytest.mark.parametrize("modalities", [2, 3])
    def test_encoders_go_back_by_their_own_strength(self, make, modalities):
        model, _, scheduler = scheduled(make, modalities, lam=20.0, equal_counts=False)
        start = weights(model)
        move_away(model)
        current = weights(model)
        storages = {name: p.data_ptr() for name, p in model.named_parameters()}
        found = scheduler.step()
        assert found is not None
        assert found.modalities == model.names
        assert any(alpha > 0.01 for alpha in found.strength.values())
        for name, value in model.state_dict().items():
            owner = next((m for m in model.names if name.startswith(f"encoders.{m}.")), None)
            expected = lerped(start, current, name, found.strength[owner]) if owner else current[name]
            torch.testing.assert_close(value, expected, msg=name)
        assert {name: p.data_ptr() for name, p in model.named_parameters()} == storages

    def test_strength_is_that_of_the_gap(self):
        _, _, scheduler = scheduled(lam=5.0)
        found = scheduler.step()
        assert found is not None
        for name, gap in found.gap.items():
            assert gap == abs(found.train_purity[name] - found.val_purity[name])
            assert found.strength[name] == pytest.approx(math.tanh(5 * gap))

    def test_features_only_monitors_will_do(self):
        model = Concat()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        monitor = bo.ModalityMonitor(model, model.modalities)
        assert bo.ReLearnScheduler(optimizer, monitor, *loaders(), every=1, epochs=99).step() is not None

    def test_one_modality_will_do(self):
        _, _, scheduler = scheduled(modalities=1)
        assert scheduler.step() is not None

    def test_works_with_a_wrapped_optimizer(self):
        model = Concat()
        monitor = watch(model)
        base = torch.optim.SGD(bo.modality_groups(model, model.modalities), lr=0.1, momentum=0.9)
        optimizer = bo.ModulatedOptimizer(base, monitor)
        scheduler = bo.ReLearnScheduler(
            optimizer, monitor, *loaders(), every=1, optimizer_state="reset", epochs=99
        )
        train_epoch(model, optimizer, scheduler.train_loader)
        assert len(base.state) == len(list(model.parameters()))
        assert scheduler.step() is not None
        assert set(base.state) == {model.head.weight, model.head.bias}

    def test_frozen_parameters_stay(self):
        model, _, scheduler = scheduled(lam=50.0)
        move_away(model)
        frozen = model.encoders["audio"][0]
        frozen.requires_grad_(False)
        before = frozen.weight.clone()
        scheduler.step()
        assert torch.equal(frozen.weight, before)

    def test_lam_zero_changes_no_bit(self):
        plain, other = Concat(), Concat()
        other.load_state_dict(plain.state_dict())
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (plain, other)]
        data = samples(60)
        train = [torch.utils.data.DataLoader(data, 16, shuffle=True) for _ in range(2)]
        scheduler = bo.ReLearnScheduler(
            optimizers[1],
            watch(other),
            train[1],
            loaders()[1],
            every=1,
            lam=0.0,
            max_relearns=None,
            epochs=99,
        )
        torch.manual_seed(3)
        for _ in range(3):
            train_epoch(plain, optimizers[0], train[0])
        torch.manual_seed(3)
        for _ in range(3):
            train_epoch(other, optimizers[1], train[1])
            scheduler.step()
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters(), strict=True))


class TestOptimizerState:
    def trained(self, make, option):
        model = Concat()
        optimizer = make(model.parameters())
        scheduler = bo.ReLearnScheduler(
            optimizer, watch(model), *loaders(), every=1, lam=20.0, optimizer_state=option, seed=0, epochs=99
        )
        train_epoch(model, optimizer, scheduler.train_loader)
        before = self.state(model, optimizer)
        found = scheduler.step()
        after = self.state(model, optimizer)
        train_epoch(model, optimizer, scheduler.train_loader)  # the optimizer goes on
        return found, before, after

    def state(self, model, optimizer):
        held = {n: optimizer.state[p] for n, p in model.named_parameters() if p in optimizer.state}
        return {n: {k: torch.as_tensor(v).clone() for k, v in own.items()} for n, own in held.items()}

    def test_keep(self):
        _, before, after = self.trained(lambda p: torch.optim.Adam(p, lr=0.01), "keep")
        assert all(torch.equal(before[n][k], after[n][k]) for n in before for k in before[n])

    @pytest.mark.parametrize("make", [torch.optim.Adam, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)])
    def test_reset(self, make):
        found, before, after = self.trained(make, "reset")
        back = {n for n in before if any(f".{m}." in n and alpha > 0 for m, alpha in found.strength.items())}
        assert back
        assert set(after) == set(before) - back


def kept_copies(optimizer, model):
    """Every tensor in the state of an optimizer and of those in it that has the size of its parameter."""
    holders = [optimizer, *(x for x in vars(optimizer).values() if isinstance(x, torch.optim.Optimizer))]
    return {
        (i, name, key): value.detach().clone()
        for i, holder in enumerate(holders)
        for name, p in model.named_parameters()
        for key, value in holder.state.get(p, {}).items()
        if isinstance(value, torch.Tensor) and value.shape == p.shape
    }


class Held(torch.optim.Optimizer):
    """Holds the optimizer that steps under a name of its own, and a slow copy of the weights, as timm's Lookahead."""

    def __init__(self, base):
        super().__init__(base.param_groups, {})
        self._base_optimizer = base

    def step(self, closure=None):
        self._base_optimizer.step()
        for group in self.param_groups:
            for p in group["params"]:
                own = self.state[p]
                slow = own.setdefault("lookahead_slow_buff", p.detach().clone())
                slow.lerp_(p.detach(), 0.5)
                p.data.copy_(slow)


def sgd(params, lr=0.1):
    return torch.optim.SGD(params, lr=lr, momentum=0.9)


class Listed(Held):
    def __init__(self, base):
        torch.optim.Optimizer.__init__(self, base.param_groups, {})
        self.optimizers = [base]

    @property
    def _base_optimizer(self):
        return self.optimizers[0]


def lookahead(base: torch.optim.Optimizer) -> torch_optimizer.Lookahead:
    optimizer = torch_optimizer.Lookahead(base, k=3)
    # It never makes these. Torch asks for them on all instances of a class once one of them was loaded.
    for kind in ("pre", "post"):
        vars(optimizer)[f"_optimizer_step_{kind}_hooks"] = {}
    return optimizer


AROUND = {
    "torch_optimizer.Lookahead": lambda params: lookahead(sgd(params)),
    "another name": lambda params: Held(sgd(params)),
    "a list": lambda params: Listed(sgd(params)),
}


# Options of a scheduler that re-initialises strongly after every epoch.
EACH_EPOCH: dict[str, Any] = {"every": 1, "epochs": 9, "lam": 20.0, "equal_counts": False}


class TestOptimizersInside:
    @pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "wrapped"])
    @pytest.mark.parametrize("name", AROUND)
    def test_reset_reaches_them(self, name, wrapped):
        model = Concat()
        monitor = watch(model)
        base: Any = AROUND[name](model.parameters())
        optimizer: Any = bo.ModulatedOptimizer(base, monitor, seed=0) if wrapped else base
        inner: Any = getattr(base, "_base_optimizer", getattr(base, "optimizer", None))
        scheduler = bo.ReLearnScheduler(optimizer, monitor, *loaders(), **EACH_EPOCH, optimizer_state="reset")
        train_epoch(model, optimizer, scheduler.train_loader)
        found: Any = scheduler.step()
        back = {m for m, alpha in found.strength.items() if alpha > 0}
        assert back
        for p_name, p in model.named_parameters():
            assert (p in inner.state) == (not any(f".{m}." in p_name for m in back))
        train_epoch(model, optimizer, scheduler.train_loader)

    @pytest.mark.filterwarnings("ignore:This overload of:UserWarning")  # Ranger's
    @pytest.mark.parametrize("option", ["keep", "reset"])
    @pytest.mark.parametrize(
        "make",
        [
            lambda params: lookahead(sgd(params, 0.0)),
            lambda params: Held(sgd(params, 0.0)),
            lambda params: torch_optimizer.Ranger(params, lr=1e-30, k=3),
        ],
        ids=["Lookahead", "another", "Ranger"],
    )
    def test_copies_of_the_weights_go_back_too(self, make, option):
        # With a learning rate of 0 the weights stay where re-learning has put them, copies or not.
        model = Concat()
        optimizer: Any = make(model.parameters())
        scheduler = bo.ReLearnScheduler(
            optimizer, watch(model), *loaders(), **EACH_EPOCH, optimizer_state=option
        )
        move_away(model)
        for _ in range(2):
            train_epoch(model, optimizer, scheduler.train_loader)
        found: Any = scheduler.step()
        assert max(found.strength.values()) > 0.1
        expected = weights(model)
        for _ in range(3):
            train_epoch(model, optimizer, scheduler.train_loader)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, expected[name], msg=name)

    @pytest.mark.parametrize(
        "kind", [torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.ASGD, torch.optim.Rprop]
    )
    def test_reset_is_as_before_the_first_step(self, kind):
        model = Concat()
        optimizer: Any = kind(model.parameters(), lr=0.1)
        scheduler = bo.ReLearnScheduler(
            optimizer, watch(model), *loaders(), **EACH_EPOCH, optimizer_state="reset"
        )
        train_epoch(model, optimizer, scheduler.train_loader)
        found: Any = scheduler.step()
        back = [
            p
            for n, p in model.named_parameters()
            if any(f".{m}." in n and a for m, a in found.strength.items())
        ]
        assert back
        twins = [p.detach().clone().requires_grad_() for p in back]
        for p, twin in zip(back, twins, strict=True):
            p.grad = twin.grad = torch.randn_like(p)
        for p in set(model.parameters()) - set(back):
            p.grad = None
        optimizer.step()
        kind(twins, lr=0.1).step()
        assert all(torch.equal(p, twin) for p, twin in zip(back, twins, strict=True))


def test_running_statistics_stay():
    model, optimizer, scheduler = scheduled(model_options={"encoder": batch_norm}, lam=20.0)
    train_epoch(model, optimizer, scheduler.train_loader)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    found = scheduler.step()
    assert max(found.strength.values()) > 0
    assert before
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


class TestState:
    def test_a_resumed_run_goes_back_to_the_same_weights(self):
        model, optimizer, scheduler = scheduled(every=2, lam=20.0)
        train_epoch(model, optimizer, scheduler.train_loader)
        scheduler.step()
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "scheduler": scheduler.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        resumed, _, again = scheduled(every=2, lam=20.0, seed=99)
        resumed.load_state_dict(saved["model"])
        again.load_state_dict(saved["scheduler"])
        assert again.last_epoch == 1
        assert scheduler.step() == again.step()
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))

    def test_counts_of_relearns_are_kept(self):
        _, _, scheduler = scheduled(max_relearns=2)
        scheduler.step()
        _, _, again = scheduled(max_relearns=2)
        again.load_state_dict(scheduler.state_dict())
        assert [again.step() is not None for _ in range(2)] == [True, False]

    def test_another_models_state_is_refused_and_nothing_changes(self):
        _, _, scheduler = scheduled()
        _, _, other = scheduled(modalities=3)
        for _ in range(2):
            other.step()
        with pytest.raises(ValueError, match=r"Unknown: \['encoders.text.0.bias'"):
            scheduler.load_state_dict(other.state_dict())
        assert scheduler.last_epoch == 0

    def test_other_shapes_are_refused(self):
        _, _, scheduler = scheduled()
        _, _, other = scheduled(model_options={"width": 3})
        with pytest.raises(ValueError, match="should have shape"):
            scheduler.load_state_dict(other.state_dict())

    def test_its_size_is_stated(self):
        model, _, scheduler = scheduled()
        encoders = sum(p.numel() for e in model.modalities.values() for p in e.parameters())
        assert scheduler.snapshot_bytes == 4 * encoders
        assert f"snapshot={4 * encoders} bytes" in repr(scheduler)


class TestFailures:
    def broken(self, monkeypatch, model, scheduler, optimizer, error=RuntimeError):
        train_epoch(model, optimizer, scheduler.train_loader)
        model.encoders["audio"].eval()
        before, modes = weights(model), [m.training for m in model.modules()]
        state = {k: v["momentum_buffer"].clone() for k, v in optimizer.state.items()}
        with pytest.raises(error):
            scheduler.step()
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        assert [m.training for m in model.modules()] == modes
        assert all(torch.equal(state[k], v["momentum_buffer"]) for k, v in optimizer.state.items())
        assert (scheduler.last_epoch, scheduler.relearns) == (0, 0)

    def test_in_a_pass(self, monkeypatch):
        model, optimizer, scheduler = scheduled(model_options={"encoder": batch_norm})

        def fail(module, args):
            if not torch.is_grad_enabled():
                raise RuntimeError("in the middle")

        model.head.register_forward_pre_hook(fail)
        self.broken(monkeypatch, model, scheduler, optimizer)

    def test_in_the_diagnosis(self, monkeypatch):
        model, optimizer, scheduler = scheduled()

        def fail(*args, **kwargs):
            raise MemoryError

        monkeypatch.setattr(_scheduler, "diagnose_samples", fail)
        self.broken(monkeypatch, model, scheduler, optimizer, MemoryError)

    def test_in_the_re_initialisation(self, monkeypatch):
        model, optimizer, scheduler = scheduled(lam=50.0, optimizer_state="reset")

        def fail_late(params, initial, strengths):
            soft_reinit_(params[:-1], initial[:-1], strengths[:-1])
            raise KeyboardInterrupt

        monkeypatch.setattr(_initial, "soft_reinit_", fail_late)
        self.broken(monkeypatch, model, scheduler, optimizer, KeyboardInterrupt)

    def test_at_any_line_all_of_the_step_is_done_or_nothing(self):
        _, _, scheduler = scheduled(equal_counts=False)
        diagnosis = scheduler.diagnose()

        def world():
            torch.manual_seed(0)
            model = Concat()
            optimizer = lookahead(sgd(model.parameters()))
            scheduler: Any = bo.ReLearnScheduler(
                optimizer, watch(model), *loaders(), every=1, epochs=9, optimizer_state="reset"
            )
            scheduler.diagnose = lambda train, val: diagnosis
            train_epoch(model, optimizer, scheduler.train_loader)
            return model, optimizer, scheduler

        def fingerprint(model, optimizer, scheduler):
            state = {**weights(model), **kept_copies(optimizer, model)}
            return (scheduler.last_epoch, scheduler.relearns), {name: x.tolist() for name, x in state.items()}

        before, whole = fingerprint(*world()), world()
        lines = lines_of(whole[2].step)
        after = fingerprint(*whole)
        assert before[0] != after[0]
        assert before[1].keys() > after[1].keys()
        numbers = first_and_last(lines, {Path(name).name for name, _ in lines})
        assert len(numbers) > 60
        for number in numbers:
            parts = world()
            assert interrupted(parts[2].step, number, (KeyboardInterrupt, MemoryError)[number % 2])
            assert fingerprint(*parts) in (before, after), lines[number]

    def test_a_step_that_failed_can_be_tried_again(self, monkeypatch):
        _, _, scheduler = scheduled(every=2)
        scheduler.step()
        with monkeypatch.context() as broken:
            broken.setattr(_scheduler, "diagnose_samples", None)
            with pytest.raises(TypeError):
                scheduler.step()
        assert scheduler.step() is not None


class TestBadInput:
    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ({"every": 0}, "`every` should be a whole number of at least 1"),
            ({"max_relearns": -1}, "`max_relearns` should be a whole number of at least 0"),
            ({"lam": -1.0}, "`lam` should be a finite number of at least 0"),
            ({"normalize": "standard"}, "`normalize` should be one of"),
            ({"optimizer_state": "scale"}, "`optimizer_state` should be one of"),
            ({"n_init": 0}, "`n_init` should be a whole number of at least 1"),
            ({"classes": 6}, "`classes` should be a function"),
            ({"max_samples": 0}, "`max_samples` should be a whole number of at least 1"),
            ({"pool": "median"}, "`pool` should be one of"),
        ],
    )
    def test_options_outside_their_range(self, option, message):
        with pytest.raises(ValueError, match=message):
            scheduled(**option)

    def test_no_validation_data(self):
        model = Concat()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(ValueError, match="`val_loader` should yield batches"):
            bo.ReLearnScheduler(optimizer, watch(model), loaders()[0], None, epochs=99)
        with pytest.raises(TypeError, match="None for both loaders"):
            bo.ReLearnScheduler(optimizer, watch(model), ({}, torch.zeros(0)), loaders()[1], epochs=99)

    def test_what_is_no_optimizer_or_monitor(self):
        model: Any = Concat()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(TypeError, match="`optimizer` should be"):
            bo.ReLearnScheduler(model, watch(model), *loaders(), epochs=99)
        with pytest.raises(TypeError, match="`monitor` should be"):
            bo.ReLearnScheduler(optimizer, model, *loaders(), epochs=99)

    @pytest.mark.parametrize("empty", [0, 1])
    def test_a_loader_that_yields_nothing(self, empty):
        model, _, scheduler = scheduled()
        move_away(model)
        before = weights(model)
        setattr(scheduler, ("train_loader", "val_loader")[empty], [])
        with pytest.raises(ValueError, match=("no training features", "no validation features")[empty]):
            scheduler.step()
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            (torch.rand(8), "should be integers"),
            (torch.rand(8) > 0.5, "should be integers"),
            (torch.rand(8, 3), "should be integers"),
            (torch.zeros(8, 3, dtype=torch.int64), r"should have shape \(N,\)"),
            (torch.arange(5), "returned 8 rows for 5 samples"),
            (torch.ones(8, dtype=torch.int64), "two classes or more"),
        ],
    )
    def test_labels(self, labels, message):
        _, _, scheduler = scheduled()
        inputs, _ = batch()
        scheduler.train_loader = scheduler.val_loader = [(*inputs, labels)]
        with pytest.raises(ValueError, match=message):
            scheduler.step()

    def test_fewer_samples_than_clusters(self):
        model, _, scheduler = scheduled()
        move_away(model)
        before = weights(model)
        inputs, _ = batch(4)
        scheduler.val_loader = [(*inputs, torch.arange(4))]
        with pytest.warns(UserWarning, match="fewer than the 5 clusters"):
            found = scheduler.step()
        assert set(found.skipped) == set(model.names)
        assert scheduler.relearns == 0
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())

    def test_a_modality_with_nan_is_left_alone(self):
        model, _, scheduler = scheduled(lam=20.0, equal_counts=False)
        move_away(model)
        with torch.no_grad():
            model.encoders["audio"][2].bias[0] = math.nan
        before = weights(model)
        with pytest.warns(UserWarning, match="'audio' was left out of the diagnosis: its features are not"):
            found = scheduler.step()
        assert found.strength["audio"] == 0
        assert math.isnan(found.gap["audio"])
        assert found.strength["visual"] > 0
        for name, value in model.state_dict().items():
            same = torch.equal(value.nan_to_num(7.0), before[name].nan_to_num(7.0))
            assert same == ("visual" not in name)


def test_a_recorder_hears_each_diagnosis():
    _, _, scheduler = scheduled(every=2, max_relearns=None)
    with bo.Recorder(scheduler) as recorder:
        found = [scheduler.step() for _ in range(4)][1]
    steps, values = recorder.series("gap")["audio"]
    assert steps == [2, 4]
    assert values[0] == pytest.approx(found.gap["audio"])
    assert set(recorder.series("strength")) == {"audio", "visual"}


def test_shared_parameters_are_left_alone_and_said():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            shared = nn.Linear(8, 8)
            self.left = nn.Sequential(nn.Linear(INPUTS[0], 8), shared)
            self.right = nn.Sequential(nn.Linear(INPUTS[1], 8), shared)
            self.head = nn.Linear(16, 5)

        def forward(self, a, b):
            return self.head(torch.cat([self.left(a), self.right(b)], 1))

    model: Any = Tied()
    monitor = bo.ModalityMonitor(model, {"left": "left", "right": "right"}, head="head")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"shared with other modules \(left: 2, right: 2\)"):
        scheduler = bo.ReLearnScheduler(optimizer, monitor, *loaders(), every=1, lam=50.0, epochs=99)
    move_away(model)
    before = weights(model)
    scheduler.step()
    assert torch.equal(model.left[1].weight, before["left.1.weight"])
    assert not torch.equal(model.left[0].weight, before["left.0.weight"])
