"""Re-learning over ranks: the result is that of one process on the samples of all."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_loader import load as load_checkpoint
from torch.distributed.checkpoint.state_dict_saver import save as save_checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset

import balanceopt as bo
from tests.models import Concat, batch_norm
from tests.ranks import needs_shards, on_ranks
from tests.relearning import move_away, samples, train_epoch

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(180)]

RANKS = 2
# How the training and the validation samples are cut over the ranks: unevenly.
CUTS = ((40, 20), (13, 27))


def untrained():
    torch.manual_seed(0)
    model = Concat(encoder=batch_norm)
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(1)
    move_away(model)
    return model, initial


def cut(data, sizes, rank):
    first = sum(sizes[:rank])
    return Subset(data, range(first, first + sizes[rank]))


def data():
    return samples(60, seed=1), samples(40, seed=2)


def scheduler_of(model, initial, train, val, **settings):
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    monitor = bo.ModalityMonitor(model, inner.modalities, head=inner.head)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    settings = {"every": 1, "lam": 20.0, "seed": 0, "initial": initial, **settings}
    return bo.ReLearnScheduler(optimizer, monitor, train, val, epochs=99, **settings)


SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"n_init": 2},
    {"normalize": "none", "seed": None},
)


def in_ddp(rank):
    results = []
    for settings in SETTINGS:
        model, initial = untrained()
        torch.manual_seed(100 + rank)  # what seed=None reads, on the first rank
        wrapped = DistributedDataParallel(model)
        shards = [cut(part, sizes, rank) for part, sizes in zip(data(), CUTS, strict=True)]
        batch_sizes = (7, 3) if rank else (16, 16)  # not the same number of batches either
        loaders = [DataLoader(s, n) for s, n in zip(shards, batch_sizes, strict=True)]
        scheduler = scheduler_of(wrapped, initial, *loaders, **settings)
        results.append((scheduler.step(), model.state_dict(), scheduler.relearns))
    return results


def test_equals_one_process_on_all_samples(tmp_path):
    ranks = on_ranks(in_ddp, tmp_path)
    for settings, *results in zip(SETTINGS, *ranks, strict=True):
        model, initial = untrained()
        torch.manual_seed(100)
        loaders = [DataLoader(part, 16) for part in data()]
        expected = scheduler_of(model, initial, *loaders, **settings).step()
        for found, state, relearns in results:
            assert found == expected
            assert relearns == 1
            for name, value in state.items():
                assert torch.equal(value, results[0][1][name]), name
                torch.testing.assert_close(value, model.state_dict()[name])


def with_gaps(rank):
    """One rank has no training batch; the other never sees a modality; a third case has one class."""
    model, initial = untrained()
    train, val = data()
    batches = [tuple(x[None] for x in part[0]) for part in (train, val)]
    results = []
    empty = scheduler_of(model, initial, DataLoader(train, 16) if rank else [], DataLoader(val, 16))
    results.append(empty.step())
    gone = scheduler_of(model, initial, [], DataLoader(val, 16))
    one_class = scheduler_of(model, initial, [batches[0]], [batches[0]])
    for scheduler in (gone, one_class):
        with pytest.raises(ValueError, match=r"no training features|two classes or more") as error:
            scheduler.step()
        results.append(str(error.value))
    labels = torch.arange(20) % 5
    features = (
        {"audio": torch.randn(20, 3)} if rank else {"audio": torch.randn(20, 3), "visual": torch.randn(20, 2)}
    )
    results.append(bo.diagnose((features, labels), (features, labels), monitor=empty.monitor, seed=0))
    return results


def test_ranks_agree_where_one_has_nothing(tmp_path):
    first, second = on_ranks(with_gaps, tmp_path)
    assert first == second
    # Of 60 training samples, all of one rank, and 80 validation samples: as many of both.
    assert first[0].train_count == first[0].val_count == {"audio": 60, "visual": 60}
    assert first[3].train_count == {"audio": 40, "visual": 20}
    assert not first[3].skipped


def through_a_checkpoint(scheduler, folder):
    """The state as torch.distributed.checkpoint gives it back."""
    save_checkpoint({"scheduler": scheduler.state_dict()}, checkpoint_id=folder)
    found = copy.deepcopy(scheduler.state_dict())
    for value in found["initial"].values():
        value.zero_()
    state = {"scheduler": {**found, "last_epoch": 0, "relearns": 0}}
    load_checkpoint(state, checkpoint_id=folder)
    return state["scheduler"]


def go_back_sharded(rank, mesh, what, folder):
    model, initial = untrained()
    if what == "encoders":
        for encoder in model.modalities.values():
            fully_shard(encoder, mesh=mesh)
    fully_shard(model, mesh=mesh)
    shards = [DataLoader(cut(part, (len(part) // 2,) * 2, rank), 16) for part in data()]
    scheduler = scheduler_of(model, initial, *shards, optimizer_state="reset")
    train_epoch(model, scheduler.optimizer, shards[0])
    before = {n: p.full_tensor() for n, p in model.named_parameters()}
    parts = {n: p.to_local().data_ptr() for n, p in model.named_parameters()}
    found = scheduler.step()
    assert {n: p.to_local().data_ptr() for n, p in model.named_parameters()} == parts
    after = {n: p.full_tensor() for n, p in model.named_parameters()}
    saved = through_a_checkpoint(scheduler, f"{folder}/{what}")
    assert (saved["last_epoch"], saved["relearns"]) == (1, 1)
    scheduler.load_state_dict(saved)
    again = scheduler.state_dict()["initial"]
    whole = {n: v.full_tensor() for n, v in saved["initial"].items()}
    assert all(torch.equal(v.full_tensor(), whole[n]) for n, v in again.items())
    train_epoch(model, scheduler.optimizer, shards[0])
    return found, before, after, whole


CASES = ("root", "encoders")


def sharded(rank, folder):
    mesh = init_device_mesh("cpu", (RANKS,))
    return [go_back_sharded(rank, mesh, what, folder) for what in CASES]


@needs_shards
def test_sharded_parameters_go_back(tmp_path):
    ranks = on_ranks(sharded, tmp_path, tmp_path)
    _, initial = untrained()
    for results in ranks:
        for (found, before, after, whole), (other, *_) in zip(results, ranks[0], strict=True):
            assert found == other
            assert all(alpha > 0 for alpha in found.strength.values())
            for name, value in after.items():
                owner = next((m for m in found.modalities if f".{m}." in name), None)
                alpha = found.strength[owner] if owner else 0.0
                torch.testing.assert_close(value, (1 - alpha) * before[name] + alpha * initial[name])
                assert (name in whole) == (owner is not None)
                assert owner is None or torch.equal(whole[name], initial[name])


def sharded_later(rank):
    """The scheduler's copies are of whole parameters, in whose place there are shards afterwards."""
    model, initial = untrained()
    shards = [DataLoader(cut(part, (len(part) // 2,) * 2, rank), 16) for part in data()]
    scheduler = scheduler_of(model, initial, *shards)
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    before = {n: p.full_tensor() for n, p in model.named_parameters()}
    with pytest.warns(UserWarning, match="came after the scheduler was built") as caught:
        found = scheduler.step()
    told = [str(warning.message) for warning in caught]
    return found, before, {n: p.full_tensor() for n, p in model.named_parameters()}, told


@needs_shards
def test_parameters_sharded_after_the_scheduler_was_built_stay(tmp_path):
    for found, before, after, told in on_ranks(sharded_later, tmp_path):
        assert all(alpha > 0 for alpha in found.strength.values())
        for name, value in after.items():
            assert torch.equal(value, before[name]), name
            owned = any(f".{m}." in name for m in found.modalities)
            assert any(repr(name) in message for message in told) == owned, name


def of_doubles(rank):
    """The second rank alone has a modality, in float64 and of few rows; the classes are those of both."""
    labels = torch.arange(24) % (4 if rank else 2)
    draw = torch.Generator().manual_seed(rank)
    features = {"a": torch.randn(24, 3, generator=draw) + labels[:, None]}
    if rank:
        features["b"] = torch.randn(24, 2, generator=draw, dtype=torch.float64) + labels[:, None]
    return bo.diagnose((features, labels), (features, labels), monitor=watch_two(), seed=0)


TARGETS: dict[Any, Any] = {
    "quantiles": lambda draw, n: torch.randn(n, generator=draw),
    "label-set": lambda draw, n: (torch.rand(n, 5, generator=draw) < 0.4).float(),
}


def splits_of_targets(rule):
    """Training and validation features with targets that are no classes."""
    draw = torch.Generator().manual_seed(7)
    sizes = [sum(cuts) for cuts in CUTS]
    return [({"a": torch.randn(n, 3, generator=draw)}, TARGETS[rule](draw, n)) for n in sizes]


def of_targets(rank):
    """Classes of all ranks' training targets, cut unevenly, and where one rank has no training sample."""
    results = []
    for rule in TARGETS:
        for cuts in (CUTS, ((60, 0), CUTS[1])):
            parts = []
            for (x, y), sizes in zip(splits_of_targets(rule), cuts, strict=True):
                rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
                parts.append(({m: z[rows] for m, z in x.items()}, y[rows]))
            results.append(bo.diagnose(*parts, classes=rule, seed=0))
    kinds = torch.rand(4) if rank else torch.arange(4)
    features = {"a": torch.randn(4, 2)}
    monitor = watch_two(loss=lambda prediction, target: prediction - target)
    with pytest.raises(ValueError, match="of one kind in all training and validation batches") as error:
        bo.diagnose((features, kinds), (features, kinds), monitor=monitor)
    return results, str(error.value)


def test_classes_of_targets_are_those_of_one_process(tmp_path):
    (first, said), (second, other) = on_ranks(of_targets, tmp_path)
    assert first == second
    assert said == other
    expected = [
        bo.diagnose(*splits_of_targets(rule), classes=rule, seed=0) for rule in TARGETS for _ in range(2)
    ]
    assert first == expected


def watch_two(**options):
    model = torch.nn.ModuleDict({name: torch.nn.Linear(2, 3) for name in ("a", "b")})
    return bo.ModalityMonitor(model, {"a": "a", "b": "b"}, **options)


def alone(rank):
    """Without a group each rank has its own diagnosis."""
    labels = torch.arange(30) % 3
    draw = torch.Generator().manual_seed(rank)
    features = {"a": labels[:, None] + (9.0 if rank else 0.0) * torch.rand(30, 2, generator=draw)}
    return bo.diagnose((features, labels), (features, labels), seed=0, group=False)


def test_a_modality_of_one_rank_alone(tmp_path):
    first, second = on_ranks(of_doubles, tmp_path)
    assert first == second
    assert first.train_count == {"a": 48, "b": 24}
    assert first.train_purity["b"] > 0.5


def test_without_a_group_ranks_diagnose_by_themselves(tmp_path):
    first, second = on_ranks(alone, tmp_path)
    assert first.train_purity == {"a": 1.0}
    assert second.train_purity["a"] < 1
    assert second.train_count == {"a": 30}
