"""Methods that need no scores: they act in every step, and the monitor computes none for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import balanceopt as bo
from tests.models import Concat, watch
from tests.training import backward, batches, groups_of, same_bits, sgd, small_model, train


class Halved(bo.GradientScaling):
    """Halves every modality's gradient."""

    needs_scores = False

    def coefficients(self, step: bo.StepContext) -> Tensor:
        return torch.full_like(step.scores.score, 0.5)


def halved_by_hand(model: Concat, steps: int) -> Concat:
    optimizer = sgd(groups_of(model))
    for given in batches(model, steps):
        optimizer.zero_grad()
        backward(model, given)
        for encoder in model.modalities.values():
            for p in encoder.parameters():
                assert p.grad is not None
                p.grad *= 0.5
        optimizer.step()
    return model


def trained(modulation: Any, steps: int = 3, **monitor: Any) -> tuple[Concat, bo.ModulatedOptimizer]:
    model = small_model()
    optimizer = bo.ModulatedOptimizer(sgd(groups_of(model)), watch(model, **monitor), modulation)
    train(model, optimizer, batches(model, steps))
    return model, optimizer


@pytest.mark.parametrize("monitor", [{}, {"head": None}], ids=["head", "no head"])
def test_it_acts_with_and_without_a_head(monitor: dict[str, Any]):
    model, optimizer = trained(Halved(), **monitor)
    assert same_bits(model, halved_by_hand(small_model(), 3))
    assert optimizer.stats() == {"modulated": 3, "without_scores": 0, "outside_window": 0, **IRREGULAR}


IRREGULAR = {"unusable_scores": 0, "nonfinite_gradients": 0}


def test_no_scores_are_computed_for_it():
    _, optimizer = trained(Halved())
    assert sum(optimizer.monitor.stats()["labels"].values()) == 0
    assert not optimizer.monitor._scorer.buffers


def test_a_single_modality_is_enough():
    model, twin = small_model(1), halved_by_hand(small_model(1), 2)
    monitor = watch(model)
    train(model, bo.ModulatedOptimizer(sgd(groups_of(model)), monitor, Halved()), batches(model, 2))
    assert same_bits(model, twin)


def test_its_window_is_kept_and_the_counter_goes_on():
    method = Halved(start=1, end=1)
    model, optimizer = trained(method)
    stats = optimizer.stats()
    assert (stats["modulated"], stats["outside_window"]) == (1, 2)
    assert optimizer.param_groups[0]["balanceopt_step"] == 3
    assert not same_bits(model, halved_by_hand(small_model(), 3))


def test_beside_a_method_that_needs_scores_it_acts_alone_where_there_are_none():
    model, twin = small_model(), small_model()
    monitor = watch(model)
    both = [Halved(), bo.OGM(0.5, noise=False)]
    optimizer = bo.ModulatedOptimizer(sgd(groups_of(model)), monitor, both)
    monitor.remove()
    with pytest.warns(UserWarning, match="no scores since the last step"):
        train(model, optimizer, batches(model, 2))
    assert same_bits(model, halved_by_hand(twin, 2))
    assert optimizer.stats()["without_scores"] == 2
    with pytest.raises(RuntimeError, match="no scores in 10 steps in a row"):
        train(model, optimizer, batches(model, 8))


def test_a_method_that_needs_scores_needs_a_head_beside_it_too():
    model = small_model()
    with pytest.raises(ValueError, match="OGM needs uni-modal scores"):
        bo.ModulatedOptimizer(sgd(groups_of(model)), watch(model, head=None), [Halved(), bo.OGM()])
