"""Features streamed from the epoch's own passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import balanceopt as bo
from tests.models import Concat, batch_norm, watch
from tests.relearning import loaders, scheduled, train_epoch, weights


def validate(model, loader):
    model.eval()
    with torch.no_grad():
        for *inputs, _ in loader:
            model(*inputs)


def streaming(**options):
    model, optimizer, scheduler = scheduled(features="stream", **options)
    return model, optimizer, scheduler


def test_the_features_are_those_of_the_epochs_passes():
    model, optimizer, scheduler = streaming(model_options={"encoder": batch_norm})
    seen = []
    model.encoders["audio"].register_forward_hook(lambda m, a, out: seen.append(out.detach().clone()))
    train_epoch(model, optimizer, scheduler.train_loader)
    count = len(seen)
    validate(model, scheduler.val_loader)
    streamed = {split: scheduler._streamed(split)["audio"] for split in ("training", "validation")}
    assert torch.equal(streamed["training"].features, torch.cat(seen[:count]))
    assert torch.equal(streamed["validation"].features, torch.cat(seen[count:]))
    expected = torch.cat([labels for *_, labels in loaders()[1]])
    assert torch.equal(streamed["validation"].labels, expected)
    calls = len(seen)
    assert scheduler.step() is not None
    assert len(seen) == calls


def test_equals_a_pass_where_nothing_moves():
    model, _, scheduler = streaming()
    frozen = torch.optim.SGD(model.parameters(), lr=0.0)
    train_epoch(model, frozen, scheduler.train_loader)
    validate(model, scheduler.val_loader)
    assert scheduler.diagnose() == scheduler.diagnose(*loaders())


def test_only_the_epochs_that_fire_take_features():
    model, optimizer, scheduler = streaming(every=2, max_relearns=1)
    for fires in (False, True, False, False):
        assert bool(scheduler._stream.collectors) == fires
        train_epoch(model, optimizer, scheduler.train_loader)
        validate(model, scheduler.val_loader)
        assert (scheduler.step() is not None) == fires
    with pytest.raises(ValueError, match="only in the epochs whose step fires"):
        scheduler.diagnose()
    assert scheduler.diagnose(*loaders())


def test_each_epoch_starts_anew():
    model, optimizer, scheduler = streaming(every=1, max_relearns=None)
    for _ in range(2):
        train_epoch(model, optimizer, scheduler.train_loader)
        validate(model, scheduler.val_loader)
        assert scheduler.step().train_count["audio"] == 60


def test_a_loop_that_uses_the_bare_loader_is_told():
    model, optimizer, scheduler = streaming()
    train_epoch(model, optimizer, scheduler.train_loader.loader)
    before = weights(model)
    with pytest.raises(ValueError, match=r"iterate `scheduler.train_loader` in your loop"):
        scheduler.step()
    train_epoch(model, torch.optim.SGD(model.parameters(), lr=0.0), scheduler.train_loader)
    with pytest.raises(ValueError, match=r"iterate `scheduler.val_loader` in your loop"):
        scheduler.step()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_passes_of_another_kind_in_between_do_not_count():
    model, _, scheduler = streaming()
    for *inputs, labels in scheduler.train_loader:
        with torch.no_grad():
            model(*[torch.zeros_like(x) for x in inputs])
        F.cross_entropy(model(*inputs), labels).backward()
    model(*[torch.zeros(16, x.shape[1]) for x in inputs])  # between batches
    found = scheduler._streamed("training")["audio"]
    assert len(found) == 60
    assert torch.equal(found.labels, torch.cat([labels for *_, labels in loaders()[0]]))


def test_micro_batches_of_one_batch():
    model, _, scheduler = streaming()
    for *inputs, _ in scheduler.train_loader:
        for parts in zip(*(x.split(5) for x in inputs), strict=True):
            model(*parts)
    assert len(scheduler._streamed("training")["audio"]) == 60


def test_parts_that_do_not_add_up_are_left_out_and_said():
    model, _, scheduler = streaming()

    def work():
        for *inputs, _ in scheduler.train_loader:
            model(*[x[:3] for x in inputs])

    with pytest.warns(UserWarning, match="can't be told apart"):
        work()
    with pytest.raises(ValueError, match="no training features"):
        scheduler.step()


def test_validation_amid_training():
    model, _, scheduler = streaming()
    for i, (*inputs, labels) in enumerate(scheduler.train_loader):
        model.train()
        F.cross_entropy(model(*inputs), labels).backward()
        if i == 2:
            validate(model, scheduler.val_loader)
    assert len(scheduler._streamed("training")["audio"]) == 60
    assert len(scheduler._streamed("validation")["audio"]) == 40


def test_the_loop_may_break():
    model, _, scheduler = streaming()
    for *inputs, _ in scheduler.train_loader:
        model(*inputs)
        break
    assert len(scheduler._streamed("training")["audio"]) == 16
    assert scheduler._stream._batches == []


def test_features_that_the_fusion_changes_in_place():
    model, _, scheduler = streaming(model_options={"between": lambda z: z.relu_()})
    model.eval()
    with torch.no_grad():
        for *inputs, _ in scheduler.val_loader:
            model(*inputs)
    assert bool((scheduler._streamed("validation")["audio"].features < 0).any())


def test_the_loader_is_itself_otherwise():
    _, _, scheduler = streaming()
    inner = scheduler.train_loader.loader
    assert len(scheduler.train_loader) == len(inner)
    assert scheduler.train_loader.dataset is inner.dataset
    with pytest.raises(AttributeError):
        _ = scheduler.train_loader.nothing


def test_without_a_head():
    model = Concat()
    monitor = bo.ModalityMonitor(model, model.modalities)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = bo.ReLearnScheduler(optimizer, monitor, *loaders(), every=1, features="stream")
    train_epoch(model, optimizer, scheduler.train_loader)
    validate(model, scheduler.val_loader)
    assert scheduler.step() is not None


def test_removed():
    model, optimizer, scheduler = streaming()
    scheduler.remove()
    assert scheduler.monitor._taps == []
    train_epoch(model, optimizer, scheduler.train_loader)


def test_the_state_of_a_streaming_scheduler_starts_its_epoch_anew():
    _, _, scheduler = streaming(every=2)
    scheduler.step()
    _, _, again = streaming(every=2)
    assert not again._stream.collectors
    again.load_state_dict(scheduler.state_dict())
    assert again._stream.collectors


def test_a_monitor_of_the_same_model_is_not_disturbed():
    model = Concat()
    monitor = watch(model)
    accumulator = monitor.accumulator()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = bo.ReLearnScheduler(optimizer, monitor, *loaders(), every=1, features="stream")
    train_epoch(model, optimizer, scheduler.train_loader)
    found: Any = accumulator.take()
    assert found.count.tolist() == [60, 60]
