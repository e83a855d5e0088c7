"""bo.balance: what it builds, what it leaves, and that a resumed run goes on bit for bit."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import balanceopt as bo
from tests.models import CLASSES, Concat, batch
from tests.relearning import loaders, random_streams

EPOCHS = 5
BASES: dict[str, Any] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.01, momentum=0.5),
}


def built(make: Any = BASES["SGD"], **options: Any) -> tuple[Concat, torch.optim.Optimizer, bo.Balance]:
    torch.manual_seed(3)
    model = Concat()
    optimizer = make(model.parameters())
    train, val = loaders()
    options = {"train_loader": train, "val_loader": val, "epochs": EPOCHS, "seed": 0, **options}
    return model, optimizer, bo.balance(model, model.modalities, optimizer, CLASSES, **options)


def epoch(model: Concat, optimizer: torch.optim.Optimizer, extra: Any) -> None:
    model.train()
    for *inputs, labels in loaders()[0]:
        optimizer.zero_grad()
        (F.cross_entropy(model(*inputs), labels) + extra(labels)).backward()
        optimizer.step()


def outcome(model: Concat, balance: bo.Balance) -> list[Tensor]:
    """All weights, and the vote on a batch."""
    model.eval()
    with torch.no_grad():
        answer = balance.predict(model(*next(iter(loaders()[1]))[:-1]))
    return [*model.state_dict().values(), *balance.objective.state_dict().values(), answer]


def test_it_is_the_composition_of_its_parts():
    model, optimizer, balance = built()
    twin = copy.deepcopy(model)
    train, val = loaders()
    monitor = bo.ModalityMonitor(twin, twin.modalities)
    objective = bo.UnimodalObjective(monitor, CLASSES, seed=0)
    base = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    base.add_param_group({"params": list(objective.parameters())})
    options: Any = {"every": 1, "epochs": EPOCHS, "lam": 3.0, "equal_counts": False, "seed": 0}
    scheduler = bo.ReLearnScheduler(base, monitor, train, val, **options)
    for _ in range(2):
        epoch(model, optimizer, balance)
        epoch(twin, base, objective)
        mine, its = balance.step(), scheduler.step()
        assert mine is not None
        assert its is not None
        assert mine.strength == its.strength
    for a, b in zip(outcome(model, balance), outcome(twin, bo.Balance(objective, scheduler)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("make", BASES.values(), ids=BASES)
@pytest.mark.parametrize("before", [0, 2])
def test_a_resumed_run_goes_on_bit_for_bit(make, before):
    model, optimizer, balance = built(make)
    for _ in range(before):
        epoch(model, optimizer, balance)
        balance.step()
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "balance": balance}
    if not before:  # an optimizer's state holds no lazy parameter
        parts = {"model": model, "balance": balance}
    file = io.BytesIO()
    torch.save({name: part.state_dict() for name, part in parts.items()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, its_optimizer, its_balance = built(make, seed=9 if before else 0)
    for p in again.parameters():
        p.data.add_(1)
    for part, name in ((again, "model"), (its_optimizer, "optimizer"), (its_balance, "balance")):
        if name in saved:
            part.load_state_dict(saved[name])
    for one, its, extra in ((model, optimizer, balance), (again, its_optimizer, its_balance)):
        for _ in range(2):
            epoch(one, its, extra)
            extra.step()
    for a, b in zip(outcome(model, balance), outcome(again, its_balance), strict=True):
        assert torch.equal(a, b)


def test_without_loaders_nothing_is_re_initialised():
    model, optimizer, balance = built(train_loader=None, val_loader=None, epochs=None)
    assert balance.scheduler is None
    epoch(model, optimizer, balance)
    before = [p.clone() for p in model.parameters()]
    assert balance.step() is None
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.HuberLoss()])
def test_numbers_are_not_voted_on_nor_re_learned(loss):
    model, _, balance = built(loss=loss)
    assert balance.scheduler is None
    model(*batch()[0])
    balance(torch.randn(8, CLASSES)).backward()
    model.eval()
    answer = model(*batch()[0])
    assert balance.predict(answer) is answer


def test_the_heads_are_trained_in_a_group_of_their_own():
    model, optimizer, balance = built()
    epoch(model, optimizer, balance)
    before = [p.detach().clone() for p in balance.objective.parameters()]
    epoch(model, optimizer, balance)
    after = balance.objective.parameters()
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(list(model.parameters())), 4]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def hooks_of(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def test_remove_leaves_no_hook():
    with built()[2] as balance:
        assert hooks_of(balance.monitor.model) > 0
    assert hooks_of(balance.monitor.model) == 0
    balance.remove()


def test_no_number_of_the_global_stream_is_taken():
    model = Concat()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = random_streams()
    balance = bo.balance(model, model.modalities, optimizer, CLASSES)
    model(*batch_of(0))
    balance(torch.zeros(8, dtype=torch.int64)).backward()
    assert random_streams() == before


def batch_of(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, generator=generator) for x in (torch.empty(8, 5), torch.empty(8, 6))]


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"val_loader": None}, "given together"),
            ({"epochs": None}, "given together"),
            ({"train_loader": None, "val_loader": None}, "given together"),
            ({"epochs": 0}, "at least 1"),
            ({"loss": nn.TripletMarginLoss()}, "compare a prediction with a target"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            built(**options)

    def test_nothing_is_left_of_a_failure(self):
        model = Concat()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        train: Any = 3
        val = loaders()[1]
        with pytest.raises(TypeError, match="`train_loader`"):
            bo.balance(
                model,
                model.modalities,
                optimizer,
                CLASSES,
                train_loader=train,
                val_loader=val,
                epochs=5,
            )
        with pytest.raises(ValueError, match="out_features"):
            bo.balance(model, model.modalities, optimizer, 0)
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
        with pytest.raises(ValueError, match="scheduler after"):
            bo.balance(model, model.modalities, optimizer, CLASSES)
        assert hooks_of(model) == 0
        assert len(optimizer.param_groups) == 1

    def test_a_failed_load_changes_nothing(self):
        model, optimizer, balance = built()
        epoch(model, optimizer, balance)
        balance.step()
        good = balance.state_dict()
        before = outcome(model, balance)
        heads = good["heads"]
        for change, error in (
            ({"scheduler": None}, ValueError),
            ({"scheduler": {**good["scheduler"], "relearns": -1}}, ValueError),
            ({"heads": 3}, TypeError),
            ({"heads": {**heads, "own_heads.0.bias": torch.ones(3)}}, ValueError),
            ({"heads": {"nose": torch.ones(3)}}, KeyError),
        ):
            with pytest.raises(error):
                balance.load_state_dict({**good, **change})
        with pytest.raises(KeyError, match="Missing"):
            balance.load_state_dict({"heads": heads})
        for a, b in zip(before, outcome(model, balance), strict=True):
            assert torch.equal(a, b)
