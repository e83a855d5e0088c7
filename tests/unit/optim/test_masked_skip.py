"""masked="frozen" on SGD: rows of large parameters are stepped alone, to the bit as in a step on all of them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import balanceopt as bo
from balanceopt.modulation import _amss, _skip
from tests.masking import SGD_OPTIONS, every_option, masked, weights
from tests.models import Concat
from tests.training import (
    backward,
    batches,
    bits,
    grad_of,
    groups_of,
    modulated,
    same_bits,
    sgd,
    small_model,
    train,
)


@pytest.fixture
def stepped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many parameters each step on rows alone had; all are large here, in pieces of few rows."""
    counts: list[int] = []
    step_kept = _skip.step_kept

    def counted(parts: Any, *rest: Any) -> Any:
        if parts:
            counts.append(len(parts))
        return step_kept(parts, *rest)

    monkeypatch.setattr(_amss, "step_kept", counted)
    monkeypatch.setattr(_amss, "_LARGE", 0)
    monkeypatch.setattr(_skip, "_AT_ONCE", 12)
    return counts


@pytest.fixture
def compared(stepped: list[int], monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Train twice, with masked rows skipped and with masked rows put back after a step on all of them."""

    def compare(make: Callable[[], tuple[Any, Any]], steps: int = 4, *, exact: bool = True) -> None:
        def alike(a: Tensor, b: Tensor) -> bool:
            return torch.equal(bits(a), bits(b)) if exact else torch.allclose(a, b, rtol=1e-5, atol=1e-7)

        model, optimizer = make()
        train(model, optimizer, batches(model, steps))
        assert len(stepped) == steps
        assert min(stepped) > 0
        with monkeypatch.context() as patch:
            patch.setattr(_amss, "steps_as_sgd", lambda optimizer: False)
            twin, other = make()
            train(twin, other, batches(twin, steps))
        assert len(stepped) == steps
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert alike(p, q)
            ours, theirs = (o.state.get(w, {}) for o, w in ((optimizer, p), (other, q)))
            assert ours.keys() == theirs.keys()
            if "momentum_buffer" in ours:
                assert alike(ours["momentum_buffer"], theirs["momentum_buffer"])

    return compare


@every_option
@pytest.mark.parametrize("scale", ["none", "unbiased", "official"])
def test_the_same_bits_as_with_a_step_on_all_rows(options, scale, compared):
    # The fused kernel rounds what does not fill its last vector in another way than the rest.
    exact = "fused" not in options
    compared(lambda: masked(masked="frozen", scale=scale, clamp=(0.3, 0.7), **options), exact=exact)


def test_double_precision(compared):
    def make() -> tuple[Any, Any]:
        model = small_model().double()
        optimizer = bo.MaskedSubnetworkSGD(
            groups_of(model),
            bo.ModalityMonitor(model, model.modalities, head="head"),
            lr=0.1,
            masked="frozen",
            seed=1,
        )
        return Cast(model), optimizer

    compared(make)


class Cast(nn.Module):
    """A model in double precision on inputs that are not."""

    def __init__(self, model: Concat) -> None:
        super().__init__()
        self.model = model
        self.modalities = model.modalities

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(*(x.double() for x in inputs))

    def get_parameter(self, target: str) -> nn.Parameter:
        return self.model.get_parameter(target)


class Pictures(nn.Module):
    """`(B, n)` to features by convolutions, in either memory format."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 8, (1, 3), padding=(0, 1))
        self.last = nn.Linear(8 * inputs, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x[:, None, None]).relu()).relu().flatten(1))


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_convolutions_in_either_memory_format(form, compared):
    def make() -> tuple[Any, Any]:
        torch.manual_seed(0)
        model: Any = Concat(encoder=Pictures)
        model = model.to(memory_format=form)
        monitor = bo.ModalityMonitor(model, model.modalities, head="head")
        optimizer = bo.MaskedSubnetworkSGD(
            groups_of(model), monitor, lr=0.1, momentum=0.9, masked="frozen", seed=3
        )
        return model, optimizer

    compared(make)


METHODS: dict[str, Callable[[], list[bo.Modulation]]] = {
    "noise": lambda: [bo.OGM(0.5), bo.AMSS(masked="frozen")],
    "learning rates": lambda: [bo.OGM(0.5, noise=False, apply_to="lr"), bo.AMSS(masked="frozen")],
    "head too": lambda: [bo.AMSS(masked="frozen", mask_head=True)],
    "over before": lambda: [bo.AMSS(masked="frozen"), bo.OGM(0.5, start=9)],
}


@pytest.mark.parametrize("methods", METHODS.values(), ids=METHODS)
def test_with_other_methods(methods, compared):
    compared(lambda: modulated(methods(), lambda groups: sgd(groups, momentum=0.9, weight_decay=0.1)))


def test_a_method_that_comes_after_it_sees_masked_gradients(stepped):
    model, optimizer = modulated([bo.AMSS(masked="frozen"), bo.OGM(0.5)])
    train(model, optimizer, batches(model, 2))
    assert stepped == []


def test_groups_of_their_own_options(compared):
    def make() -> tuple[Any, Any]:
        model = small_model()
        groups = groups_of(model)
        for place, group in enumerate(groups):
            group |= {"lr": 0.1 / (place + 1), "momentum": 0.5 * place, "weight_decay": 0.1 * place}
        monitor = bo.ModalityMonitor(model, model.modalities, head="head")
        return model, bo.MaskedSubnetworkSGD(groups, monitor, lr=0.1, masked="frozen", seed=3)

    compared(make)


def test_a_learning_rate_in_a_tensor(compared):
    compared(lambda: masked(masked="frozen", momentum=0.9, lr=torch.tensor(0.1)))


def test_rows_that_are_masked_are_not_even_read(stepped):
    model, optimizer = masked(masked="frozen", momentum=0.9, weight_decay=0.1, clamp=(0.5, 0.5))
    train(model, optimizer, batches(model, 2))
    optimizer.zero_grad()
    backward(model, batches(model, 1, first=2)[0])
    before = [p.detach().clone() for p in weights(model)]
    momentum = [optimizer.state[p]["momentum_buffer"].clone() for p in weights(model)]
    gradients = [grad_of(p) for p in weights(model)]
    values = [g.clone() for g in gradients]
    optimizer.step()
    assert stepped == [4, 4, 4]
    for p, old, m, g, value in zip(weights(model), before, momentum, gradients, values, strict=True):
        still = (p == old).all(1)
        assert int(still.sum()) == len(p) // 2
        assert torch.equal(optimizer.state[p]["momentum_buffer"][still], m[still])
        assert p.grad is g
        assert torch.equal(g, value)


@pytest.mark.parametrize("kind", ["pre", "post"])
def test_hooks_of_the_base_see_the_gradients(stepped, kind):
    seen = []

    def hook(optimizer: Any, args: Any, kwargs: Any) -> None:
        seen.append(all(p.grad is not None for p in weights(model)))

    model, optimizer = masked(masked="frozen")
    getattr(optimizer.optimizer, f"register_step_{kind}_hook")(hook)
    train(model, optimizer, batches(model, 2))
    assert seen == [True, True]
    assert stepped == []


def test_attached_to_an_optimizer_nothing_is_hidden_from_its_hooks(stepped):
    model = small_model()
    base = sgd(groups_of(model), momentum=0.9)
    monitor = bo.ModalityMonitor(model, model.modalities, head="head")
    with bo.attach(base, monitor, bo.AMSS(masked="frozen"), seed=7):
        train(model, base, batches(model, 2))
    assert stepped == []


def test_another_rule_under_the_name_of_sgd_is_left_alone(stepped):
    class Signed(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(p.grad.sign(), alpha=group["lr"])

    model, optimizer = modulated(bo.AMSS(masked="frozen"), lambda groups: Signed(groups, lr=0.1))
    train(model, optimizer, batches(model, 2))
    assert stepped == []


def test_gradients_are_there_again_when_the_base_fails(stepped, monkeypatch):
    model, optimizer = masked(masked="frozen", clamp=(0.5, 0.5))
    backward(model, batches(model, 1)[0])
    gradients = [grad_of(p) for p in weights(model)]

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("in the step")

    monkeypatch.setattr(sys.modules["torch.optim.sgd"], "sgd", fail)
    with pytest.raises(RuntimeError, match="in the step"):
        optimizer.step()
    assert stepped == [4]
    assert all(p.grad is g for p, g in zip(weights(model), gradients, strict=True))


def test_a_closure(compared):
    class WithClosure:
        """Steps by a closure what is stepped without one."""

        def __init__(self, model: Any, optimizer: Any) -> None:
            self.optimizer, self.state = optimizer, optimizer.state

        def zero_grad(self) -> None:
            self.optimizer.zero_grad()

        def step(self) -> None:
            self.optimizer.step(lambda: 0.0)

    def make() -> tuple[Any, Any]:
        model, optimizer = masked(masked="frozen", momentum=0.9)
        return model, WithClosure(model, optimizer)

    compared(make)


@pytest.mark.parametrize("options", [SGD_OPTIONS["momentum"], SGD_OPTIONS["fused"]], ids=["loop", "fused"])
def test_it_resumes_bit_for_bit(stepped, options):
    model, optimizer = masked(masked="frozen", **options)
    train(model, optimizer, batches(model, 3))
    twin, again = masked(masked="frozen", **options)
    twin.load_state_dict(model.state_dict())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, its in ((model, optimizer), (twin, again)):
        train(one, its, batches(one, 3, first=3))
    assert len(stepped) == 9
    assert same_bits(model, twin)


def test_momentum_that_lies_otherwise_in_memory_is_left_to_the_base(stepped):
    model, optimizer = masked(masked="frozen", momentum=0.9, clamp=(0.5, 0.5))
    train(model, optimizer, batches(model, 1))
    for p in weights(model):
        state = optimizer.state[p]
        state["momentum_buffer"] = state["momentum_buffer"].t().contiguous().t()
    train(model, optimizer, batches(model, 2, first=1))
    assert stepped == [4]
