"""Wrappers, lazy and shared modules, and what is refused."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import balanceopt as bo
from tests.models import Concat, Gated, batch, columns_of, linear, train_step, watch
from tests.unit.monitor.helpers import columns_by_hand, flat, step, sums_of


def test_data_parallel_is_refused():
    for model in (nn.DataParallel(Concat()), nn.Sequential(nn.DataParallel(Concat()))):
        with pytest.raises(
            NotImplementedError, match=r"DataParallel is not supported.*Use DistributedDataParallel"
        ):
            bo.ModalityMonitor(model, {"audio": "encoders.audio"})


def test_fsdp1_is_refused():
    """By name: building one needs a process group."""
    kind = type("FullyShardedDataParallel", (nn.Module,), {})
    model = Concat()
    model.encoders["audio"].add_module("inner", kind())
    with pytest.raises(NotImplementedError, match=r"\(FSDP1\) is not supported.*fully_shard \(FSDP2\)"):
        watch(model)


def test_deepspeed_is_refused():
    engine = type("DeepSpeedEngine", (Concat,), {"__module__": "deepspeed.runtime.engine"})
    with pytest.raises(NotImplementedError, match="DeepSpeed is not supported"):
        watch(engine())


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(os.name == "nt", reason="gloo on a file store")
@pytest.mark.parametrize("make", [Concat, Gated])
def test_ddp_around_the_model_the_encoders_or_the_head(process_group, make):
    model = make()
    inputs, labels = batch()
    expected = sums_of(model, inputs, labels)
    assert expected is not None
    outer = DistributedDataParallel(model)
    for given in (outer, model):
        with bo.ModalityMonitor(given, model.modalities, model.head) as monitor:
            assert monitor.model is model
            scores = monitor.scores()
            F.cross_entropy(outer(*inputs), labels).backward()
            sums = scores.take()
            assert sums is not None
            torch.testing.assert_close(flat(sums), flat(expected))
    model.head = DistributedDataParallel(model.head)
    model.encoders["audio"] = DistributedDataParallel(model.encoders["audio"])
    sums = sums_of(model, inputs, labels)
    assert sums is not None
    torch.testing.assert_close(flat(sums), flat(expected))


@pytest.mark.parametrize("slices", [None, {"audio": slice(0, 4), "visual": slice(4, 8)}])
def test_lazy_modules(slices):
    model = Concat(encoder=lambda n, d: nn.Sequential(nn.LazyLinear(6), nn.ReLU(), nn.LazyLinear(d)))
    model.head = nn.LazyLinear(5)
    with watch(model, slices=slices) as monitor:
        inputs, labels = batch()
        sums = step(monitor, model, inputs, labels)
        assert sums is not None
        assert (sums.count == 8).all()
        assert columns_of(monitor) == columns_by_hand(model)
        assert monitor.stats()["scores"] == "split"
        assert all(not torch.nn.parameter.is_lazy(p) for own in monitor.parameters.values() for p in own)


def test_an_encoder_tied_to_the_head():
    model = Concat(width=5, encoder=linear, joint_width=10)
    model.encoders["audio"].register_parameter("bias", model.head.bias)
    with watch(model) as monitor:
        assert step(monitor, model, *batch()) is not None
        assert [len(own) for own in monitor.parameters.values()] == [1, 2]


def test_an_encoder_that_is_used_by_two_modalities():
    model = Concat(encoder=lambda n, d: nn.Linear(5, d))
    model.encoders["visual"] = model.encoders["audio"]
    with pytest.raises(ValueError, match="'visual' is the same module as that of 'audio'"):
        watch(model)


def test_six_modalities_with_an_optimizer():
    model = Concat(6)
    groups = bo.modality_groups(model, model.modalities)
    with watch(model) as monitor:
        optimizer = bo.ModulatedOptimizer(torch.optim.SGD(groups, 0.1), monitor, bo.OGM(0.5, noise=False))
        for _ in range(3):
            optimizer.zero_grad()
            train_step(model, *batch(8, 6))
            optimizer.step()
        assert optimizer.stats()["modulated"] == 3


def test_parameters_replaced_by_other_objects_are_found_again():
    model = Concat()
    with watch(model) as monitor:
        new = nn.Parameter(torch.zeros(4))
        model.get_submodule("encoders.audio.2").register_parameter("bias", new)
        assert any(p is new for p in monitor.parameters["audio"])


def test_a_model_on_the_meta_device_can_be_watched():
    with torch.device("meta"):
        model = Concat()
    with watch(model) as monitor:
        assert monitor.modalities == ("audio", "visual")


def test_names_reach_into_wrapped_models():
    model = Concat()
    with bo.ModalityMonitor(nn.Sequential(model), {"a": "0.encoders.audio"}, "0.head") as monitor:
        assert monitor.encoders["a"] is model.encoders["audio"]
        assert monitor.head is model.head
