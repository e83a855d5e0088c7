"""inject=True gets its labels from wherever the monitor does, or refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import balanceopt as bo
from tests.models import CLASSES, Concat, HuggingFaceStyle, SumHeads, batch, watch
from tests.objectives import check, given, gradients


class TestLabels:
    def test_observed(self):
        def loop(model, monitor, extra):
            inputs, labels = given()
            logits = model(*inputs)
            monitor.observe(labels)
            (F.cross_entropy(logits, labels) + extra(labels)).backward()

        check(Concat, loop, monitor_options={"labels": "observe"})

    def test_of_the_models_keywords(self):
        def loop(model, monitor, extra):
            inputs, labels = given()
            output = model(labels=labels, **dict(zip(model.names, inputs, strict=True)))
            (output.loss + extra(labels)).backward()

        check(HuggingFaceStyle, loop, monitor_options={"labels": "model"})

    @pytest.mark.parametrize("heads", ["own", "shared"])
    @pytest.mark.parametrize(
        "criterion",
        [
            nn.CrossEntropyLoss(),
            nn.CrossEntropyLoss(label_smoothing=0.2),
            nn.CrossEntropyLoss(reduction="sum"),
            nn.CrossEntropyLoss(weight=torch.arange(1.0, 6.0).double()),
            nn.MultiMarginLoss(),
        ],
        ids=str,
    )
    def test_of_the_loss_module(self, criterion, heads):
        def loop(model, monitor, extra):
            inputs, labels = given()
            (0.3 * (criterion(model(*inputs), labels) + extra(labels))).backward()

        check(Concat, loop, loss=criterion, heads=heads)

    def test_of_a_loss_module_without_reduction(self):
        criterion = nn.CrossEntropyLoss(reduction="none")
        weights = torch.rand(8).double()

        def loop(model, monitor, extra):
            inputs, labels = given()
            ((criterion(model(*inputs), labels) + extra(labels)) * weights).sum().backward()

        explicit = gradients(Concat, loop, inject=False, loss=lambda x, y: criterion.forward(x, y).mean())
        injected = gradients(Concat, loop, inject=True, loss=criterion)
        assert explicit.keys() == injected.keys()
        assert all(bool(torch.isfinite(g).all()) for g in injected.values())

    def test_soft_targets_of_a_loss_module(self):
        criterion = nn.CrossEntropyLoss()
        soft = torch.rand(8, CLASSES).double().softmax(1)

        def loop(model, monitor, extra):
            inputs, _ = given()
            (criterion(model(*inputs), soft) + extra(soft)).backward()

        check(Concat, loop, loss=criterion)

    def test_a_loss_module_that_is_called_on_other_logits_too(self):
        criterion = nn.CrossEntropyLoss()

        def loop(model, monitor, extra):
            inputs, labels = given()
            side = criterion(model.encoders["audio"].forward(inputs[0])[:, :5], labels.clamp(max=3))
            (side + criterion(model(*inputs), labels) + extra(labels)).backward()

        check(Concat, loop, loss=criterion)

    def test_without_a_head(self):
        criterion = nn.CrossEntropyLoss()

        def loop(model, monitor, extra):
            inputs, labels = given()
            (criterion(model(*inputs), labels) + extra(labels)).backward()

        check(Concat, loop, loss=criterion, monitor_options={"head": None})

    @pytest.mark.parametrize("known", [False, True])
    def test_ignored_samples(self, known):
        def loop(model, monitor, extra):
            inputs, labels = given()
            labels[[1, 6]] = -100
            logits = model(*inputs)
            if known:
                monitor.observe(labels)
            (F.cross_entropy(logits, labels) + extra(labels)).backward()

        check(Concat, loop)

    @pytest.mark.parametrize("loss", [None, nn.CrossEntropyLoss()])
    def test_samples_that_lack_a_modality(self, loss):
        def loop(model, monitor, extra):
            inputs, labels = given()
            logits = model(*inputs)
            monitor.observe(labels, present={"visual": torch.arange(8) % 3 > 0})
            joint = F.cross_entropy(logits, labels) if loss is None else loss(logits, labels)
            (joint + extra(labels)).backward()

        check(Concat, loop, loss=loss)

    def test_class_weights_weigh_the_uni_modal_losses_too(self):
        weight = torch.arange(1.0, 6.0).double()

        def loop(model, monitor, extra):
            inputs, labels = given()
            (F.cross_entropy(model(*inputs), labels, weight) + extra(labels)).backward()

        check(Concat, loop, own_loss=nn.CrossEntropyLoss(weight=weight))


class TestRefusals:
    def injected(self, model, monitor=None, **options):
        self.objective = bo.UnimodalObjective(monitor or watch(model), CLASSES, inject=True, **options)
        return self.objective

    def test_label_smoothing_without_the_loss(self):
        model = Concat()
        _objective = self.injected(model)
        inputs, labels = batch()
        with pytest.raises(RuntimeError, match="not that of a plain cross-entropy"):
            F.cross_entropy(model(*inputs), labels, label_smoothing=0.1).backward()
        assert all(p.grad is None for p in model.parameters())

    @pytest.mark.parametrize(
        "loss",
        [
            lambda x, y: F.cross_entropy(x / 2, y),
            lambda x, y: F.cross_entropy(x, y) + x.square().mean(),
            lambda x, y: F.cross_entropy(
                x, F.one_hot(y, CLASSES) * 0.7 + 0.3 * F.one_hot(y.flip(0), CLASSES)
            ),
            lambda x, y: F.multi_margin_loss(x, y),
            lambda x, y: F.mse_loss(x, F.one_hot(y, CLASSES).float()),
        ],
    )
    @pytest.mark.parametrize("observed", [False, True])
    def test_other_losses_without_the_module(self, loss, observed):
        model = Concat()
        objective = self.injected(model)
        inputs, labels = batch(32)
        logits = model(*inputs)
        if observed:
            objective.monitor.observe(labels)
        with pytest.raises(RuntimeError, match="not that of a plain cross-entropy"):
            loss(logits, labels).backward()

    def test_rows_too_sure_to_tell(self):
        model = Concat()
        _objective = self.injected(model)
        inputs, labels = batch()
        shown = 1e4 * F.one_hot(labels, CLASSES).float()
        shown[0] = 0
        model.head.register_forward_hook(lambda m, a, out: out + shown, prepend=True)
        with pytest.raises(RuntimeError, match="in 7 of 8 rows"):
            F.cross_entropy(model(*inputs), labels).backward()

    def test_labels_that_are_not_there_by_the_time_of_backward(self):
        model = Concat()
        _objective = self.injected(model, watch(model, labels="observe"))
        inputs, labels = batch()
        with pytest.raises(RuntimeError, match="needs the labels by the time of backward"):
            F.cross_entropy(model(*inputs), labels).backward()

    def test_soft_labels_without_the_loss(self):
        model = Concat()
        objective = self.injected(model)
        inputs, _ = batch()
        soft = torch.rand(8, CLASSES).softmax(1)
        logits = model(*inputs)
        objective.monitor.observe(soft)
        with pytest.raises(ValueError, match=r"needs a class index for each of the 8 rows.*shape \(8, 5\)"):
            F.cross_entropy(logits, soft).backward()

    def test_no_head_and_no_loss(self):
        model = Concat()
        with pytest.raises(ValueError, match="Build the monitor with `head=`, or pass `loss=`"):
            self.injected(model, watch(model, head=None))

    def test_a_function_as_loss(self):
        with pytest.raises(ValueError, match="its calls can't be seen"):
            self.injected(Concat(), loss=F.cross_entropy)

    def test_added_twice(self):
        model = Concat()
        objective = self.injected(model)
        model(*batch()[0])
        with pytest.raises(RuntimeError, match="leave the objective out of the loss"):
            objective(batch()[1])

    def test_create_graph(self):
        model = Concat()
        _objective = self.injected(model)
        inputs, labels = batch()
        with pytest.raises(RuntimeError, match="create_graph=True"):
            F.cross_entropy(model(*inputs), labels).backward(create_graph=True)

    def test_positions_as_rows(self):
        class Positions(Concat):
            def fuse(self, features):
                return self.head(torch.cat(features, -1)).unsqueeze(1).expand(-1, 3, -1)

        model = Positions()
        monitor = bo.ModalityMonitor(model, model.modalities, head=model, scores="zero-out")
        _objective = self.injected(model, monitor)
        inputs, labels = batch()
        logits = model(*inputs)
        with pytest.raises(ValueError, match=r"the targets have 3 positions.*'audio', of shape \(8, 4\)"):
            F.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(3)).backward()


def test_nothing_is_added_after_remove():
    model = Concat()
    twin = Concat()
    twin.load_state_dict(model.state_dict())
    objective = bo.UnimodalObjective(watch(model), CLASSES, inject=True)
    objective.remove()
    inputs, labels = batch()
    for one in (model, twin):
        F.cross_entropy(one(*inputs), labels).backward()
    pairs: Any = zip(model.parameters(), twin.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs)
    assert all(p.grad is None for p in objective.parameters())


def test_weight_zero_changes_no_bit():
    found = []
    for removed in (True, False):
        torch.manual_seed(0)
        model = SumHeads()
        monitor = watch(model)
        objective = bo.UnimodalObjective(monitor, CLASSES, inject=True, weight=0.0)
        if removed:
            objective.remove()
        inputs, labels = batch()
        F.cross_entropy(model(*inputs), labels).backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
