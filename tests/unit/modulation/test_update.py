"""`apply_to="update"`: what the base optimizer does to some parameters in a step, scaled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch_optimizer
from torch import Tensor, nn

import balanceopt as bo
from balanceopt.modulation import StepContext, UpdateScaling, _scaling
from tests.models import watch
from tests.training import (
    backward,
    batch,
    batches,
    distance,
    groups_of,
    modulated,
    same_bits,
    sgd,
    small_model,
    train,
)

UPDATE = partial(bo.OGM, 0.5, noise=False, apply_to="update")
GRAD = partial(bo.OGM, 0.5, noise=False)


class Factors(bo.Modulation):
    """Scale the first modality's update by the next of some factors, each time gradients are modulated."""

    def __init__(self, *factors: float) -> None:
        super().__init__()
        self.factors = list(factors)

    def modulate(self, step: StepContext) -> None:
        factor = self.factors.pop(0) if len(self.factors) > 1 else self.factors[0]
        params = [slot.parameter for slot in step.slots[step.modalities[0]]]
        step.scale_update(params, torch.tensor(factor))


class Replacing(torch.optim.Optimizer):
    """Gives its parameters new storage."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = p.data - group["lr"] * p.grad
        return loss


class Failing(torch.optim.SGD):
    """Steps, and raises when it is told to."""

    fails = False

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        if self.fails:
            raise ArithmeticError("on purpose")
        return result


BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda groups: sgd(groups, momentum=0.9, weight_decay=0.01),
    "fused": lambda groups: sgd(groups, fused=True),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1),
    "adafactor": lambda groups: torch.optim.Adafactor(groups),
    "rprop": lambda groups: torch.optim.Rprop(groups),
    "adabound": lambda groups: torch_optimizer.AdaBound(groups),
    "replacing": Replacing,
    "lbfgs": lambda groups: torch.optim.LBFGS([p for g in groups for p in g["params"]], max_iter=3),
}
AUDIO, VISUAL = "encoders.audio", "encoders.visual"
every_form = pytest.mark.parametrize("attached", [False, True], ids=["wrapper", "hooks"])


def stepping(
    make: Callable[[Any], torch.optim.Optimizer], modulation: bo.Modulation | None, *, attached: bool = False
) -> tuple[nn.Module, Callable[[int], None]]:
    """A model, and what makes a step of it on the batch of a number."""
    model = small_model()
    optimizer = make(groups_of(model))
    if modulation is not None and attached:
        bo.attach(optimizer, watch(model), modulation, seed=0)
    elif modulation is not None:
        optimizer = bo.ModulatedOptimizer(optimizer, watch(model), modulation, seed=0)

    def step(number: int) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            return backward(model, batch(number, model))

        optimizer.step(closure)  # type: ignore[arg-type]

    return model, step


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_scaled(before: Any, scaled: Any, plain: Any, factor: float, part: str = AUDIO) -> None:
    """`part` went `factor` of the way, the rest all of it."""
    for name, start in before.items():
        k = factor if name.startswith(part) else 1.0
        torch.testing.assert_close(scaled[name], start + k * (plain[name] - start), rtol=1e-6, atol=1e-7)


# -- what it does ------------------------------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("factor", [0.0, 0.25, 1.0, 1.5])
@pytest.mark.parametrize("base", BASES)
def test_parameters_go_a_part_of_the_bases_way(base: str, factor: float, attached: bool):
    model, step = stepping(BASES[base], Factors(factor), attached=attached)
    twin, plain = stepping(BASES[base], None)
    before = values(model)
    step(0), plain(0)
    assert_scaled(before, values(model), values(twin), factor)
    assert distance(twin, small_model()) > 0


@pytest.mark.parametrize("tagged", [True, False])
def test_it_equals_gradient_scaling_for_sgd(tagged: bool):
    def run(modulation: bo.OGM) -> nn.Module:
        model = small_model()
        optimizer = sgd(groups_of(model) if tagged else model.parameters())
        train(model, bo.ModulatedOptimizer(optimizer, watch(model), modulation), batches(model, 5))
        return model

    assert distance(run(UPDATE()), run(GRAD())) < 1e-6
    assert distance(run(UPDATE()), run(bo.OGM(0, noise=False))) > 1e-3


def test_tensors_of_fewer_dimensions_and_other_modalities_are_the_bases_bit_for_bit():
    model, optimizer = modulated(UPDATE())
    twin = small_model()
    train(model, optimizer, batches(model, 1))
    train(twin, sgd(groups_of(twin)), batches(twin, 1))
    differ = [name for name, p in model.named_parameters() if not torch.equal(p, twin.get_parameter(name))]
    assert differ == [name for name, p in model.named_parameters() if name.startswith(AUDIO) and p.dim() > 1]


def test_noise_is_added_to_the_gradient_in_full_and_scaled_with_the_update():
    noisy = bo.OGM(0.5, apply_to="update")
    model, optimizer = modulated(noisy)
    unscaled, bare = modulated(bo.OGM(0))
    coefficients: list[float] = []
    optimizer.listeners.append(
        lambda step, name, _, k: coefficients.append(float(k[0])) if name == "coefficient" else None
    )
    before = values(model)
    train(model, optimizer, batches(model, 1))
    train(unscaled, bare, batches(unscaled, 1))
    for name, p in unscaled.named_parameters():
        assert torch.equal(p.grad, model.get_parameter(name).grad)  # type: ignore[arg-type]
    weights = {name: p for name, p in before.items() if p.dim() > 1}
    assert_scaled(weights, values(model), values(unscaled), coefficients[0])
    assert coefficients[0] < 1


def test_several_factors_multiply():
    model, step = stepping(sgd, None)
    twin = small_model()
    optimizer = bo.ModulatedOptimizer(sgd(groups_of(twin)), watch(twin), [Factors(0.5), Factors(0.4)])
    before = values(model)
    step(0)
    train(twin, optimizer, batches(twin, 1))
    assert_scaled(before, values(twin), values(model), 0.2)


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_factor_that_is_not_finite_leaves_the_step_to_the_base(factor: float, monkeypatch: Any):
    for host in (True, False):
        if not host:
            monkeypatch.setattr(_scaling, "on_host", lambda tensor: None)
        model, step = stepping(sgd, Factors(factor))
        twin, plain = stepping(sgd, None)
        step(0), plain(0)
        assert same_bits(model, twin)


# -- closures ----------------------------------------------------------------------------------------------------


@every_form
def test_of_a_closures_evaluations_the_last_factor_holds_for_the_whole_step(attached: bool):
    for factors, last in (((0.9, 0.1, 0.5), 0.5), ((1.0, 1.0, 0.5), 0.5), ((0.5, 0.5, 1.0), 1.0)):
        model, step = stepping(BASES["lbfgs"], Factors(*factors), attached=attached)
        twin, plain = stepping(BASES["lbfgs"], None)
        before = values(model)
        step(0), plain(0)
        assert_scaled(before, values(model), values(twin), last)


def test_zero_grad_in_a_closure_does_not_forget_where_the_step_began():
    model, optimizer = modulated(UPDATE())
    twin, plain = modulated(UPDATE())
    for one in batches(model, 3):

        def closure(one: Any = one) -> Tensor:
            optimizer.zero_grad()
            return backward(model, one)

        optimizer.step(closure)  # type: ignore[arg-type]
        train(twin, plain, [one])
    assert same_bits(model, twin)


# -- exceptions --------------------------------------------------------------------------------------------------


@every_form
def test_after_an_exception_parameters_are_as_the_base_left_them(attached: bool):
    model, twin = small_model(), small_model()
    base, plain = Failing(groups_of(model), lr=0.1), Failing(groups_of(twin), lr=0.1)
    form: Any = bo.attach if attached else bo.ModulatedOptimizer
    wrapper = form(base, watch(model), Factors(0.5))
    optimizer = base if attached else wrapper
    base.fails = plain.fails = True
    for own, one in ((model, optimizer), (twin, plain)):
        with pytest.raises(ArithmeticError):
            train(own, one, batches(model, 1))
    assert same_bits(model, twin)
    before = values(model)
    base.fails = plain.fails = False
    train(model, optimizer, batches(model, 1, first=1))
    train(twin, plain, batches(model, 1, first=1))
    assert_scaled(before, values(model), values(twin), 0.5)  # from where the failed step has ended


# -- what is left alone ------------------------------------------------------------------------------------------


def test_groups_and_schedulers_do_not_notice():
    def run(modulation: bo.OGM) -> list[list[float]]:
        model, optimizer = modulated(modulation)
        groups = list(optimizer.param_groups)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        rates = []
        for one in batches(model, 6):
            train(model, optimizer, [one])
            scheduler.step()
            rates.append([g["lr"] for g in optimizer.param_groups])
            assert all(a is b for a, b in zip(groups, optimizer.param_groups, strict=True))
        return rates

    assert run(UPDATE()) == run(bo.OGM(0, noise=False))


@pytest.mark.parametrize("host", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_parameters_that_do_not_move_keep_every_bit(dtype: torch.dtype, host: bool, monkeypatch: Any):
    if not host:
        monkeypatch.setattr(_scaling, "on_host", lambda tensor: None)
    model = small_model().to(dtype)
    before = small_model().to(dtype)
    optimizer = bo.ModulatedOptimizer(sgd(groups_of(model), lr=0.0), watch(model), Factors(0.3))
    inputs, labels = batch(0, model)
    for _ in range(3):
        optimizer.zero_grad()
        backward(model, ([x.to(dtype) for x in inputs], labels))
        optimizer.step()
    assert optimizer.stats()["modulated"] == 3
    assert same_bits(model, before)


def test_frozen_parameters_stay():
    model, optimizer = modulated(UPDATE())
    frozen = next(model.modalities["audio"].parameters()).requires_grad_(False)
    before = frozen.clone()
    train(model, optimizer, batches(model, 3))
    assert optimizer.stats()["modulated"] == 3
    assert torch.equal(frozen, before)


# -- any dtype, without reading from a device ----------------------------------------------------------------------


@pytest.mark.parametrize("host", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64])
def test_the_formula(dtype: torch.dtype, host: bool, monkeypatch: Any):
    if not host:
        monkeypatch.setattr(_scaling, "on_host", lambda tensor: None)
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in [(3, 4), (5,), (), (0, 2)]]
    before = [p.detach().clone() for p in params]
    moves = [0.01 * torch.randn_like(p) for p in params]
    scaling = UpdateScaling()
    scaling.reset()
    factor = torch.tensor(0.3, dtype=torch.float64)
    scaling.scale(params, factor)
    with torch.no_grad():
        for p, move in zip(params, moves, strict=True):
            p.add_(move)
    after = [p.detach().clone() for p in params]
    scaling.finish()
    for p, start, end in zip(params, before, after, strict=True):
        # Of three operations, each rounds what is no larger than the parameter.
        bound = 3 * torch.finfo(dtype).eps * start.abs().max().item() if p.numel() else 0.0
        torch.testing.assert_close(p.detach(), start + float(factor) * (end - start), rtol=0, atol=bound)


@pytest.mark.parametrize("make", [sgd, torch.optim.AdamW])
def test_a_coefficient_that_is_not_read_gives_the_same_steps(make: Any, monkeypatch: Any):
    def run() -> nn.Module:
        model, optimizer = modulated(UPDATE(), make)
        train(model, optimizer, batches(model, 5))
        return model

    known = run()
    monkeypatch.setattr(_scaling, "on_host", lambda tensor: None)
    assert distance(known, run()) < 1e-6
