"""`apply_to="lr"`: the learning rate of some parameters, for one step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import balanceopt as bo
from tests.models import watch
from tests.training import backward, batch, batches, distance, groups_of, modulated, sgd, small_model, train

LR = bo.OGM(0.5, noise=False, apply_to="lr")
GRAD = bo.OGM(0.5, noise=False)


def snapshot(optimizer: torch.optim.Optimizer) -> Any:
    """What the user sees of the groups, by identity."""
    return [
        (id(g), [id(p) for p in g["params"]], {k: v for k, v in g.items() if k != "params"})
        for g in optimizer.param_groups
    ]


def without_counter(groups: Any) -> Any:
    return [
        (own, params, {k: v for k, v in rest.items() if k != "balanceopt_step"})
        for own, params, rest in groups
    ]


@pytest.mark.parametrize("tagged", [True, False])
def test_it_equals_gradient_scaling_for_sgd(tagged: bool):
    def run(modulation: bo.OGM) -> torch.nn.Module:
        model = small_model()
        optimizer = sgd(groups_of(model) if tagged else model.parameters())
        train(model, bo.ModulatedOptimizer(optimizer, watch(model), modulation), batches(model, 5))
        return model

    assert distance(run(LR), run(GRAD)) < 1e-7
    assert distance(run(LR), run(bo.OGM(0, noise=False))) > 1e-3


def test_the_base_sees_split_groups_and_the_user_never_does():
    model = small_model()
    base = sgd(model.parameters(), momentum=0.9)  # one group for all: encoders, biases and head
    optimizer = bo.ModulatedOptimizer(base, watch(model), LR)
    before = snapshot(base)
    seen: list[list[float]] = []
    base.register_step_pre_hook(lambda *_: seen.append([g["lr"] for g in base.param_groups]))
    train(model, optimizer, batches(model, 1))
    assert len(seen[0]) == 2
    assert min(seen[0]) < 0.1 == max(seen[0])
    assert without_counter(snapshot(base)) == without_counter(before)
    assert base.param_groups[0]["balanceopt_step"] == 1


class Counting(torch.optim.SGD):
    """Writes into its groups while it steps, as schedule-free and D-adaptation optimizers do."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            group["seen_lr"] = group["lr"]
        return super().step(closure)


def test_what_the_base_writes_into_a_group_is_carried_back():
    model = small_model()
    base = Counting(model.parameters(), lr=0.1)
    optimizer = bo.ModulatedOptimizer(base, watch(model), LR)
    train(model, optimizer, batches(model, 3))
    assert base.param_groups[0]["k"] == 3
    assert "seen_lr" in base.param_groups[0]
    assert base.param_groups[0]["lr"] == 0.1


class Failing(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        raise ArithmeticError("on purpose")


def test_groups_are_whole_again_after_an_exception():
    model = small_model()
    base = Failing(model.parameters(), lr=0.1)
    optimizer = bo.ModulatedOptimizer(base, watch(model), LR)
    before = snapshot(base)
    with pytest.raises(ArithmeticError):
        train(model, optimizer, batches(model, 1))
    assert without_counter(snapshot(base)) == without_counter(before)


@pytest.mark.parametrize("after", ["zero_grad", "state_dict", "remove"])
def test_attached_groups_are_whole_again_after_an_exception(after: str):
    model = small_model()
    base = Failing(model.parameters(), lr=0.1)
    handle = bo.attach(base, watch(model), LR)
    with pytest.raises(ArithmeticError):
        train(model, base, batches(model, 1))
    getattr(handle if after == "remove" else base, after)()
    assert len(base.param_groups) == 1


def test_schedulers_do_not_notice():
    rates = []
    for modulation in (LR, bo.OGM(0, noise=False)):
        model, optimizer = modulated(modulation)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        own = []
        for one in batches(model, 6):
            train(model, optimizer, [one])
            scheduler.step()
            own.append([g["lr"] for g in optimizer.param_groups])
        rates.append(own)
    assert rates[0] == rates[1]


def test_a_tensor_lr_keeps_its_identity_and_value():
    lr = torch.tensor(0.1)
    model, optimizer = modulated(LR, lambda groups: torch.optim.SGD(groups, lr=lr))
    train(model, optimizer, batches(model, 2))
    assert optimizer.param_groups[0]["lr"] is lr
    assert float(lr) == pytest.approx(0.1)
    plain, same = modulated(LR)
    train(plain, same, batches(plain, 2))
    assert distance(model, plain) < 1e-7


def test_a_learning_rate_changed_by_the_user_is_the_one_that_is_scaled():
    model, optimizer = modulated(LR)
    train(model, optimizer, batches(model, 1))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, batches(model, 2))
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("positional", [True, False])
def test_with_a_closure(positional: bool):
    model, optimizer = modulated(LR)
    twin, plain = modulated(LR)
    for one in batches(model, 3):

        def closure(one: Any = one) -> torch.Tensor:
            optimizer.zero_grad()
            return backward(model, one)

        if positional:
            optimizer.step(closure)  # type: ignore[arg-type]
        else:
            optimizer.step(closure=closure)  # type: ignore[arg-type]
        train(twin, plain, [one])
    assert distance(model, twin) == 0
    assert len(optimizer.param_groups) == 3


def test_noise_goes_with_it():
    model, optimizer = modulated(bo.OGM(0.5, apply_to="lr"))
    train(model, optimizer, batches(model, 3))
    assert optimizer.stats()["modulated"] == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: torch.optim.LBFGS(model.parameters()), "LBFGS: it has one learning rate"),
        (lambda model: WithoutLR(model.parameters(), {}), "WithoutLR: its groups have no learning rate"),
        (lambda model: Sharding(model.parameters()), "inside it has groups of its own"),
        (lambda model: WithLists(model.parameters(), lr=0.1), "`base_lrs` has an entry for each"),
        (lambda model: Relative(model.parameters(), {"lr": 0.1, "relative_step": True}), "does not use the"),
    ],
)
def test_bases_whose_learning_rate_says_nothing_are_refused(make: Any, message: str):
    model = small_model()
    monitor = watch(model)
    with pytest.raises(ValueError, match=message):
        bo.ModulatedOptimizer(make(model), monitor, LR)


class Sharding(torch.optim.SGD):
    """Keeps an optimizer with groups of its own, as ZeroRedundancyOptimizer does."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)
        self.optim = sgd([{"params": list(g["params"])} for g in self.param_groups])


def test_an_optimizer_inside_that_a_load_cut_off():
    model = small_model()
    inner = sgd(groups_of(model))
    outer = Around(inner)
    optimizer = bo.ModulatedOptimizer(outer, watch(model), LR)
    train(model, optimizer, batches(model, 1))
    inner.load_state_dict(inner.state_dict())
    with pytest.raises(RuntimeError, match="no longer reaches the optimizer inside Around"):
        train(model, optimizer, batches(model, 1))


class Around(torch.optim.Optimizer):
    """As Lookahead: one list of groups for itself and the optimizer inside."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer.param_groups, {})
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


class WithoutLR(torch.optim.Optimizer):
    pass


class Relative(torch.optim.Optimizer):
    pass


class WithLists(torch.optim.SGD):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.base_lrs = [group["lr"] for group in self.param_groups]


def test_unmodulated_steps_leave_groups_alone():
    model, optimizer = modulated(bo.OGM(0.5, noise=False, apply_to="lr", start=5))
    identity = optimizer.param_groups[0]
    backward(model, batch(0, model))
    optimizer.step()
    assert optimizer.param_groups[0] is identity
