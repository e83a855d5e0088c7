"""Which backwards count: those that leave gradients in parameters, as long as the gradients are there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import balanceopt as bo
from tests.models import Concat, batch, watch


def taken(scores: Any) -> Any:
    sums = scores.take()
    assert sums is not None
    return sums


def loss_of(model, number):
    torch.manual_seed(number)
    inputs, labels = batch(8)
    inputs = [x.requires_grad_() for x in inputs]
    return F.cross_entropy(model(*inputs), labels), inputs


def expected(number):
    """The scores of one plain pass."""
    model = made()
    with watch(model) as monitor:
        scores = monitor.scores()
        loss_of(model, number)[0].backward()
        return taken(scores).score


def made():
    torch.manual_seed(0)
    return Concat()


def attack(model, number):
    loss, inputs = loss_of(model, number)
    torch.autograd.grad(loss, inputs)


def attack_of_frozen(model, number):
    model.requires_grad_(False)
    loss, _ = loss_of(model, number)
    loss.backward()
    model.requires_grad_(True)


def to_inputs(model, number):
    loss, inputs = loss_of(model, number)
    loss.backward(inputs=inputs)


def hessian_vector_product(model, number):
    inputs, labels = batch(8)
    torch.autograd.functional.hvp(
        lambda x: F.cross_entropy(model(x, inputs[1]), labels), inputs[0], inputs[0]
    )


@pytest.mark.parametrize("probe", [attack, attack_of_frozen, to_inputs, hessian_vector_product])
@pytest.mark.parametrize("first", [True, False])
def test_a_backward_to_the_inputs_does_not_count(probe, first):
    model = made()
    with watch(model) as monitor:
        scores = monitor.scores()
        for _ in range(2 if first else 0):
            probe(model, 1)
        loss_of(model, 0)[0].backward()
        if not first:
            probe(model, 1)
        torch.testing.assert_close(taken(scores).score, expected(0))
        assert monitor.stats()["passes"] == 1


def test_a_backward_to_the_inputs_through_a_pass_that_trains_counts_once():
    model = made()
    with watch(model) as monitor:
        scores = monitor.scores()
        loss, inputs = loss_of(model, 0)
        gradient, *_ = torch.autograd.grad(loss, inputs, create_graph=True)
        (loss + gradient.square().sum()).backward()
        torch.testing.assert_close(taken(scores).score, expected(0))


@pytest.mark.parametrize("some", [slice(None), slice(1), slice(-1, None)])
def test_a_backward_whose_gradients_the_loop_sets_by_hand_counts(some):
    model = made()
    params = list(model.parameters())[some]
    with watch(model) as monitor:
        scores = monitor.scores()
        for number in range(2):
            torch.autograd.grad(loss_of(model, number)[0], params)
        torch.testing.assert_close(taken(scores).score, expected(0) + expected(1))


@pytest.mark.parametrize("some", [slice(1), slice(-1, None)])
def test_a_backward_to_some_parameters_counts(some):
    model = made()
    with watch(model) as monitor:
        scores = monitor.scores()
        loss_of(model, 0)[0].backward(inputs=list(model.parameters())[some])
        torch.testing.assert_close(taken(scores).score, expected(0))


def by_hand(model):
    for parameter in model.parameters():
        parameter.grad = None


def test_micro_batches_of_different_modalities_count():
    class Either(Concat):
        def forward(self, *inputs: Any) -> Any:
            which, x = inputs
            encoder = self.encoders[which]
            zero = torch.zeros(len(x), 4)
            z = encoder(x)
            return self.head(torch.cat([z, zero] if which == "audio" else [zero, z], 1))

    model = Either()
    (x, y), labels = batch(8)
    with watch(model, slices={"audio": slice(0, 4), "visual": slice(4, 8)}) as monitor:
        scores = monitor.scores()
        for which, given in (("audio", x), ("visual", y)):
            F.cross_entropy(model(which, given), labels).backward()
        assert taken(scores).count.tolist() == [8, 8]


@pytest.mark.parametrize("clear", [nn.Module.zero_grad, by_hand])
def test_scores_of_gradients_that_were_cleared_go_with_them(clear):
    model = made()
    with watch(model) as monitor:
        scores = monitor.scores()
        loss_of(model, 1)[0].backward()
        clear(model)
        loss_of(model, 0)[0].backward()
        torch.testing.assert_close(taken(scores).score, expected(0))


class SharpnessAware(torch.optim.SGD):
    """Evaluates the closure again elsewhere, and clears the first gradients itself."""

    @torch.no_grad()
    def step(self, closure=None):
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        moves = [0.05 * p.grad for p in params]
        torch._foreach_add_(params, moves)
        self.zero_grad()
        with torch.enable_grad():
            loss = closure()
        torch._foreach_sub_(params, moves)
        super().step()
        return loss


def test_a_base_that_clears_gradients_itself_is_modulated_by_the_pass_that_it_steps_with():
    model, twin = made(), made()
    monitor = watch(model)
    optimizer = bo.ModulatedOptimizer(
        SharpnessAware(model.parameters(), 0.1), monitor, bo.OGM(0.5, noise=False)
    )
    recorder = bo.Recorder(optimizer)
    seen = []

    def closure():
        with watch(twin) as other:
            twin.load_state_dict(model.state_dict())
            scores = other.scores()
            loss_of(twin, 0)[0].backward()
            seen.append(taken(scores).mean_score)
        loss, _ = loss_of(model, 0)
        loss.backward()
        return loss

    closure()
    optimizer.step(closure)
    found = [float(recorder.series("score")[name][1][-1]) for name in ("audio", "visual")]
    torch.testing.assert_close(torch.tensor(found), seen[1])
    assert not torch.equal(seen[0], seen[1])


def test_scores_thrown_away_by_zero_grad_are_named_as_the_cause():
    model = made()
    optimizer = bo.ModulatedOptimizer(
        torch.optim.SGD(model.parameters(), 0.1), watch(model), bo.OGM(noise=False)
    )

    def step():
        loss_of(model, 0)[0].backward()
        kept = [p.grad for p in model.parameters()]
        optimizer.zero_grad()
        for parameter, gradient in zip(model.parameters(), kept, strict=True):
            parameter.grad = gradient
        optimizer.step()

    with pytest.warns(UserWarning, match="zero_grad"):
        step()
    for _ in range(8):
        step()
    with pytest.raises(RuntimeError, match=r"zero_grad .*came between backward and step.*before backward"):
        step()
