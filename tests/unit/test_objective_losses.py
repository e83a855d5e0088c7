"""Uni-modal losses of every kind: the monitor's loss, in the loop and injected, on the targets that the loop has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import balanceopt as bo
from tests.models import INPUTS, Concat, SumHeads, Tokens, linear, watch

B, C, POSITIONS = 6, 4, 3


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64) + 10


def labels(*shape: int) -> Tensor:
    return torch.randint(2, shape).double()


def tokens() -> Tensor:
    classes = torch.randint(C, (B, POSITIONS))
    classes[0, 1:] = -100
    return classes


@dataclass
class Kind:
    """A joint loss: the criterion, the target, and how the loop lays predictions `(B, ..., C)` out for them."""

    criterion: Any
    target: Callable[[], Tensor]
    outputs: int = C
    layout: Callable[[Tensor], Tensor] = lambda x: x
    per_position: bool = False

    @property
    def encoder(self):
        return Tokens if self.per_position else linear

    def joint(self, predictions: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = self.criterion(self.layout(predictions), target)
        return loss.mean()

    def written_out(self, predictions: Tensor, target: Tensor) -> Tensor:
        """The loss past the hooks of a module."""
        call = getattr(self.criterion, "forward", self.criterion)
        loss: Tensor = call(self.layout(predictions), target)
        return loss.mean()


def squeezed(x: Tensor) -> Tensor:
    return x.squeeze(1)


KINDS = {
    "classes": Kind(nn.CrossEntropyLoss(), lambda: torch.randint(C, (B,))),
    "weighted classes": Kind(
        nn.CrossEntropyLoss(torch.tensor([1.0, 2, 3, 4]).double(), label_smoothing=0.1),
        lambda: torch.randint(C, (B,)),
    ),
    "summed": Kind(nn.CrossEntropyLoss(reduction="sum"), lambda: torch.randint(C, (B,))),
    "soft": Kind(nn.CrossEntropyLoss(), lambda: torch.rand(B, C).double().softmax(1)),
    "multi-label": Kind(nn.BCEWithLogitsLoss(), lambda: labels(B, C)),
    "weighted labels": Kind(
        nn.BCEWithLogitsLoss(weight=torch.rand(C).double(), pos_weight=torch.tensor([1.0, 2, 3, 4]).double()),
        lambda: labels(B, C),
    ),
    "one label": Kind(nn.BCEWithLogitsLoss(), lambda: labels(B), 1, squeezed),
    "a column of labels": Kind(nn.BCEWithLogitsLoss(), lambda: labels(B, 1), 1),
    "MSE": Kind(nn.MSELoss(), lambda: numbers(B), 1, squeezed),
    "MSE of several": Kind(nn.MSELoss(), lambda: numbers(B, C)),
    "MSE without reduction": Kind(nn.MSELoss(reduction="none"), lambda: numbers(B, C)),
    "L1": Kind(nn.L1Loss(), lambda: numbers(B, 1), 1),
    "smooth L1": Kind(nn.SmoothL1Loss(beta=0.3), lambda: numbers(B), 1, squeezed),
    "Huber": Kind(nn.HuberLoss(reduction="sum", delta=2.0), lambda: numbers(B, C)),
    "another module": Kind(nn.MultiMarginLoss(), lambda: torch.randint(C, (B,))),
    "tokens": Kind(nn.CrossEntropyLoss(), tokens, layout=lambda x: x.transpose(1, 2), per_position=True),
    "numbers of tokens": Kind(nn.MSELoss(), lambda: numbers(B, POSITIONS, C), per_position=True),
    "labels of tokens": Kind(
        nn.BCEWithLogitsLoss(), lambda: labels(B, POSITIONS), 1, lambda x: x.squeeze(2), per_position=True
    ),
}
FUNCTIONS = {
    "losses of samples": Kind(lambda f, y: (f - y).abs().sqrt(), lambda: numbers(B), 1, squeezed),
    "losses of outputs": Kind(lambda f, y: (f - y) ** 4, lambda: numbers(B, C)),
    "two outputs for a number": Kind(
        lambda f, y: F.gaussian_nll_loss(f[:, 0], y, f[:, 1].exp(), reduction="none"), lambda: numbers(B), 2
    ),
    "torch's": Kind(F.mse_loss, lambda: numbers(B), 1, squeezed),
}
# Torch's cross-entropy takes weights in the dtype of the logits alone, as in the joint loss.
HALVES = {name: kind for name, kind in {**KINDS, **FUNCTIONS}.items() if name != "weighted classes"}
every_kind = pytest.mark.parametrize("kind", [*KINDS.values(), *FUNCTIONS.values()], ids=[*KINDS, *FUNCTIONS])
every_module = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def inputs_of(model: Any, rows: int = B) -> list[Tensor]:
    return [torch.randn(rows, n, dtype=torch.float64) for n in INPUTS[: len(model.names)]]


def world(kind: Kind, make: Any = Concat, **options: Any) -> tuple[Any, bo.ModalityMonitor, Any]:
    """A model with the loop's loss in its monitor, and an objective that is told no loss."""
    torch.manual_seed(0)
    model = make(classes=kind.outputs, encoder=kind.encoder).double()
    monitor = watch(model, loss=kind.criterion)
    objective = bo.UnimodalObjective(monitor, kind.outputs, seed=0, **options).double()
    return model, monitor, objective


def written_out(kind: Kind, model: Any, objective: Any, inputs: list[Tensor], target: Tensor) -> Tensor:
    parts = zip(model.modalities.items(), inputs, strict=True)
    losses = [
        kind.written_out(objective.head_of(name)(encoder.forward(x)), target) for (name, encoder), x in parts
    ]
    return torch.stack(losses).sum()


def gradients_of(model: Any, objective: Any) -> dict[str, Tensor]:
    return {
        name: p.grad
        for name, p in [*model.named_parameters(), *objective.named_parameters()]
        if p.grad is not None
    }


class TestInTheLoop:
    @every_kind
    def test_is_the_sum_of_the_modalities_losses(self, kind):
        results = []
        for by_hand in (False, True):
            model, _, objective = world(kind)
            inputs, target = inputs_of(model), kind.target()
            model(*inputs)
            loss = objective(target)
            if by_hand:
                loss = written_out(kind, model, objective, inputs, target)
            loss.backward()
            results.append({"loss": loss.detach(), **gradients_of(model, objective)})
        assert results[0].keys() == results[1].keys()
        for name, value in results[1].items():
            torch.testing.assert_close(results[0][name], value, msg=name)

    @every_kind
    def test_without_gradients(self, kind):
        model, _, objective = world(kind)
        inputs, target = inputs_of(model), kind.target()
        model(*inputs)
        with torch.no_grad():
            model(*inputs)
            torch.testing.assert_close(objective(target), written_out(kind, model, objective, inputs, target))

    @every_kind
    def test_samples_in_another_order(self, kind):
        model, _, objective = world(kind)
        inputs, target = inputs_of(model), kind.target()
        order = torch.randperm(B)
        model(*inputs)
        loss = objective(target)
        model(*(x[order] for x in inputs))
        torch.testing.assert_close(objective(target[order]), loss)

    @every_kind
    def test_weight_zero_changes_no_bit(self, kind):
        model, _, objective = world(kind, weight=0.0)
        inputs, target = inputs_of(model), kind.target()
        loss = kind.joint(model(*inputs), target)
        assert torch.equal(loss + objective(target), loss)

    @every_kind
    @pytest.mark.parametrize("partial", [False, True])
    def test_samples_that_lack_a_modality(self, kind, partial):
        """Where the encoder runs on the others alone, and where it runs on all."""

        class Partial(Concat):
            def encode(self, *inputs):
                audio, visual = (
                    encoder(x) for encoder, x in zip(self.encoders.values(), inputs, strict=True)
                )
                spread = torch.zeros_like(audio).index_copy(0, has.nonzero()[:, 0], visual)
                return [audio, spread]

        has = torch.tensor([True, False, True, True, False, True])
        model, monitor, objective = world(kind, Partial if partial else Concat)
        inputs, target = inputs_of(model), kind.target()
        monitor.observe(target, present={"visual": has})
        model(inputs[0], inputs[1][has] if partial else inputs[1])
        loss = objective(target)
        audio, visual = (
            encoder.forward(x) for encoder, x in zip(model.encoders.values(), inputs, strict=True)
        )
        expected = kind.written_out(objective.head_of("audio")(audio), target)
        expected = expected + kind.written_out(objective.head_of("visual")(visual[has]), target[has])
        torch.testing.assert_close(loss, expected)

    def test_a_loss_of_its_own_replaces_the_monitors(self):
        model, monitor, _ = world(KINDS["multi-label"])
        objective = bo.UnimodalObjective(monitor, 2, loss=nn.L1Loss(), seed=0).double()
        inputs, target = inputs_of(model), numbers(B, 2)
        model(*inputs)
        own = Kind(nn.L1Loss(), lambda: target)
        torch.testing.assert_close(objective(target), written_out(own, model, objective, inputs, target))

    @pytest.mark.parametrize("kind", HALVES.values(), ids=HALVES)
    def test_half_precision(self, kind):
        model, _, objective = world(kind)
        inputs, target = inputs_of(model), kind.target()
        model(*inputs)
        expected = objective(target).float()
        model.float(), objective.float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(*(x.float() for x in inputs))
            loss = objective(target.float() if target.is_floating_point() else target)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected, rtol=0.05, atol=0.1)
        loss.backward()
        assert all(bool(torch.isfinite(p.grad).all()) for p in objective.parameters())

    @pytest.mark.parametrize(
        ("name", "dtype"),
        [("MSE", torch.float64), ("MSE", torch.bfloat16), ("MSE", torch.int64), ("multi-label", torch.bool)],
    )
    def test_targets_of_another_dtype(self, name, dtype):
        kind = KINDS[name]
        model, _, objective = world(kind)
        model.float(), objective.float()
        inputs, target = [x.float() for x in inputs_of(model)], kind.target().to(dtype)
        model(*inputs)
        loss = objective(target)
        torch.testing.assert_close(loss, written_out(kind, model, objective, inputs, target.float()))
        loss.backward()

    @every_module
    def test_hooks_of_the_module_see_the_loops_calls_alone(self, kind):
        model, monitor, objective = world(kind)
        scores = monitor.scores()
        calls = []
        handle = kind.criterion.register_forward_hook(lambda *call: calls.append(call))
        inputs, target = inputs_of(model), kind.target()
        (kind.joint(model(*inputs), target) + objective(target)).backward()
        handle.remove()
        assert len(calls) == 1
        assert scores.take() is not None
        assert monitor.stats()["labels"] == {"loss": 1}


def trained(kind: Kind, loop: Any, *, inject: bool, make: Any = Concat) -> dict[str, Tensor]:
    model, monitor, objective = world(kind, make, inject=inject)
    loop(kind, model, monitor, (lambda target: 0.0) if inject else objective)
    return gradients_of(model, objective)


def one_batch(kind: Kind, model: Any, monitor: Any, extra: Any) -> None:
    inputs, target = inputs_of(model), kind.target()
    (kind.joint(model(*inputs), target) + extra(target)).backward()


def accumulated(kind: Kind, model: Any, monitor: Any, extra: Any) -> None:
    """As GradScaler does, with a scale."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for _ in range(3):
        inputs, target = inputs_of(model), kind.target()
        scaler.scale((kind.joint(model(*inputs), target) + extra(target)) / 3).backward()


def partly(kind: Kind, model: Any, monitor: Any, extra: Any) -> None:
    inputs, target = inputs_of(model), kind.target()
    logits = model(*inputs)
    monitor.observe(target, present={"visual": torch.tensor([True, False, True, True, False, True])})
    (kind.joint(logits, target) + extra(target)).backward()


class TestInjected:
    @every_module
    @pytest.mark.parametrize("loop", [one_batch, accumulated, partly])
    def test_gradients_are_those_of_the_loop(self, kind, loop):
        explicit, injected = (trained(kind, loop, inject=inject) for inject in (False, True))
        assert explicit.keys() == injected.keys()
        for name, value in explicit.items():
            torch.testing.assert_close(injected[name], value, msg=name)

    def test_tokens_without_a_loss_module(self):
        """Labels and scale of each token come from the gradient at the logits."""

        def loop(kind, model, monitor, extra):
            inputs, target = inputs_of(model), kind.target()
            logits = model(*inputs)
            (F.cross_entropy(logits.transpose(1, 2), target) + extra(target)).backward()

        kind = Kind(None, tokens, per_position=True)
        explicit, injected = (trained(kind, loop, inject=inject) for inject in (False, True))
        for name, value in explicit.items():
            torch.testing.assert_close(injected[name], value, msg=name)

    @pytest.mark.parametrize("heads", ["own", "shared"])
    @pytest.mark.parametrize("make", [Concat, SumHeads])
    @pytest.mark.parametrize("name", ["classes", "multi-label", "another module"])
    def test_the_shared_head(self, name, make, heads):
        results = []
        for inject in (False, True):
            model, _, objective = world(KINDS[name], make, inject=inject, heads=heads)
            one_batch(KINDS[name], model, None, (lambda target: 0.0) if inject else objective)
            results.append(gradients_of(model, objective))
        for name, value in results[0].items():
            torch.testing.assert_close(results[1][name], value, msg=name)


def regression(inject: bool | None) -> tuple[list[float], dict[str, Tensor]]:
    """Train on targets with mean 10, which one modality shows better; return joint losses and what was trained."""
    torch.manual_seed(0)
    model = Concat(classes=1, encoder=linear)
    criterion = nn.MSELoss()
    monitor = watch(model, loss=criterion)
    objective = bo.UnimodalObjective(
        monitor, 1, inject=bool(inject), weight=0.0 if inject is None else 1.0, seed=0
    )
    optimizer = torch.optim.SGD([*model.parameters(), *objective.parameters()], lr=0.01)
    losses = []
    for seed in range(100):
        torch.manual_seed(seed)
        y = torch.randn(64, 1)
        inputs = [y + noise * torch.randn(64, n) for noise, n in zip((0.3, 1.0), INPUTS, strict=False)]
        optimizer.zero_grad()
        joint = criterion(model(*inputs), y + 10)
        (joint if inject else joint + objective(y + 10)).backward()
        optimizer.step()
        losses.append(joint.detach())
    parameters = {**dict(model.named_parameters()), **dict(objective.named_parameters())}
    return torch.stack(losses).tolist(), {
        n: p.detach() for n, p in parameters.items() if not nn.parameter.is_lazy(p)
    }


def test_a_regression_far_from_zero_is_trained_as_well_as_without():
    plain, _ = regression(None)
    losses, in_the_loop = regression(False)
    injected, parameters = regression(True)
    torch.testing.assert_close(torch.tensor(injected), torch.tensor(losses), rtol=1e-3, atol=1e-4)
    for name, value in in_the_loop.items():
        torch.testing.assert_close(parameters[name], value, rtol=1e-3, atol=1e-4, msg=name)
    assert sum(injected[-20:]) < 2 * sum(plain[-20:])


class TestRefusals:
    @pytest.mark.parametrize(
        ("loss", "outputs", "target", "message"),
        [
            (
                None,
                1,
                torch.full((B,), 2.5),
                "probabilities.*build the monitor with the loop's loss as `loss=`",
            ),
            (None, C, torch.rand(B), r"should have shape \(B, 4\).*build the monitor with the loop's loss"),
            (None, C, torch.ones(B, C), "sum of 1.*build the monitor with the loop's loss"),
            (
                None,
                C,
                torch.ones(B, C).long(),
                "4 positions.*for several labels a sample, nn.BCEWithLogitsLoss",
            ),
            (nn.MSELoss(), C, torch.rand(B), r"should have shape \(B, 4\)"),
            (nn.MSELoss(), 1, torch.rand(B, C), r"4 positions.*'audio', of shape \(6, 4\), no vector"),
            (
                nn.BCEWithLogitsLoss(),
                C,
                torch.ones(B, 2),
                r"should have shape \(B, 4\).*Found shape \(6, 2\)",
            ),
            (nn.CrossEntropyLoss(), C, torch.zeros(B, 2, 2).long(), "4 positions"),
            (nn.MSELoss(), C, torch.rand(B + 1, C), "returned 6 rows for 7 samples"),
            (nn.MSELoss(), C, torch.tensor(1.0), "Found a single number"),
        ],
    )
    def test_targets_that_do_not_fit(self, loss, outputs, target, message):
        model = Concat(classes=outputs)
        objective = bo.UnimodalObjective(watch(model, loss=loss), outputs)
        model(*(x.float() for x in inputs_of(model)))
        with pytest.raises(ValueError, match=message):
            objective(target)

    def test_tokens_of_another_number(self):
        model, _, objective = world(KINDS["tokens"])
        model(*inputs_of(model))
        with pytest.raises(ValueError, match=r"2 positions.*'audio', of shape \(6, 3, 4\)"):
            objective(torch.zeros(B, 2).long())

    @pytest.mark.parametrize("inject", [False, True])
    @pytest.mark.parametrize("make", [Concat, SumHeads])
    def test_parts_of_a_regression(self, make, inject):
        kind = KINDS["MSE of several"]
        model, monitor, objective = world(kind, make, heads="shared", inject=inject)
        with pytest.raises(ValueError, match="`heads` should be 'own' in a regression"):
            one_batch(kind, model, monitor, (lambda target: 0.0) if inject else objective)

    @pytest.mark.parametrize(
        ("loss", "outputs", "message"),
        [
            (nn.NLLLoss(), C, "takes? logits"),
            (nn.TripletMarginLoss(), C, "compare a prediction with a target"),
            (nn.CrossEntropyLoss(), 1, "`out_features` should be at least 2"),
        ],
    )
    def test_losses_that_do_not_fit(self, loss, outputs, message):
        with pytest.raises(ValueError, match=message):
            bo.UnimodalObjective(watch(Concat()), outputs, loss=loss)

    @pytest.mark.parametrize("kind", FUNCTIONS.values(), ids=FUNCTIONS)
    def test_a_function_can_not_be_injected(self, kind):
        with pytest.raises(ValueError, match="its calls can't be seen"):
            world(kind, inject=True)

    def test_a_regression_without_its_loss_is_not_injected(self):
        model = Concat(classes=1)
        _objective = bo.UnimodalObjective(watch(model), 1, inject=True)
        with pytest.raises(RuntimeError, match="not that of a plain cross-entropy"):
            F.mse_loss(model(*(x.float() for x in inputs_of(model))), torch.randn(B, 1)).backward()
