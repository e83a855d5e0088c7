"""TotalCorrelationLoss: of which logits, which samples; what it refuses; beside methods that need scores."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import balanceopt as bo
from balanceopt.functional import total_correlation_loss
from tests.models import CLASSES, ZERO_OUT, Concat, Gated, MLPHead, SumHeads, batch, watch
from tests.training import batch as numbered
from tests.training import groups_of, modulated, small_model
from tests.unit.optim.test_no_waiting import NoWaiting


def logits_of(model: Any, inputs: list[Tensor]) -> list[Tensor]:
    """Each modality's part of a concatenating model's logits."""
    columns = model.head.weight.split(model.widths, 1)
    return [
        encoder.forward(x) @ w.T + model.head.bias / len(inputs)
        for encoder, x, w in zip(model.encoders.values(), inputs, columns, strict=True)
    ]


class TestTheRule:
    def test_large_logits(self):
        """The published code overflows."""
        generator = torch.Generator().manual_seed(0)
        logits = [1e4 * torch.randn(6, 4, generator=generator) for _ in range(3)]
        labels = torch.arange(6) % 4
        leaves = [x.clone().requires_grad_() for x in logits]
        loss = total_correlation_loss(leaves, labels)
        loss.backward()
        expected = total_correlation_loss([x.double() for x in logits], labels)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
        assert all(bool(x.grad is not None and x.grad.isfinite().all()) for x in leaves)

    def test_a_class_that_a_modality_rules_out(self):
        ruled_out = torch.tensor([[0.0, 1.0, -torch.inf], [2.0, 0.0, -torch.inf]], requires_grad=True)
        other = torch.tensor([[0.0, 1.0, 3.0], [1.0, 0.0, 5.0]], requires_grad=True)
        labels = torch.tensor([1, 0])
        loss = total_correlation_loss([ruled_out, other], labels)
        torch.testing.assert_close(loss, total_correlation_loss([ruled_out[:, :2], other[:, :2]], labels))
        assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(loss, [ruled_out, other]))
        assert total_correlation_loss([ruled_out, other], torch.tensor([2, 0])) == torch.inf

    def test_a_modality_learns_where_another_one_answers_everything(self):
        labels = torch.arange(8) % 4
        sure, weak = 100 * F.one_hot(labels).float(), torch.zeros(8, 4, requires_grad=True)
        (joint,) = torch.autograd.grad(F.cross_entropy(sure + weak, labels), weak)
        (correlation,) = torch.autograd.grad(total_correlation_loss([sure, weak], labels), weak)
        (alone,) = torch.autograd.grad(F.cross_entropy(weak, labels), weak)
        assert float(joint.abs().max()) < 1e-9
        torch.testing.assert_close(correlation, alone)


class TestWhichSamples:
    def test_ignored_by_the_monitor(self):
        model = Concat()
        objective = bo.TotalCorrelationLoss(watch(model, ignore_index=4))
        inputs, labels = batch(16)
        model(*inputs)
        expected = total_correlation_loss(logits_of(model, inputs), labels, ignore_index=4)
        torch.testing.assert_close(objective(labels), expected)

    @pytest.mark.parametrize("having", [3, 0])
    @pytest.mark.parametrize("packed", [False, True])
    def test_samples_that_lack_a_modality_have_the_logits_0(self, having: int, packed: bool):
        class Packed(Concat):
            """Runs the second encoder on the samples that have its modality."""

            def encode(self, *inputs: Tensor) -> list[Tensor]:
                audio, visual = inputs
                z = self.encoders["visual"](visual[:having])
                return [self.encoders["audio"](audio), torch.cat([z, torch.zeros(8 - having, 4)])]

        torch.manual_seed(0)
        model = Packed() if packed else Concat()
        options: dict[str, Any] = {"slices": {"audio": slice(0, 4), "visual": slice(4, 8)}} if packed else {}
        monitor = watch(model, **options)
        objective = bo.TotalCorrelationLoss(monitor)
        present = torch.arange(8) < having
        assert monitor.unimodal is not None
        if packed:  # a pass in which all rows are there shows the layout
            monitor.unimodal.load_layout(_layout_of(Concat()))
        inputs, labels = batch()
        monitor.observe(labels, present={"visual": present})
        model(*inputs)
        loss = objective(labels)
        audio, visual = logits_of(model, inputs)
        expected = total_correlation_loss([audio, torch.where(present[:, None], visual, 0)], labels)
        torch.testing.assert_close(loss, expected)
        params = list(model.parameters())
        pairs = zip(
            torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True),
            torch.autograd.grad(expected, params),
            strict=True,
        )
        for a, b in pairs:
            torch.testing.assert_close(a, b)

    def test_a_modality_whose_encoder_is_not_called(self):
        class Lacking(Concat):
            def encode(self, *inputs: Tensor) -> list[Tensor]:
                return [self.encoders["audio"](inputs[0]), torch.zeros(len(inputs[0]), 4)]

        model = Lacking()
        objective = bo.TotalCorrelationLoss(watch(model))
        inputs, labels = batch()
        model(*inputs)
        audio = logits_of(model, inputs)[0]
        expected = total_correlation_loss([audio, torch.zeros_like(audio)], labels)
        torch.testing.assert_close(objective(labels), expected)

    def test_each_micro_batch_is_a_batch_of_its_own(self):
        model = Concat()
        objective = bo.TotalCorrelationLoss(watch(model))
        expected: Any = 0
        for _ in range(2):
            inputs, labels = batch(6)
            model(*inputs)
            (objective(labels) / 2).backward()
            expected = expected + total_correlation_loss(logits_of(model, inputs), labels) / 2
        gradients = torch.autograd.grad(expected, list(model.parameters()))
        for p, g in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(p.grad, g)

    def test_in_evaluation(self):
        model = Concat().eval()
        objective = bo.TotalCorrelationLoss(watch(model, train_only=False))
        inputs, labels = batch()
        model(*inputs)  # shows the layout
        with torch.no_grad():
            inputs, labels = batch(5)
            model(*inputs)
            loss = objective(labels)
        assert not loss.requires_grad
        torch.testing.assert_close(loss, total_correlation_loss(logits_of(model, inputs), labels))


def _layout_of(model: Concat) -> dict[str, Any]:
    monitor = watch(model)
    objective = bo.TotalCorrelationLoss(monitor)
    model(*batch()[0])
    objective.remove()
    assert monitor.unimodal is not None
    return monitor.unimodal.layout()


def test_autocast_and_a_step_without_device_synchronisation():
    model = Concat()
    objective = bo.TotalCorrelationLoss(watch(model))
    model(*batch()[0])  # finds the columns by comparing numbers
    inputs, labels = batch()
    with NoWaiting(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(*inputs)
        loss = objective(labels)
        loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss, total_correlation_loss(logits_of(model, inputs), labels), atol=0.1, rtol=0.1
    )


def test_weight_0_changes_no_bit():
    model, twin = small_model(), small_model()
    objective = bo.TotalCorrelationLoss(watch(model), weight=0)
    for one in (model, twin):
        inputs, labels = numbered(0, one)
        loss = F.cross_entropy(one(*inputs), labels)
        (loss + objective(labels) if one is model else loss).backward()
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    assert all(p.grad is not None and q.grad is not None and torch.equal(p.grad, q.grad) for p, q in pairs)


class TestRefusals:
    @pytest.mark.parametrize("kind", ZERO_OUT)
    def test_fusions_that_are_no_sum(self, kind: str):
        model = ZERO_OUT[kind]()
        refused = pytest.raises(ValueError, match=r"sum over modalities.*'zero-out'.*UnimodalObjective")
        monitor = watch(model)
        if not isinstance(model.heads, nn.Linear):
            with refused:
                bo.TotalCorrelationLoss(monitor)
            return
        objective = bo.TotalCorrelationLoss(monitor)  # the first pass shows that nothing is concatenated
        inputs, labels = batch()
        model(*inputs)
        with refused:
            objective(labels)

    def test_scores_of_the_users_own(self):
        monitor = watch(Gated(), scores=lambda features: features)
        with pytest.raises(ValueError, match="Found 'function <lambda>'"):
            bo.TotalCorrelationLoss(monitor)

    def test_a_monitor_without_a_head(self):
        with pytest.raises(ValueError, match="TotalCorrelationLoss needs uni-modal scores"):
            bo.TotalCorrelationLoss(watch(MLPHead(), head=None))

    @pytest.mark.parametrize(
        "loss", [nn.MSELoss(), nn.BCEWithLogitsLoss(), lambda x, y: (x - y).square().mean(1)]
    )
    def test_other_losses(self, loss: Any):
        with pytest.raises(
            ValueError, match=r"one of cross-entropy.*Found loss=.*UnimodalObjective takes any"
        ):
            bo.TotalCorrelationLoss(watch(Concat(), loss=loss))

    @pytest.mark.parametrize("labels", [torch.rand(8), torch.rand(8, CLASSES), torch.zeros(8, 3).long()])
    def test_labels_that_are_no_class_indices(self, labels: Tensor):
        model = Concat()
        objective = bo.TotalCorrelationLoss(watch(model))
        model(*batch()[0])
        with pytest.raises(ValueError, match=r"class indices \(B,\), one for each sample.*UnimodalObjective"):
            objective(labels)

    def test_another_number_of_labels(self):
        model = Concat()
        objective = bo.TotalCorrelationLoss(watch(model))
        model(*batch()[0])
        with pytest.raises(ValueError, match=r"one entry for each of 8 samples\. Found 4"):
            objective(torch.zeros(4).long())

    def test_before_any_forward(self):
        with pytest.raises(RuntimeError, match="no features came by"):
            bo.TotalCorrelationLoss(watch(Concat()))(torch.zeros(8).long())


class TestCompany:
    """The gradient at the joint logits is that of the loop's own criterion, and none without one."""

    def steps(self, loss_of: Any, **options: Any) -> bo.ModulatedOptimizer:
        model, optimizer = modulated(bo.OGM(0.5, noise=False))
        objective = bo.TotalCorrelationLoss(optimizer.monitor, **options)
        recorder = bo.Recorder(optimizer)
        for number in range(3):
            inputs, labels = numbered(number, model)
            optimizer.zero_grad()
            loss_of(model(*inputs), labels, objective).backward()
            optimizer.step()
        self.first_scores = [values[0] for _, values in recorder.series("score").values()]
        return optimizer

    def test_labels_are_recovered_from_a_share_of_the_criterion(self):
        optimizer = self.steps(lambda z, y, tc: 0.3 * F.cross_entropy(z, y) + tc(y), weight=0.7)
        assert optimizer.stats()["modulated"] == 3
        assert optimizer.monitor.stats()["labels"] == {"gradient": 3}
        scores = self.first_scores
        self.steps(lambda z, y, tc: F.cross_entropy(z, y))
        assert scores == pytest.approx(self.first_scores)

    def test_without_a_share_the_user_is_told(self):
        with pytest.warns(UserWarning, match=r"no backward reached the head's output .*no loss on it"):
            optimizer = self.steps(lambda z, y, tc: tc(y))
        assert optimizer.stats()["modulated"] == 0

    def test_without_a_share_observed_labels_and_a_gradient_of_0_give_scores(self):
        def pure(z: Tensor, y: Tensor, tc: Any) -> Tensor:
            tc.monitor.observe(y)
            loss: Tensor = tc(y) + 0 * z.sum()
            return loss

        optimizer = self.steps(pure)
        assert optimizer.stats()["modulated"] == 3
        scores = self.first_scores
        self.steps(lambda z, y, tc: F.cross_entropy(z, y))
        assert scores == pytest.approx(self.first_scores)

    def test_features_that_opm_dropped_are_whole(self):
        model = Concat()
        monitor = watch(model)
        opm = bo.OPM(monitor, q_base=1.0, seed=0)
        objective = bo.TotalCorrelationLoss(monitor, weight=0.5)
        for _ in range(3):
            inputs, labels = batch()
            logits = model(*inputs)
            loss = objective(labels)
            (F.cross_entropy(logits, labels) + loss).backward()
            expected = total_correlation_loss(logits_of(model, inputs), labels)
            torch.testing.assert_close(loss, 0.5 * expected)
        assert opm.stats()["dropping"] > 0


class TestLifeCycle:
    @pytest.mark.parametrize("how", ["remove", "collected"])
    def test_nothing_is_left_behind(self, how: str):
        model = SumHeads()
        monitor = watch(model)
        with bo.TotalCorrelationLoss(monitor) as objective:
            inputs, labels = batch()
            model(*inputs)
            objective(labels).backward()
            assert len(monitor.hooks.outputs) == 1
            if how == "remove":
                objective.remove()
                assert not len(monitor.hooks.outputs)
        alive = weakref.ref(objective)
        del objective
        gc.collect()
        assert alive() is None
        assert not len(monitor.hooks.outputs)
        assert all(not p._backward_hooks for p in model.parameters())

    def test_a_copy_is_inert_and_there_is_no_state(self):
        model = Concat()
        objective = bo.TotalCorrelationLoss(watch(model), weight=0.5)
        inputs, labels = batch()
        model(*inputs)
        twin = copy.deepcopy(objective)
        assert (repr(twin), list(twin.parameters()), dict(twin.state_dict())) == (repr(objective), [], {})
        assert repr(twin) == "TotalCorrelationLoss(weight=0.5, group_negatives=True)"
        with pytest.raises(RuntimeError, match="no features came by"):
            twin(labels)
        objective(labels).backward()


def test_a_resumed_run_goes_on_bit_for_bit():
    def train(model: Any, optimizer: Any, numbers: range) -> Any:
        objective = bo.TotalCorrelationLoss(watch(model), weight=0.5)
        for number in numbers:
            inputs, labels = numbered(number, model)
            optimizer.zero_grad()
            (0.5 * F.cross_entropy(model(*inputs), labels) + objective(labels)).backward()
            optimizer.step()
        return model.state_dict(), optimizer.state_dict()

    def made() -> tuple[Any, Any]:
        model = small_model()
        return model, torch.optim.SGD(groups_of(model), lr=0.1, momentum=0.9)

    whole, _ = train(*made(), range(4))
    saved = copy.deepcopy(train(*made(), range(2)))
    model, optimizer = made()
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    resumed, _ = train(model, optimizer, range(2, 4))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
