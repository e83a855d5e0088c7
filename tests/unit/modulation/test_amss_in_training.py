"""AMSS in an optimizer: the recorder, other methods beside it, bases it does not go with."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import balanceopt as bo
from balanceopt.functional import kept_units
from tests.masking import kept
from tests.models import FUSIONS, watch
from tests.relearning import loaders, train_epoch
from tests.training import backward, batch, grad_of, groups_of, modulated, sgd, small_model, train

INF, NAN = float("inf"), float("nan")
# Keep ratios 0.2142 and 0.7858 at temperature 0.2.
TWO = (0.34, 0.08)
WEIGHT = "encoders.{}.weight"


def test_significance_and_keep_ratio_are_recorded():
    model, optimizer = modulated(bo.AMSS(2.0), modalities=3)
    with bo.Recorder(optimizer) as recorder:
        train(model, optimizer, [batch(i, model) for i in range(3)])
    for quantity in ("significance", "keep_ratio"):
        assert {name: len(v) for name, (_, v) in recorder.series(quantity).items()} == dict.fromkeys(
            model.names, 3
        )
    ratios = [values for _, values in recorder.series("keep_ratio").values()]
    assert [sum(step) for step in zip(*ratios, strict=True)] == pytest.approx([2, 2, 2], abs=1e-5)


def test_the_window_is_inclusive():
    model, optimizer = modulated(bo.AMSS(start=1, end=2))
    train(model, optimizer, [batch(i, model) for i in range(4)])
    assert optimizer.stats()["modulated"] == 2
    assert optimizer.stats()["outside_window"] == 2


def test_after_ogm_the_masked_units_have_no_noise():
    model, optimizer = modulated([bo.OGM(0.5), bo.AMSS(clamp=(0.3, 0.3))])
    backward(model, batch(0, model))
    optimizer.step()
    for encoder in model.modalities.values():
        assert kept(grad_of(encoder.get_parameter("0.weight"))) == 2  # 0.3 of 6
        assert kept(grad_of(encoder.get_parameter("2.weight"))) == 2  # 0.3 of 4


def test_it_shares_a_monitor_with_opm():
    model = small_model()
    monitor = watch(model)
    optimizer = bo.MaskedSubnetworkSGD(groups_of(model), monitor, lr=0.1, seed=0)
    with bo.OPM(monitor, seed=0):
        train(model, optimizer, [batch(i, model) for i in range(5)])
        assert optimizer.stats()["modulated"] == 5


def test_attach_masks_too():
    model = small_model()
    base = sgd(groups_of(model))
    twin, wrapped = modulated(bo.AMSS())
    with bo.attach(base, watch(model), bo.AMSS(), seed=7):
        train(model, base, [batch(i, model) for i in range(3)])
    train(twin, wrapped, [batch(i, twin) for i in range(3)])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_single_modality_is_not_masked():
    with pytest.warns(UserWarning, match="nothing to balance"):
        model, optimizer = modulated(bo.AMSS(), modalities=1)
    twin = small_model(1)
    train(model, optimizer, [batch(0, model)])
    train(twin, sgd(groups_of(twin)), [batch(0, twin)])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_hint_where_the_base_takes_the_factor_out():
    model = small_model()
    with pytest.warns(bo.OptimizerHintWarning, match="Adam divides a constant gradient factor out again"):
        bo.ModulatedOptimizer(torch.optim.Adam(groups_of(model)), watch(model), bo.AMSS(scale="official"))


def test_a_line_search_sees_other_masks_each_time():
    model = small_model()
    base = torch.optim.LBFGS(model.parameters())
    with pytest.warns(bo.OptimizerHintWarning, match="sees another mask"):
        bo.ModulatedOptimizer(base, watch(model), bo.AMSS())


@pytest.mark.parametrize("modalities", [2, 3])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_fusion(fusion, modalities):
    torch.manual_seed(0)
    model = FUSIONS[fusion](modalities)
    optimizer = bo.MaskedSubnetworkSGD(groups_of(model), watch(model), lr=0.1, momentum=0.9, seed=0)
    with bo.Recorder(optimizer) as recorder:
        for number in range(3):
            optimizer.zero_grad()
            inputs, labels = batch(number, small_model(modalities))
            F.cross_entropy(model(*inputs), labels).backward()
            optimizer.step()
    assert optimizer.stats() == {**dict.fromkeys(optimizer.stats(), 0), "modulated": 3}
    for name, (_, ratios) in recorder.series("keep_ratio").items():
        first = next(model.modalities[name].parameters())
        assert kept(grad_of(first)) == int(kept_units(len(first), torch.tensor(ratios[-1])))


def test_micro_batches_are_one_batch():
    found = []
    for parts in (1, 4):
        model, optimizer = modulated(bo.AMSS())
        inputs, labels = batch(0, model)
        with bo.Recorder(optimizer) as recorder:
            for *xs, y in zip(*(x.chunk(parts) for x in inputs), labels.chunk(parts), strict=True):
                (F.cross_entropy(model(*xs), y) / parts).backward()
            optimizer.step()
        found.append([values[0] for _, values in recorder.series("significance").values()])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_re_learning_goes_on_beside_it():
    model = small_model()
    monitor = watch(model)
    optimizer = bo.MaskedSubnetworkSGD(groups_of(model), monitor, lr=0.1, momentum=0.9, seed=0)
    scheduler = bo.ReLearnScheduler(optimizer, monitor, *loaders(), every=1, seed=0, epochs=99)
    for _ in range(2):
        train_epoch(model, optimizer, loaders()[0])
        before = [p.detach().clone() for p in model.parameters()]
        assert scheduler.step() is not None
        assert any(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert optimizer.stats()["modulated"] == 8
    assert optimizer.stats()["without_scores"] == 0
