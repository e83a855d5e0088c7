"""UnimodalObjective: own heads and the shared one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import balanceopt as bo
from tests.models import (
    CLASSES,
    FUSIONS,
    SPLIT,
    ZERO_OUT,
    Concat,
    ConcatOfWrapped,
    Signal,
    SumHeads,
    batch,
    watch,
)
from tests.objectives import objective_of, own_loss
from tests.relearning import random_streams


class TestOwnHeads:
    @pytest.mark.parametrize("make", FUSIONS.values(), ids=FUSIONS)
    @pytest.mark.parametrize("modalities", [2, 3])
    def test_loss(self, make, modalities):
        model = make(modalities)
        objective = objective_of(model)
        inputs, labels = batch(8, modalities)
        model(*inputs)
        found = objective(labels)
        torch.testing.assert_close(found, own_loss(objective, model, inputs, labels))

    def test_gradients_reach_encoders_and_heads(self):
        model = Concat()
        objective = objective_of(model)
        inputs, labels = batch()
        model(*inputs)
        objective(labels).backward()
        expected = torch.autograd.grad(
            own_loss(objective, model, inputs, labels),
            [*model.encoders.parameters(), *objective.parameters()],
        )
        for p, g in zip([*model.encoders.parameters(), *objective.parameters()], expected, strict=True):
            torch.testing.assert_close(p.grad, g)
        assert model.head.weight.grad is None

    @pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
    def test_heads_join_the_optimizer_before_their_width_is_known(self, make):
        model = Concat()
        objective = objective_of(model)
        groups = bo.modality_groups(model, model.modalities)
        optimizer = make([*groups, {"params": objective.parameters()}], lr=0.05)
        optimizer = bo.ModulatedOptimizer(optimizer, objective.monitor)
        inputs, labels = batch(32)
        losses = []
        for _ in range(60):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(*inputs), labels) + objective(labels)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.97 * losses[0]
        assert all(type(head) is nn.Linear for head in objective.own_heads)

    def test_widths_are_those_of_the_first_features(self):
        model = Concat(width=[4, 7])
        objective = objective_of(model)
        model(*batch()[0])
        objective(batch()[1])
        assert [tuple(p.shape) for p in objective.parameters()] == [(5, 4), (5,), (5, 7), (5,)]

    def test_a_wrong_width_is_refused(self):
        model = Concat()
        objective = objective_of(model)
        inputs, labels = batch()
        other = objective_of(Concat(width=9), seed=0)
        other.monitor.model(*inputs)
        other(labels)
        objective.load_state_dict(other.state_dict())
        model(*inputs)
        with pytest.raises(ValueError, match="of 'audio' should have width 9"):
            objective(labels)

    def test_initial_weights_are_those_of_a_linear_layer(self):
        model = Concat(width=400)
        objective, again = (bo.UnimodalObjective(watch(model), 300, seed=1) for _ in range(2))
        inputs, labels = batch()
        model(*inputs)
        before = random_streams()
        objective(labels)
        again(labels)
        assert random_streams() == before
        weight = objective.head_of("audio").weight.detach()
        assert float(weight.abs().max()) <= 0.05
        assert float(weight.std()) == pytest.approx(0.05 / 3**0.5, rel=0.01)
        assert torch.equal(again.head_of("audio").weight, weight)
        assert not torch.equal(again.head_of("visual").weight, weight)

    def test_state(self):
        model = Concat()
        objective = objective_of(model)
        inputs, labels = batch()
        model(*inputs)
        objective(labels)
        fresh = objective_of(model, seed=9)
        fresh.load_state_dict(objective.state_dict())
        model(*inputs)
        assert torch.equal(fresh(labels), objective(labels))

    def test_feature_maps_are_pooled_as_the_head_gets_them(self):
        model = Concat(encoder=Signal, between=lambda z: z.amax(2))
        objective = objective_of(model)
        inputs, labels = batch()
        model(*inputs)
        features = [z.amax(2) for z in model.encode(*inputs)]
        found = objective(labels)
        expected = sum(
            F.cross_entropy(objective.head_of(n)(z), labels)
            for n, z in zip(model.names, features, strict=True)
        )
        torch.testing.assert_close(found, expected)

    def test_outputs_that_are_more_than_a_tensor(self):
        model = ConcatOfWrapped("tuple")
        objective = objective_of(model)
        inputs, labels = batch()
        model(*inputs)
        objective(labels).backward()
        assert all(p.grad is not None for p in model.encoders.parameters())


class TestSharedHead:
    @pytest.mark.parametrize("make", SPLIT.values(), ids=SPLIT)
    @pytest.mark.parametrize("modalities", [2, 3])
    def test_split(self, make, modalities):
        model = make(modalities)
        objective = objective_of(model, heads="shared")
        inputs, labels = batch(8, modalities)
        model(*inputs)
        objective(labels).backward()
        found = [p.grad.clone() for p in model.parameters()]
        total: Any = 0
        at = 0
        for i in model.order:
            z = model.encoders[model.names[i]](inputs[i])
            share = 0 if model.head.bias is None else model.head.bias / modalities
            total = total + F.cross_entropy(z @ model.head.weight[:, at : at + 4].T + share, labels)
            at += 4
        expected = torch.autograd.grad(total, list(model.parameters()))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)

    def test_per_head(self):
        model = SumHeads(3)
        objective = objective_of(model, heads="shared")
        inputs, labels = batch(8, 3)
        model(*inputs)
        expected = sum(
            F.cross_entropy(model.own_heads[n](model.encoders[n](x)), labels)
            for n, x in zip(model.names, inputs, strict=True)
        )
        torch.testing.assert_close(objective(labels), expected)

    def test_has_no_parameters(self):
        assert list(objective_of(Concat(), heads="shared").parameters()) == []

    @pytest.mark.parametrize("make", ZERO_OUT.values(), ids=ZERO_OUT)
    def test_other_fusions_are_refused(self, make):
        model = make()
        objective = objective_of(model, heads="shared")
        inputs, labels = batch()
        model(*inputs)
        with pytest.raises(ValueError, match="Found 'zero-out'"):
            objective(labels)

    def test_needs_a_head(self):
        model = Concat()
        with pytest.raises(ValueError, match="needs uni-modal scores"):
            objective_of(model, monitor=bo.ModalityMonitor(model, model.modalities), heads="shared")

    def test_another_number_of_classes_is_refused(self):
        model = Concat()
        objective = bo.UnimodalObjective(watch(model), CLASSES + 1, heads="shared")
        inputs, labels = batch()
        model(*inputs)
        with pytest.raises(ValueError, match=f"that of the shared head, {CLASSES}"):
            objective(labels)
