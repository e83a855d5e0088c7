"""inject=True beside other methods, checkpointing, compilation and odd loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import balanceopt as bo
from tests.models import CLASSES, Concat, SumHeads, batch, watch
from tests.objectives import beside_opm, check, given, gradients
from tests.relearning import train_epoch


class TestCompany:
    @pytest.mark.parametrize("heads", ["own", "shared"])
    def test_opm(self, heads):
        check(Concat, beside_opm, heads=heads)

    @pytest.mark.parametrize("modulation", [bo.OGM(0.5, noise=False), bo.AMSS(), bo.OGM(0.5)], ids=str)
    def test_modulated_optimizers(self, modulation):
        finals = []
        for inject in (False, True):
            torch.manual_seed(0)
            model = Concat().double()
            monitor = watch(model)
            objective = bo.UnimodalObjective(monitor, CLASSES, inject=inject, seed=0).double()
            groups = [*bo.modality_groups(model, model.modalities), {"params": objective.parameters()}]
            optimizer = bo.ModulatedOptimizer(torch.optim.SGD(groups, lr=0.1), monitor, modulation, seed=0)
            for seed in range(4):
                inputs, labels = given(seed=seed)
                optimizer.zero_grad()
                loss = F.cross_entropy(model(*inputs), labels)
                (loss if inject else loss + objective(labels)).backward()
                optimizer.step()
            assert optimizer.stats()["modulated"] == 4
            finals.append([p.detach().clone() for p in [*model.parameters(), *objective.parameters()]])
        for a, b in zip(*finals, strict=True):
            torch.testing.assert_close(a, b)

    def test_noise_where_own_heads_are_built_later(self):
        model = Concat()
        monitor = watch(model)
        objective = bo.UnimodalObjective(monitor, CLASSES, seed=0)
        groups = [*bo.modality_groups(model, model.modalities), {"params": objective.parameters()}]
        optimizer = bo.ModulatedOptimizer(torch.optim.SGD(groups, lr=0.1), monitor, bo.OGM(0.5))
        for _ in range(2):
            inputs, labels = batch()
            optimizer.zero_grad()
            (F.cross_entropy(model(*inputs), labels) + objective(labels)).backward()
            optimizer.step()
        assert optimizer.stats()["modulated"] == 2
        assert all(p.isfinite().all() for p in objective.parameters())

    def test_re_learning(self):
        model = Concat()
        monitor = watch(model)
        objective = bo.UnimodalObjective(monitor, CLASSES, inject=True)
        optimizer = torch.optim.SGD([*model.parameters(), *objective.parameters()], lr=0.1)
        data = [(*batch(32)[0], torch.arange(32) % CLASSES) for _ in range(2)]
        scheduler = bo.ReLearnScheduler(optimizer, monitor, data, data, every=1, epochs=99)
        train_epoch(model, optimizer, data)
        own: list[Any] = list(objective.parameters())
        before = [p.grad.clone() for p in own]
        assert scheduler.step() is not None
        assert all(torch.equal(a, p.grad) for a, p in zip(before, own, strict=True))

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("heads", ["own", "shared"])
    def test_activation_checkpointing_inside_the_encoder(self, reentrant, heads):
        class Checkpointed(nn.Sequential):
            def forward(self, x):
                return checkpoint(super().forward, x, use_reentrant=reentrant)

        def loop(model, monitor, extra):
            for encoder in model.encoders.values():
                encoder.__class__ = Checkpointed
            inputs, labels = given()
            (F.cross_entropy(model(*(x.requires_grad_() for x in inputs)), labels) + extra(labels)).backward()

        check(Concat, loop, heads=heads)

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("heads", ["own", "shared"])
    def test_activation_checkpointing_around_the_encoder(self, reentrant, heads):
        class Around(Concat):
            def encode(self, *inputs):
                parts = zip(self.encoders.values(), inputs, strict=True)
                if not self.checkpoints:
                    return [encoder(x) for encoder, x in parts]
                return [checkpoint(encoder, x, use_reentrant=reentrant) for encoder, x in parts]

        found = []
        for inject in (False, True):

            def loop(model, monitor, extra, inject=inject):
                model.checkpoints = inject
                inputs, labels = given()
                logits = model(*(x.requires_grad_() for x in inputs))
                (F.cross_entropy(logits, labels) + extra(labels)).backward()

            found.append(gradients(Around, loop, inject=inject, heads=heads))
        for name, value in found[0].items():
            torch.testing.assert_close(found[1][name], value, msg=name)

    @pytest.mark.filterwarnings(
        "ignore:The .grad attribute of a Tensor that is not a leaf"
    )  # dynamo looks at it
    @pytest.mark.parametrize("make", [Concat, SumHeads])
    @pytest.mark.parametrize(("backend", "heads"), [("eager", "own"), ("aot_eager", "shared")])
    def test_compiled_models(self, backend, heads, make):
        def loop(model, monitor, extra):
            compiled = torch.compile(model, backend=backend)
            inputs, labels = given()
            (F.cross_entropy(compiled(*inputs), labels) + extra(labels)).backward()

        torch._dynamo.reset()
        check(make, loop, heads=heads)
        torch._dynamo.reset()

    def test_a_second_objective_of_another_kind(self):
        def loop(model, monitor, extra):
            shared = bo.UnimodalObjective(monitor, CLASSES, heads="shared", weight=0.5)
            inputs, labels = given()
            (F.cross_entropy(model(*inputs), labels) + extra(labels) + shared(labels)).backward()

        check(Concat, loop)

    def test_frozen_encoders_and_heads(self):
        def loop(model, monitor, extra):
            model.encoders["audio"].requires_grad_(False)
            inputs, labels = given()
            (F.cross_entropy(model(*inputs), labels) + extra(labels)).backward()
            for p in model.encoders["audio"].parameters():
                assert p.grad is None
                p.grad = torch.zeros_like(p)

        check(Concat, loop)

    def test_a_backward_that_does_not_reach_the_logits(self):
        def loop(model, monitor, extra):
            inputs, labels = given()
            logits = model(*inputs)
            model.encoders["audio"].forward(inputs[0]).sum().backward()
            (F.cross_entropy(logits, labels) + extra(labels)).backward()

        check(Concat, loop)

    def test_autograd_grad_leaves_nothing_behind(self):
        def loop(model, monitor, extra):
            inputs, labels = given()
            loss = F.cross_entropy(model(*inputs), labels) + extra(labels)
            torch.autograd.grad(loss, model.head.weight, retain_graph=True)
            for p in model.parameters():
                assert p.grad is None
            model.zero_grad()
            loss.backward()

        check(Concat, loop, heads="shared")
