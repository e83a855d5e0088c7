"""`joint=`: a share of the joint gradient for encoders, in the loop and injected, beside everything else."""

from __future__ import annotations

import copy
import gc
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import balanceopt as bo
from tests.models import CLASSES, FUSIONS, PER_HEAD, SPLIT, Concat, ConcatOfWrapped, Multimodal, batch, watch
from tests.objectives import beside_opm, check, given, plain

SHARED = {**SPLIT, **PER_HEAD}
SHARES = [0.0, 0.3]


def step(model: Any, objective: bo.UnimodalObjective) -> None:
    inputs, labels = batch()
    loss = F.cross_entropy(model(*inputs), labels)
    (loss if objective.inject else loss + objective(labels)).backward()


class TestBothWays:
    @pytest.mark.parametrize("joint", SHARES)
    @pytest.mark.parametrize("make", FUSIONS.values(), ids=FUSIONS)
    def test_own_heads(self, make, joint):
        check(lambda: make(3), plain, joint=joint)

    @pytest.mark.parametrize("joint", SHARES)
    @pytest.mark.parametrize("make", SHARED.values(), ids=SHARED)
    def test_shared_head(self, make, joint):
        check(lambda: make(3), plain, joint=joint, heads="shared")

    @pytest.mark.parametrize("heads", ["own", "shared"])
    def test_accumulation_and_loss_scale(self, heads):
        def loop(model, monitor, extra):
            inputs, labels = given(size=12)
            for rows in (slice(0, 3), slice(3, 4), slice(4, 12)):
                parts, own = [x[rows] for x in inputs], labels[rows]
                (1024 * (F.cross_entropy(model(*parts), own) + extra(own)) / 3).backward()

        check(Concat, loop, heads=heads, joint=0.3, atol=1e-7)

    @pytest.mark.parametrize("heads", ["own", "shared"])
    def test_opm(self, heads):
        check(Concat, beside_opm, heads=heads, joint=0.3)

    def test_a_loss_module(self):
        criterion = nn.MSELoss()

        def loop(model, monitor, extra):
            inputs, labels = given()
            target = F.one_hot(labels, CLASSES).double()
            (criterion(model(*inputs), target) + extra(target)).backward()

        check(Concat, loop, joint=0.3, monitor_options={"loss": criterion})

    def test_activation_checkpointing(self):
        class Checkpointed(nn.Sequential):
            def forward(self, x):
                return checkpoint(super().forward, x, use_reentrant=False)

        def loop(model, monitor, extra):
            for encoder in model.encoders.values():
                encoder.__class__ = Checkpointed
            plain(model, monitor, extra)

        check(Concat, loop, joint=0.3)

    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
    def test_compiled_models(self):
        def loop(model, monitor, extra):
            compiled = torch.compile(model, backend="eager")
            inputs, labels = given()
            (F.cross_entropy(compiled(*inputs), labels) + extra(labels)).backward()

        torch._dynamo.reset()
        check(Concat, loop, joint=0.3)
        torch._dynamo.reset()


@pytest.mark.parametrize("inject", [False, True])
class TestOutputs:
    """What encoders return and fusions do with it: at 0 encoders get the uni-modal gradient, whole and alone."""

    def encoders_get_their_own(self, make: Any, inject: bool, **options: Any) -> None:
        torch.manual_seed(0)
        model = make().double()
        twin = copy.deepcopy(model)
        objective = bo.UnimodalObjective(
            watch(model, **options), CLASSES, joint=0, inject=inject, seed=0
        ).double()
        alone = bo.UnimodalObjective(watch(twin, **options), CLASSES, seed=0).double()
        inputs, labels = given()
        joint = F.cross_entropy(model(*inputs), labels)
        (joint if inject else joint + objective(labels)).backward()
        twin(*inputs)
        alone(labels).backward()
        for (name, p), q in zip(model.encoders.named_parameters(), twin.encoders.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, msg=name)

    @pytest.mark.parametrize("wrapping", ["tuple", "dict", "dataclass", "pooled"])
    def test_more_than_a_tensor(self, inject, wrapping):
        self.encoders_get_their_own(lambda: ConcatOfWrapped(wrapping), inject)

    def test_a_tensor_made_of_another_tensor_of_the_output(self, inject):
        class Pooled(nn.Module):
            def __init__(self, inputs: int, width: int) -> None:
                super().__init__()
                self.project = nn.Linear(inputs, 3 * width)

            def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                hidden = self.project(x).unflatten(1, (3, -1))
                return hidden, hidden.mean(1)

        class LastOnes(Multimodal):
            def __init__(self) -> None:
                super().__init__(encoder=Pooled)
                self.head = nn.Linear(8, CLASSES)

            def fuse(self, features: list[Any]) -> torch.Tensor:
                return self.head(torch.cat([pooled for _, pooled in features], 1))

        self.encoders_get_their_own(LastOnes, inject)

    def test_a_fusion_that_works_in_place(self, inject):
        self.encoders_get_their_own(lambda: Concat(between=lambda z: z.tanh_()), inject)

    def test_columns_that_can_not_be_made_of_the_output(self, inject):
        slices = {"audio": slice(0, 4), "visual": slice(4, 8)}
        self.encoders_get_their_own(lambda: Concat(between=lambda z: z.tanh()), inject, slices=slices)

    def test_scores_stay(self, inject):
        torch.manual_seed(0)
        model = Concat()
        monitor = watch(model)
        scores = monitor.scores()
        inputs, labels = batch()
        F.cross_entropy(model(*inputs), labels).backward()
        expected = scores.take()
        objective = bo.UnimodalObjective(monitor, CLASSES, joint=0, inject=inject)
        loss = F.cross_entropy(model(*inputs), labels)
        (loss if inject else loss + objective(labels)).backward()
        result = scores.take()
        assert expected is not None
        assert result is not None
        torch.testing.assert_close(result.score, expected.score)


class TestWarnings:
    def caught(self, act: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            act()
        return [str(one.message) for one in caught]

    @pytest.mark.parametrize("inject", [False, True])
    def test_a_second_way_into_the_fusion(self, inject):
        class Skip(Concat):
            def forward(self, *inputs):
                features = self.encode(*inputs)
                first: Any = self.encoders["audio"]
                return self.fuse([features[0] + first[0](inputs[0])[:, :4], features[1]])

        model = Skip()
        objective = bo.UnimodalObjective(watch(model, scores="zero-out"), CLASSES, joint=0, inject=inject)

        def two_steps() -> None:
            step(model, objective)
            step(model, objective)

        (message,) = self.caught(two_steps)
        assert "['audio'] reach the joint logits past" in message

    @pytest.mark.parametrize("inject", [False, True])
    @pytest.mark.parametrize("make", FUSIONS.values(), ids=FUSIONS)
    def test_nothing_is_said_of_models_without(self, make, inject):
        model = make()
        objective = bo.UnimodalObjective(watch(model), CLASSES, joint=0, inject=inject)
        assert self.caught(lambda: step(model, objective)) == []

    def test_an_objective_that_is_never_called(self):
        model = Concat()
        objective = bo.UnimodalObjective(watch(model), CLASSES, joint=0)

        def forget() -> None:
            for _ in range(30):
                inputs, labels = batch()
                F.cross_entropy(model(*inputs), labels).backward()

        (message,) = self.caught(forget)
        assert "10 training forwards without a call of the objective" in message
        objective.remove()

    def test_nothing_is_said_of_a_loop_that_calls_it(self):
        model = Concat()
        objective = bo.UnimodalObjective(watch(model), CLASSES, joint=0)

        def accumulate() -> None:
            for _ in range(12):
                step(model, objective)

        assert self.caught(accumulate) == []


class TestRefusals:
    def test_an_encoder_without_any_gradient(self):
        model = Concat()
        with pytest.raises(ValueError, match=r"Found 0 for \['visual'\]"):
            bo.UnimodalObjective(watch(model), CLASSES, weight={"audio": 1}, joint=0)
        model.encoders["visual"].requires_grad_(False)
        step(model, bo.UnimodalObjective(watch(model), CLASSES, weight={"audio": 1}, joint=0))

    def test_second_derivatives(self):
        model = Concat()
        objective = bo.UnimodalObjective(watch(model), CLASSES, joint=0.5)
        inputs, labels = batch()
        loss = F.cross_entropy(model(*inputs), labels) + objective(labels)
        with pytest.raises(RuntimeError, match=r"can't follow backward\(create_graph=True\)"):
            loss.backward(create_graph=True)

    def test_a_second_objective_by_another_monitor(self):
        model = Concat()
        first = bo.UnimodalObjective(watch(model), CLASSES, joint=0)
        second = bo.UnimodalObjective(watch(model), CLASSES, joint=0)
        with pytest.raises(RuntimeError, match="another UnimodalObjective"):
            step(model, first)
        second.remove()
        step(model, first)


class TestLife:
    @pytest.mark.parametrize("inject", [False, True])
    def test_nothing_is_left(self, inject):
        model = Concat()
        twin = copy.deepcopy(model)
        monitor = watch(model)
        objective = bo.UnimodalObjective(monitor, CLASSES, joint=0, inject=inject)
        copied = copy.deepcopy(objective)
        assert len(monitor.hooks.links) == 1
        objective.remove()
        objective.remove()
        assert len(monitor.hooks.links) == 0
        objective = bo.UnimodalObjective(monitor, CLASSES, joint=0, inject=inject)
        del objective
        gc.collect()
        assert len(monitor.hooks.links) == 0
        assert copied.joint == 0
        inputs, labels = batch()
        for one in (model, twin):
            F.cross_entropy(one(*inputs), labels).backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0)

    def test_without_a_share_there_is_no_hook(self):
        monitor = watch(Concat())
        objective = bo.UnimodalObjective(monitor, CLASSES)
        assert len(monitor.hooks.links) == 0
        assert "joint=1" in repr(objective)

    def test_eval_mode_is_left_alone(self):
        model = Concat().eval()
        objective = bo.UnimodalObjective(watch(model), CLASSES, joint=0)
        inputs, labels = batch()
        F.cross_entropy(model(*inputs), labels).backward()
        assert all(p.grad is not None and p.grad.any() for p in model.encoders.parameters())
        objective.remove()

    @pytest.mark.parametrize("inject", [False, True])
    def test_a_monitor_without_a_head(self, inject):
        criterion = nn.CrossEntropyLoss()
        model = Concat()
        monitor = bo.ModalityMonitor(model, model.modalities, loss=criterion if inject else None)
        objective = bo.UnimodalObjective(monitor, CLASSES, joint=0, inject=inject)
        inputs, labels = batch()
        loss = criterion(model(*inputs), labels)
        (loss if inject else loss + objective(labels)).backward()
        assert all(p.grad is not None and p.grad.any() for p in model.encoders.parameters())

    @pytest.mark.parametrize("inject", [False, True])
    def test_samples_without_a_modality_give_its_encoder_nothing(self, inject):
        gradients = []
        for value in (0.0, 5.0):
            torch.manual_seed(0)
            model = Concat().double()
            monitor = watch(model)
            objective = bo.UnimodalObjective(monitor, CLASSES, joint=0, inject=inject, seed=0).double()
            inputs, labels = given()
            present = torch.arange(8) < 6
            inputs[1][~present] = value
            monitor.observe(labels, present={"visual": present})
            loss = F.cross_entropy(model(*inputs), labels)
            (loss if inject else loss + objective(labels)).backward()
            gradients.append([p.grad for p in model.encoders["visual"].parameters()])
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)

    @pytest.mark.parametrize("inject", [False, True])
    def test_a_resumed_run_goes_on_bit_for_bit(self, inject, tmp_path):
        def build() -> tuple[Any, bo.UnimodalObjective, torch.optim.Optimizer]:
            torch.manual_seed(0)
            model = Concat()
            objective = bo.UnimodalObjective(watch(model), CLASSES, joint=0.3, inject=inject, seed=0)
            model(*batch()[0]), objective.own_heads
            groups = [{"params": list(model.parameters())}, {"params": list(objective.parameters())}]
            return model, objective, torch.optim.SGD(groups, lr=0.1, momentum=0.9)

        def train(model: Any, objective: Any, optimizer: Any, numbers: range) -> None:
            for number in numbers:
                torch.manual_seed(100 + number)
                optimizer.zero_grad()
                step(model, objective)
                optimizer.step()

        whole = build()
        train(*whole, range(6))
        half = build()
        train(*half, range(3))
        torch.save([one.state_dict() for one in half], tmp_path / "run.pt")
        fresh = build()
        for one, state in zip(fresh, torch.load(tmp_path / "run.pt", weights_only=True), strict=True):
            one.load_state_dict(state)
        train(*fresh, range(3, 6))
        for part, expected in zip(fresh[:2], whole[:2], strict=True):
            for p, q in zip(part.parameters(), expected.parameters(), strict=True):
                assert torch.equal(p, q)
