"""UnimodalObjective: of which features, which loss; what it refuses; its life-cycle."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import balanceopt as bo
from tests.models import CLASSES, PER_HEAD, Concat, SumHeads, batch, watch
from tests.objectives import objective_of, own_loss


class TestWhichFeatures:
    def test_clean_ones_under_opm(self):
        model = Concat()
        monitor = watch(model)
        modulator = bo.OPM(monitor, q_base=1.0)
        objective = objective_of(model, monitor=monitor)
        inputs, labels = batch()
        for _ in range(2):  # drop probabilities follow the first pass
            logits = model(*inputs)
            found = objective(labels)
            F.cross_entropy(logits, labels).backward()
        assert modulator.stats()["dropping"] > 0
        torch.testing.assert_close(found, own_loss(objective, model, inputs, labels))

    def test_before_the_fusion_works_in_place(self):
        model = Concat(between=lambda z: z.relu_())
        objective = objective_of(model)
        inputs, labels = batch()
        model(*inputs)
        torch.testing.assert_close(objective(labels), own_loss(objective, model, inputs, labels))

    def test_of_the_latest_training_pass_whatever_is_evaluated_between(self):
        model = Concat()
        objective = objective_of(model)
        inputs, labels = batch()
        model(*inputs)
        model.eval()
        with torch.no_grad():
            model(*batch()[0])
        model.train()
        torch.testing.assert_close(objective(labels), own_loss(objective, model, inputs, labels))

    def test_of_the_latest_evaluation_without_gradients(self):
        model = Concat()
        objective = objective_of(model)
        model(*batch()[0])
        inputs, labels = batch()
        model.eval()
        with torch.no_grad():
            model(*inputs)
            torch.testing.assert_close(objective(labels), own_loss(objective, model, inputs, labels))

    def test_samples_that_lack_a_modality_do_not_count(self):
        model = Concat()
        monitor = watch(model)
        objective = objective_of(model, monitor=monitor)
        inputs, labels = batch()
        model(*inputs)
        has = torch.arange(8) < 5
        monitor.observe(labels, present={"visual": has})
        found = objective(labels)
        heads, z = objective.head_of, model.encode(*inputs)
        expected = F.cross_entropy(heads("audio")(z[0]), labels)
        expected = expected + F.cross_entropy(heads("visual")(z[1][has]), labels[has])
        torch.testing.assert_close(found, expected)

    def test_a_modality_that_no_sample_has_adds_nothing(self):
        model = Concat()
        monitor = watch(model)
        objective = objective_of(model, monitor=monitor)
        inputs, labels = batch()
        model(*inputs)
        monitor.observe(labels, present={"visual": torch.zeros(8, dtype=torch.bool)})
        found = objective(labels)
        torch.testing.assert_close(
            found, F.cross_entropy(objective.head_of("audio")(model.encode(*inputs)[0]), labels)
        )
        found.backward()

    def test_frozen_encoders_still_train_their_heads(self):
        model: Any = Concat()
        model.encoders["audio"].requires_grad_(False)
        objective = objective_of(model)
        inputs, labels = batch()
        model(*inputs)
        objective(labels).backward()
        gradient = objective.head_of("audio").weight.grad
        assert gradient is not None
        assert gradient.any()

    def test_activation_checkpointing(self):
        model: Any = Concat()
        objective = objective_of(model)
        inputs, labels = batch()
        forward = model.encoders["audio"].forward
        model.encoders["audio"].forward = lambda x: checkpoint(forward, x, use_reentrant=False)
        model(*inputs)
        objective(labels).backward()
        assert model.encoders["audio"][0].weight.grad.any()

    def test_features_without_a_graph_are_refused(self):
        class Reentrant(Concat):
            def encode(self, *inputs):
                parts = zip(self.encoders.values(), inputs, strict=True)
                return [checkpoint(encoder, x, use_reentrant=True) for encoder, x in parts]

        model = Reentrant()
        objective = objective_of(model)
        inputs, labels = batch()
        model(*(x.requires_grad_() for x in inputs))
        with pytest.raises(RuntimeError, match="carry no gradient to their encoder"):
            objective(labels)


class TestLoss:
    def test_weight(self):
        model = Concat()
        monitor = watch(model)
        one = [objective_of(model, monitor=monitor, weight={m: 1.0}, seed=0) for m in model.names]
        both = objective_of(model, monitor=monitor, weight={"audio": 0.5, "visual": 2.0}, seed=0)
        inputs, labels = batch()
        model(*inputs)
        torch.testing.assert_close(both(labels), 0.5 * one[0](labels) + 2 * one[1](labels))

    def test_weights_may_be_set(self):
        model = Concat()
        monitor = watch(model)
        held = [objective_of(model, monitor=monitor, weight=w, seed=0) for w in (1.0, {"visual": 0.25})]
        held[0].weight = {"visual": 0.25}
        inputs, labels = batch()
        model(*inputs)
        values = [objective(labels) for objective in held]
        assert torch.equal(*values)
        assert held[0].weight == held[1].weight == {"audio": 0.0, "visual": 0.25}
        with pytest.raises(TypeError, match="does not support item assignment"):
            held[0].weight["audio"] = -1.0
        for bad in (-1, {"touch": 1.0}, math.nan):
            with pytest.raises(ValueError, match="`weight` should be"):
                held[0].weight = bad
        assert held[0].weight == held[1].weight

    def test_set_weights_are_those_of_the_injection(self):
        found = []
        for first in ({"visual": 0.25}, 1.0):
            torch.manual_seed(0)
            model = Concat()
            objective = objective_of(model, weight=first, seed=0, inject=True)
            objective.weight = 0.0
            objective.weight = {"visual": 0.25}
            inputs, labels = batch()
            F.cross_entropy(model(*inputs), labels).backward()
            found.append([p.grad for p in (*model.parameters(), *objective.head_of("visual").parameters())])
            assert objective.head_of("audio").weight.grad is None
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        objective.remove()
        with pytest.raises(
            RuntimeError, match="`weight` can't be set above 0 where inject=True has no hooks"
        ):
            objective.weight = 1.0

    def test_weight_zero_changes_no_bit(self):
        model = Concat()
        objective = objective_of(model, weight=0.0)
        inputs, labels = batch()
        loss = F.cross_entropy(model(*inputs), labels)
        assert torch.equal(loss + objective(labels), loss)

    def test_own_loss(self):
        model = Concat()
        criterion = nn.CrossEntropyLoss(label_smoothing=0.1, weight=torch.rand(CLASSES))
        objective = objective_of(model, loss=criterion)
        assert list(objective.buffers()) == []
        inputs, labels = batch()
        model(*inputs)
        expected = sum(
            criterion(objective_head(z), labels)
            for objective_head, z in zip(objective.own_heads, model.encode(*inputs), strict=True)
            if objective(labels) is not None
        )
        torch.testing.assert_close(objective(labels), expected)

    def test_ignored_samples(self):
        model = Concat()
        objective = objective_of(model)
        inputs, labels = batch()
        labels[2] = -100
        model(*inputs)
        torch.testing.assert_close(objective(labels), own_loss(objective, model, inputs, labels))

    def test_all_ignored_is_zero_and_not_nan(self):
        model = Concat()
        objective = objective_of(model)
        inputs, labels = batch()
        model(*inputs)
        assert objective(torch.full_like(labels, -100)) == 0

    def test_soft_labels(self):
        model = Concat()
        objective = objective_of(model)
        inputs, _ = batch()
        soft = torch.rand(8, CLASSES).softmax(1)
        model(*inputs)
        found = objective(soft)
        torch.testing.assert_close(found, own_loss(objective, model, inputs, soft))

    def test_two_classes_in_one_logit(self):
        model = Concat(classes=1)
        objective = bo.UnimodalObjective(watch(model), 1)
        inputs, _ = batch()
        labels = torch.randint(2, (8, 1)).float()
        model(*inputs)
        found = objective(labels)
        expected = sum(
            F.binary_cross_entropy_with_logits(head(z), labels)
            for head, z in zip(objective.own_heads, model.encode(*inputs), strict=True)
        )
        torch.testing.assert_close(found, expected)

    def test_half_precision_features(self):
        model = Concat()
        objective = objective_of(model)
        inputs, labels = batch()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(*inputs)
            found = objective(labels)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, own_loss(objective, model, inputs, labels), atol=0.1, rtol=0.1)
        found.backward()


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"heads": "both"}, "`heads` should be one of"),
            ({"weight": -1.0}, "`weight` should be a finite number of at least 0"),
            ({"weight": {"touch": 1.0}}, r"Found \['touch'\]"),
            ({"pool": "median"}, "`pool` should be one of"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            objective_of(Concat(), **options)
        with pytest.raises(ValueError, match="`out_features` should be a whole number of at least 1"):
            bo.UnimodalObjective(watch(Concat()), 0)
        with pytest.raises(TypeError, match="`monitor` should be"):
            bo.UnimodalObjective(cast(Any, Concat()), 3)

    def test_before_any_forward(self):
        objective = objective_of(Concat())
        with pytest.raises(RuntimeError, match="call the model on a batch before"):
            objective(batch()[1])

    def test_labels_of_another_batch(self):
        model = Concat()
        objective = objective_of(model)
        model(*batch()[0])
        with pytest.raises(ValueError, match="returned 8 rows for 5 samples"):
            objective(torch.zeros(5, dtype=torch.int64))


def hooks_on(model: nn.Module, *modules: nn.Module) -> int:
    """All hooks on modules and parameters."""
    parts = [*model.modules(), *modules]
    on_parameters = [len(p._backward_hooks or ()) for p in model.parameters()]
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in parts) + sum(on_parameters)


class TestLifeCycle:
    @pytest.mark.parametrize("inject", [False, True])
    def test_remove(self, inject):
        model = Concat()
        with objective_of(model, inject=inject) as objective:
            monitor = objective.monitor
            hooks = 2 if inject else 1  # its features, for losses or votes, and the injection
            assert len(monitor.hooks.outputs) == hooks + 1  # one more waits for the encoders' first calls
            F.cross_entropy(model(*batch(4)[0]), batch(4)[1]).backward()
            assert len(monitor.hooks.outputs) == hooks
        objective.remove()
        assert not len(monitor.hooks.outputs)
        assert not len(monitor.hooks.gradients)

    @pytest.mark.parametrize(
        ("make", "options"),
        [
            (Concat, {}),
            (Concat, {"inject": True}),
            (Concat, {"inject": True, "heads": "shared"}),
            (SumHeads, {"inject": True}),
            (Concat, {"inject": True, "loss": nn.CrossEntropyLoss()}),
        ],
    )
    def test_one_that_is_garbage_collected_leaves_nothing_behind(self, make, options):
        model = make()
        monitor = watch(model)
        loss = options.get("loss", nn.CrossEntropyLoss())
        hooks = hooks_on(model, loss)
        objective = objective_of(model, monitor=monitor, **options)
        inputs, labels = batch()
        loss(model(*inputs), labels).backward()
        assert len(monitor.hooks.outputs)
        gone = weakref.ref(objective)
        del objective
        assert gone() is None
        assert hooks_on(model, loss) == hooks
        assert not len(monitor.hooks.outputs)
        assert not len(monitor.hooks.gradients)

    def test_one_that_its_model_holds_is_garbage_with_the_model(self):
        model: Any = Concat()
        model.objective = objective_of(model, inject=True, heads="shared")
        inputs, labels = batch()
        F.cross_entropy(model(*inputs), labels).backward()
        gone = weakref.ref(model.objective)
        del model
        gc.collect()
        assert gone() is None

    @pytest.mark.parametrize(
        "options",
        [{"pool": "median"}, {"inject": True, "loss": F.cross_entropy}, {"weight": float("nan")}],
        ids=["pool", "loss", "weight"],
    )
    def test_one_that_is_refused_leaves_nothing_behind(self, options):
        model = SumHeads()
        monitor = watch(model)
        hooks = hooks_on(model)
        with pytest.raises(ValueError, match=r"`(pool|loss|weight)` should be"):
            objective_of(model, monitor=monitor, **options)
        assert hooks_on(model) == hooks
        assert not len(monitor.hooks.outputs)

    @pytest.mark.parametrize("inject", [False, True])
    @pytest.mark.parametrize("make", [Concat, SumHeads])
    def test_copies_add_nothing(self, make, inject):
        model = make()
        objective = objective_of(model, inject=inject)
        inputs, labels = batch()
        loss = F.cross_entropy(model(*inputs), labels)
        (loss if inject else loss + objective(labels)).backward()
        twin, copied = copy.deepcopy((model, objective))
        plain = make()
        plain.load_state_dict(model.state_dict())
        own: list[Any] = list(objective.parameters())
        before = [p.grad.clone() for p in own]
        for one in (twin, plain):
            one.zero_grad()
            F.cross_entropy(one(*inputs), labels).backward()
        pairs: Any = zip(twin.parameters(), plain.parameters(), strict=True)
        assert all(torch.equal(a.grad, b.grad) for a, b in pairs)
        assert all(torch.equal(a, p.grad) for a, p in zip(before, own, strict=True))
        with pytest.raises(RuntimeError, match="no features came by"):
            copied(labels)
        copied.remove()
        assert pickle.loads(pickle.dumps(copied.state_dict())).keys() == objective.state_dict().keys()

    def test_repr(self):
        assert "heads='own', weight={'audio': 1.0, 'visual': 1.0}, joint=1, inject=False" in repr(
            objective_of(Concat())
        )

    @pytest.mark.parametrize("make", PER_HEAD.values(), ids=PER_HEAD)
    def test_scores_are_as_without_it(self, make):
        scores = []
        for with_objective in (False, True):
            torch.manual_seed(0)
            model = make()
            monitor = watch(model)
            accumulator = monitor.scores()
            objective = objective_of(model, monitor=monitor) if with_objective else None
            inputs, labels = batch()
            loss = F.cross_entropy(model(*inputs), labels)
            if objective is not None:
                loss = loss + objective(labels)
            loss.backward()
            found: Any = accumulator.take()
            scores.append(found.score)
        assert torch.equal(*scores)
