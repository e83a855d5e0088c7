"""MMPareto in a training loop: its limits, its window, beside everything else."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import balanceopt as bo
from tests.models import CLASSES, Concat, ConcatOfWrapped, SumHeads, watch
from tests.objectives import given

SCOPES: list[Any] = ["output", "encoder"]


class Run:
    """A model with an injected objective, and an optimizer with MMPareto or without."""

    def __init__(self, make: Callable[[], Any] = Concat, *, flip: bool = False, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = make().double()
        weight = options.pop("weight", 1.0)
        self.monitor = watch(self.model)
        self.objective = bo.UnimodalObjective(
            self.monitor, CLASSES, inject=True, seed=0, weight=weight
        ).double()
        self.backward(99)  # builds the heads
        with torch.no_grad():
            for index, name in enumerate(self.model.names):
                if weight == 1 or weight[name]:
                    # Uni-modal heads that agree with the joint one, or have learnt the opposite, for conflicts.
                    columns = slice(4 * index, 4 * index + 4)
                    late = isinstance(self.model, SumHeads)
                    joint = self.model.own_heads[name].weight if late else self.model.head.weight[:, columns]
                    self.objective.head_of(name).weight.copy_((-3 if flip else 1) * joint)
        groups = [{"params": list(self.model.parameters())}, {"params": list(self.objective.parameters())}]
        self.base = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        self.base.zero_grad()
        self.optimizer: Any = self.base
        self.method: Any = None
        self.weights: list[Tensor] = []
        if "scope" in options:
            self.method = bo.MMPareto(self.objective, **options)
            self.method.listeners.append(lambda number, name, modalities, values: self.weights.append(values))
            self.optimizer = bo.ModulatedOptimizer(self.base, self.monitor, self.method)

    def backward(self, seed: int = 5, scale: float = 1.0, rows: slice = slice(None)) -> Run:
        inputs, labels = given(len(self.model.names), seed=seed)
        (scale * F.cross_entropy(self.model(*(x[rows] for x in inputs)), labels[rows])).backward()
        return self

    def train(self, steps: range | int) -> Run:
        for number in range(steps) if isinstance(steps, int) else steps:
            self.optimizer.zero_grad()
            self.backward(number)
            self.optimizer.step()
        return self

    def gradients(self) -> list[Tensor]:
        params = [*self.model.parameters(), *self.objective.parameters()]
        return [p.grad.clone() for p in params if p.grad is not None]

    def encoder_gradients(self) -> list[Tensor]:
        return [p.grad.clone() for p in self.model.encoders.parameters() if p.grad is not None]

    def numbers(self) -> list[Tensor]:
        return [p.detach().clone() for p in [*self.model.parameters(), *self.objective.parameters()]]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("scope", SCOPES)
class TestLimits:
    def test_gamma_1_without_conflict_is_the_objective_bit_for_bit(self, scope):
        run = Run(scope=scope, gamma=1.0)
        assert same(run.backward(3).gradients(), Run().backward(3).gradients())
        run.optimizer.step()
        assert torch.equal(run.weights[-1], torch.full((2,), 0.5))

    def test_weight_0_is_the_base_bit_for_bit(self, scope):
        run = Run(scope=scope, weight={"audio": 0.0, "visual": 1.0}, flip=True)
        twin = Run(weight={"audio": 0.0, "visual": 1.0}, flip=True)
        run.backward(), twin.backward()
        audio, visual = (
            [[p.grad for p in one.model.encoders[name].parameters()] for one in (run, twin)]
            for name in ("audio", "visual")
        )
        assert same(*audio)
        assert not same(*visual)

    def test_outside_its_window_it_does_nothing(self, scope):
        run = Run(scope=scope, start=1, end=2, flip=True).train(4)
        assert len(run.weights) == 2
        twin = Run(flip=True).train(4)
        assert not same(run.numbers(), twin.numbers())
        closed = Run(scope=scope, start=9, flip=True).train(4)
        assert same(closed.numbers(), twin.numbers())

    def test_windows_of_epochs(self, scope):
        run = Run(scope=scope, start=1, unit="epoch", flip=True)
        run.optimizer.set_epoch(0)
        run.train(1)
        assert run.weights == []
        run.optimizer.set_epoch(1)
        run.train(1)
        assert len(run.weights) == 1

    def test_heads_and_fusion_are_as_without(self, scope):
        run, twin = Run(scope=scope, flip=True).backward(), Run(flip=True).backward()
        encoders = {id(p) for p in run.model.encoders.parameters()}
        pairs = zip(
            [*run.model.parameters(), *run.objective.parameters()],
            [*twin.model.parameters(), *twin.objective.parameters()],
            strict=True,
        )
        for p, q in pairs:
            assert p.grad is not None
            assert torch.equal(p.grad, q.grad) != (id(p) in encoders)

    def test_conflicts_have_another_weight(self, scope):
        run = Run(scope=scope, flip=True).train(1)
        (weights,) = run.weights
        assert weights.shape == (2,)
        assert bool((weights != 0.5).all())


@pytest.mark.parametrize("scope", SCOPES)
class TestLoops:
    def test_loss_scale(self, scope):
        plain = Run(scope=scope, flip=True).backward().gradients()
        scaled = Run(scope=scope, flip=True).backward(scale=1024.0).gradients()
        for a, b in zip(plain, scaled, strict=True):
            torch.testing.assert_close(1024 * a, b)

    def test_each_micro_batch_is_judged_by_itself(self, scope):
        whole = Run(scope=scope, flip=True)
        parts = []
        for rows in (slice(0, 3), slice(3, 8)):
            whole.backward(scale=0.5, rows=rows)
            parts.append(Run(scope=scope, flip=True).backward(scale=0.5, rows=rows).gradients())
        for total, a, b in zip(whole.gradients(), *parts, strict=True):
            torch.testing.assert_close(total, a + b)

    def test_two_passes_in_one_backward(self, scope):
        run, apart = Run(scope=scope, flip=True), Run(scope=scope, flip=True)
        losses = []
        for seed in (1, 2):
            inputs, labels = given(seed=seed)
            losses.append(F.cross_entropy(run.model(*inputs), labels))
            apart.backward(seed)
        torch.stack(losses).sum().backward()
        for a, b in zip(run.gradients(), apart.gradients(), strict=True):
            torch.testing.assert_close(a, b)

    def test_a_backward_past_the_logits_is_left_alone(self, scope):
        run, twin = Run(scope=scope, flip=True), Run(flip=True)
        gradients = []
        for one in (run, twin):
            inputs, _ = given()
            features = one.model.encode(*inputs)
            torch.cat(features, 1).square().mean().backward()
            gradients.append(one.encoder_gradients())
        assert same(*gradients)

    @pytest.mark.parametrize("wrapping", ["tuple", "dict", "dataclass", "pooled"])
    def test_outputs_that_are_more_than_a_tensor(self, scope, wrapping):
        run = Run(lambda: ConcatOfWrapped(wrapping), scope=scope, flip=True).backward()
        plain = Run(scope=scope, flip=True).backward()
        for a, b in zip(run.encoder_gradients(), plain.encoder_gradients(), strict=True):
            torch.testing.assert_close(a, b)

    def test_a_fusion_that_works_in_place(self, scope):
        run = Run(lambda: Concat(between=lambda z: z.tanh_()), scope=scope, flip=True).backward()
        plain = Run(lambda: Concat(between=lambda z: z.tanh()), scope=scope, flip=True).backward()
        for a, b in zip(run.gradients(), plain.gradients(), strict=True):
            torch.testing.assert_close(a, b)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_activation_checkpointing(self, scope, reentrant):
        class Checkpointed(nn.Sequential):
            def forward(self, x):
                return checkpoint(super().forward, x.requires_grad_(), use_reentrant=reentrant)

        run, plain = Run(scope=scope, flip=True), Run(scope=scope, flip=True)
        for encoder in run.model.encoders.values():
            encoder.__class__ = Checkpointed
        if reentrant and scope == "encoder":
            with pytest.raises(RuntimeError, match=r"scope='output'|use_reentrant"):
                run.backward()
            return
        for a, b in zip(run.backward().gradients(), plain.backward().gradients(), strict=True):
            torch.testing.assert_close(a, b)

    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
    def test_compiled_models(self, scope):
        torch._dynamo.reset()
        run, plain = Run(scope=scope, flip=True), Run(scope=scope, flip=True)
        compiled = torch.compile(run.model, backend="eager")
        inputs, labels = given()
        F.cross_entropy(compiled(*inputs), labels).backward()
        for a, b in zip(run.gradients(), plain.backward().gradients(), strict=True):
            torch.testing.assert_close(a, b)
        torch._dynamo.reset()

    def test_opm_drops_what_it_would(self, scope):
        run = Run(scope=scope, flip=True)
        modulator = bo.OPM(run.monitor, q_base=1.0, seed=0)
        run.train(4)
        assert modulator.stats()["dropping"] > 0
        assert all(bool(p.isfinite().all()) for p in run.numbers())
        assert len(run.weights) == 4

    def test_beside_another_method(self, scope):
        run = Run(flip=True)
        methods = [bo.MMPareto(run.objective, scope=scope), bo.FixedModulation({"audio": 0.5})]
        run.optimizer = bo.ModulatedOptimizer(run.base, run.monitor, methods)
        run.backward()
        before = run.encoder_gradients()
        assert same(before, Run(scope=scope, flip=True).backward().encoder_gradients())
        run.optimizer.step()
        assert not same(run.encoder_gradients(), before)

    def test_the_hook_form(self, scope):
        run, wrapped = Run(flip=True), Run(scope=scope, flip=True)
        handle = bo.attach(run.base, run.monitor, bo.MMPareto(run.objective, scope=scope))
        assert same(run.train(3).numbers(), wrapped.train(3).numbers())
        handle.remove()

    def test_late_fusion(self, scope):
        run = Run(SumHeads, scope=scope, flip=True).train(2)
        assert len(run.weights) == 2

    def test_a_resumed_run_goes_on_bit_for_bit(self, scope, tmp_path):
        options: dict[str, Any] = {"scope": scope, "flip": True, "start": 2, "end": 4}
        whole = Run(**options).train(6)
        half = Run(**options).train(3)
        parts = half.model, half.objective, half.optimizer
        torch.save([part.state_dict() for part in parts], tmp_path / "run.pt")
        fresh = Run(**options)
        states = torch.load(tmp_path / "run.pt", weights_only=True)
        for part, state in zip((fresh.model, fresh.objective, fresh.optimizer), states, strict=True):
            part.load_state_dict(state)
        assert same(fresh.train(range(3, 6)).numbers(), whole.numbers())

    def test_bfloat16_autocast(self, scope):
        run = Run(scope=scope, flip=True)
        run.model.float(), run.objective.float()
        inputs, labels = given(dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(run.model(*inputs), labels)
        loss.backward()
        plain = Run(scope=scope, flip=True).backward().encoder_gradients()
        for a, b in zip(run.encoder_gradients(), plain, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=0.1, atol=0.1)


class TestLife:
    def test_without_an_optimizer_it_does_nothing(self):
        run, twin = Run(flip=True), Run(flip=True)
        method = bo.MMPareto(run.objective)
        assert same(run.backward().gradients(), twin.backward().gradients())
        method.remove()

    def test_nothing_is_left(self):
        run, twin = Run(scope="encoder", flip=True), Run(flip=True)
        copied = copy.deepcopy(run.method)
        run.optimizer.remove()
        assert same(run.backward().gradients(), twin.backward().gradients())
        run.method.remove()
        run.method.remove()
        assert len(run.monitor.hooks.links) == 0
        assert copied.removed
        method = bo.MMPareto(run.objective)
        gone = weakref.ref(method)
        del method
        gc.collect()
        assert gone() is None
        assert len(run.monitor.hooks.links) == 0

    def test_a_pass_frees_its_graph(self):
        run = Run(scope="encoder", flip=True)
        inputs, labels = given()
        outputs: list[Any] = []
        run.monitor.hooks.outputs.add(lambda name, output, current: outputs.append(weakref.ref(output)))
        gc.disable()
        try:
            F.cross_entropy(run.model(*inputs), labels).backward()
            assert len(outputs) == 2
            assert all(output() is None for output in outputs)
        finally:
            gc.enable()


class TestRefusals:
    def test_an_objective_in_the_loop(self):
        with pytest.raises(ValueError, match=r"inject=True and joint=1.*Found inject=False"):
            bo.MMPareto(bo.UnimodalObjective(watch(Concat()), CLASSES))

    def test_a_share_of_the_joint_gradient(self):
        with pytest.raises(ValueError, match=r"Found inject=True and joint=0\.5"):
            bo.MMPareto(bo.UnimodalObjective(watch(Concat()), CLASSES, inject=True, joint=0.5))

    def test_another_monitor(self):
        run = Run()
        with pytest.raises(ValueError, match="`monitor` should be the one"):
            bo.ModulatedOptimizer(run.base, watch(run.model), bo.MMPareto(run.objective))

    def test_a_second_one(self):
        run = Run(scope="output")
        other = torch.optim.SGD(run.model.parameters(), lr=0.1)
        second = bo.MMPareto(run.objective)
        optimizer = bo.ModulatedOptimizer(other, run.monitor, second)
        with pytest.raises(RuntimeError, match="two MMPareto"):
            run.backward()
        run.optimizer.remove()
        run.backward()
        assert optimizer.stats()["modulated"] == 0

    def test_two_in_one_optimizer(self):
        run = Run()
        both = [bo.MMPareto(run.objective), bo.MMPareto(run.objective)]
        run.optimizer = bo.ModulatedOptimizer(run.base, run.monitor, both)
        with pytest.raises(RuntimeError, match="two MMPareto"):
            run.backward()
