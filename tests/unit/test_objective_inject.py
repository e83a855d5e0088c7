"""inject=True adds the very gradients that `loss + objective(labels)` would: by fusion, at any scale."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import balanceopt as bo
from tests.models import CLASSES, FUSIONS, PER_HEAD, SPLIT, Concat, ConcatOfWrapped, SumHeads, watch
from tests.objectives import check, given, plain

SHARED = {**SPLIT, **PER_HEAD}


class TestFusions:
    @pytest.mark.parametrize("modalities", [2, 3])
    @pytest.mark.parametrize("make", FUSIONS.values(), ids=FUSIONS)
    def test_own_heads(self, make, modalities):
        check(lambda: make(modalities), plain)

    @pytest.mark.parametrize("heads", ["own", "shared"])
    def test_late_fusion_in_whatever_order_its_parts_run(self, heads):
        class Interleaved(SumHeads):
            def forward(self, *inputs):
                parts = zip(self.encoders.values(), self.own_heads.values(), inputs, strict=True)
                return torch.stack([head(encoder(x)) for encoder, head, x in parts]).sum(0)

        check(lambda: Interleaved(3), plain, heads=heads)

    @pytest.mark.parametrize("modalities", [2, 3])
    @pytest.mark.parametrize("make", SHARED.values(), ids=SHARED)
    def test_shared_head(self, make, modalities):
        check(lambda: make(modalities), plain, heads="shared")

    @pytest.mark.parametrize("wrapping", ["tuple", "dict", "dataclass", "pooled"])
    def test_outputs_that_are_more_than_a_tensor(self, wrapping):
        check(lambda: ConcatOfWrapped(wrapping), plain)

    def test_features_made_of_several_tensors(self):
        select = {"audio": lambda output: output[0] + 2 * output[0].tanh()}
        check(lambda: ConcatOfWrapped("tuple"), plain, monitor_options={"select": select})

    def test_a_fusion_that_works_in_place(self):
        check(lambda: Concat(between=lambda z: z.tanh_()), plain, heads="own")

    def test_two_classes_in_one_logit(self):
        def loop(model, monitor, extra):
            inputs, _ = given()
            labels = torch.arange(8) % 2
            loss = F.binary_cross_entropy_with_logits(model(*inputs)[:, 0], labels.double())
            (loss + extra(labels)).backward()

        explicit, injected = (
            {name: p.grad for name, p in self.one_logit(loop, inject).items()} for inject in (False, True)
        )
        for name, value in explicit.items():
            torch.testing.assert_close(injected[name], value)

    def one_logit(self, loop, inject):
        torch.manual_seed(0)
        model = Concat(classes=1).double()
        monitor = watch(model)
        objective = bo.UnimodalObjective(monitor, 1, inject=inject, seed=0).double()
        loop(model, monitor, (lambda labels: 0.0) if inject else objective)
        return dict([*model.named_parameters(), *objective.named_parameters()])


class TestScale:
    @pytest.mark.parametrize("heads", ["own", "shared"])
    @pytest.mark.parametrize("scale", [1e-4, 65536.0])
    def test_loss_scale(self, scale, heads):
        def loop(model, monitor, extra):
            inputs, labels = given()
            (scale * (F.cross_entropy(model(*inputs), labels) + extra(labels))).backward()

        check(Concat, loop, heads=heads, atol=1e-10 * scale)

    @pytest.mark.parametrize("heads", ["own", "shared"])
    def test_accumulation(self, heads):
        def loop(model, monitor, extra):
            inputs, labels = given(size=12)
            for rows in (slice(0, 3), slice(3, 4), slice(4, 12)):
                parts, own = [x[rows] for x in inputs], labels[rows]
                ((F.cross_entropy(model(*parts), own) + extra(own)) / 3).backward()

        check(Concat, loop, heads=heads)

    @pytest.mark.parametrize("heads", ["own", "shared"])
    def test_two_passes_in_one_backward(self, heads):
        def loop(model, monitor, extra):
            total: Any = 0.0
            for seed in (1, 2):
                inputs, labels = given(seed=seed)
                total = total + F.cross_entropy(model(*inputs), labels) + extra(labels)
            total.backward()

        check(Concat, loop, heads=heads)

    @pytest.mark.parametrize("heads", ["own", "shared"])
    def test_backward_twice(self, heads):
        def loop(model, monitor, extra):
            inputs, labels = given()
            loss = F.cross_entropy(model(*inputs), labels) + extra(labels)
            loss.backward(retain_graph=True)
            (3 * loss).backward()

        check(Concat, loop, heads=heads)

    def test_grad_scaler_and_autocast(self):
        def loop(model, monitor, extra):
            inputs, labels = given(dtype=torch.float32)
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(model(*inputs), labels) + extra(labels)
            scaler.scale(loss).backward()

        # The gradient at the logits is rounded to bfloat16, and with it the scale that is read from it.
        check(Concat, loop, dtype=torch.float32, rtol=0.02, atol=0.02)

    def test_single_precision(self):
        def loop(model, monitor, extra):
            inputs, labels = given(dtype=torch.float32)
            (F.cross_entropy(model(*inputs), labels) + extra(labels)).backward()

        check(Concat, loop, dtype=torch.float32, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("margin", [10.0, 30.0, 60.0])
    def test_rows_that_are_all_but_learned(self, margin):
        def loop(model, monitor, extra):
            inputs, labels = given(dtype=torch.float32)
            shown = margin * F.one_hot(labels, CLASSES).float()
            shown[0] = 0
            shown[3] = 0
            # The hook sees the logits; what the loop adds to them is part of the head here.
            model.head.register_forward_hook(lambda m, a, out: out + shown, prepend=True)
            (F.cross_entropy(model(*inputs), labels) + extra(labels)).backward()

        check(Concat, loop, dtype=torch.float32, rtol=1e-4, atol=1e-6)

    def test_clipping_and_steps_see_the_same(self):
        finals = []
        for inject in (False, True):
            torch.manual_seed(0)
            model = Concat().double()
            objective = bo.UnimodalObjective(watch(model), CLASSES, inject=inject, seed=0).double()
            parameters = [*model.parameters(), *objective.parameters()]
            optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
            for seed in range(5):
                inputs, labels = given(seed=seed)
                optimizer.zero_grad()
                loss = F.cross_entropy(model(*inputs), labels)
                (loss if inject else loss + objective(labels)).backward()
                nn.utils.clip_grad_norm_(parameters, 0.5)
                optimizer.step()
            finals.append([p.detach().clone() for p in parameters])
        for a, b in zip(*finals, strict=True):
            torch.testing.assert_close(a, b)
