"""OPM beside every base optimizer and every other method on one monitor: each acts, and each score is made once."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

import balanceopt as bo
from balanceopt.monitor import _scorer
from tests.contract.bases import BASES, Base
from tests.contract.methods import METHODS, Method
from tests.dropping import inputs_of, kept
from tests.models import watch
from tests.training import batch, distance, groups_of, same_bits, sgd, small_model, train

STEPS = 4
BATCHES = range(STEPS)
_METHODS = [pytest.param(method, id=method.name) for method in METHODS]
_BASES = [pytest.param(base, id=base.name) for base in BASES if not base.closure and not base.create_graph]


def trained(make=sgd, modulation=None, **options):
    """A run on the same batches, with OPM where `options` are given."""
    model = small_model()
    monitor = watch(model)
    modulator = bo.OPM(monitor, seed=1, **options) if options else None
    optimizer = make(groups_of(model))
    if modulation is not None:
        optimizer = bo.ModulatedOptimizer(optimizer, monitor, modulation, seed=1)
        optimizer.set_epoch(0)
    train(model, optimizer, [batch(number, model) for number in BATCHES])
    return model, modulator, optimizer


@pytest.mark.filterwarnings("ignore:This overload of add")  # torch-optimizer's Ranger
@pytest.mark.parametrize("base", _BASES)
def test_every_base_trains_with_it_and_at_q_0_as_without(base: Base):
    plain, _, _ = trained(base.make)
    limit, _, _ = trained(base.make, q_base=0)
    model, modulator, _ = trained(base.make, q_base=0.5)
    assert same_bits(plain, limit)
    assert modulator is not None
    assert modulator.stats()["dropping"] == STEPS - 1
    assert distance(model, plain) > 0
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("method", _METHODS)
def test_beside_another_method_both_act(method: Method):
    both, modulator, optimizer = trained(modulation=method.make(), q_base=0.5)
    alone, _, _ = trained(modulation=method.make())
    opm, _, _ = trained(q_base=0.5)
    assert modulator is not None
    assert isinstance(optimizer, bo.ModulatedOptimizer)
    assert modulator.stats()["dropping"] == STEPS - 1
    assert optimizer.stats()["modulated"] == STEPS
    assert distance(both, alone) > 0
    assert distance(both, opm) > 0


@pytest.mark.parametrize("method", _METHODS)
def test_beside_another_method_each_score_is_made_once(method: Method):
    with mock.patch.object(
        _scorer.Scorer, "_settle", autospec=True, side_effect=_scorer.Scorer._settle
    ) as settle:
        _, modulator, _ = trained(modulation=method.make(), q_base=0.5)
    assert modulator is not None
    # The last pass waits for OPM's next forward, where no method takes its scores in the step.
    assert settle.call_count == (STEPS if method.make().needs_scores else STEPS - 1)


@pytest.mark.parametrize("method", _METHODS)
def test_the_other_methods_limit_leaves_opm_as_it_is(method: Method):
    both, _, _ = trained(modulation=method.limit(), q_base=0.5)
    opm, _, _ = trained(q_base=0.5)
    assert same_bits(both, opm)


def test_both_follow_the_same_clean_scores():
    model = small_model()
    monitor = watch(model)
    modulator = bo.OPM(monitor, q_base=1.0, seed=1)
    optimizer = bo.ModulatedOptimizer(sgd(groups_of(model)), monitor, bo.OGM(0.5, noise=False))
    with bo.Recorder(modulator) as of_opm, bo.Recorder(optimizer) as of_ogm, inputs_of(model.head) as seen:
        train(model, optimizer, [batch(number, model) for number in BATCHES])
        modulator.update()
    assert not all(bool(kept(x).all()) for x in seen)
    for name in ("audio", "visual"):
        assert of_opm.series("ratio")[name] == of_ogm.series("ratio")[name]


def test_re_learning_opm_and_ogm_share_a_monitor():
    model = small_model()
    monitor = watch(model)
    given = [batch(number, model) for number in BATCHES]
    loader = [(*inputs, labels) for inputs, labels in given]
    optimizer = bo.ModulatedOptimizer(sgd(groups_of(model)), monitor, bo.OGM(0.5))
    scheduler = bo.ReLearnScheduler(optimizer, monitor, loader, loader, every=1, epochs=99)
    modulator = bo.OPM(monitor, seed=1)
    train(model, optimizer, given)
    forwards = modulator.stats()["forwards"]
    assert scheduler.step() is not None
    assert (
        modulator.stats()["forwards"] == forwards == STEPS
    )  # its passes through the loader are not training
    train(model, optimizer, given)
    assert torch.isfinite(modulator.q).all()
    assert modulator.stats()["dropping"] == 2 * STEPS - 1
