"""MaskedSubnetworkSGD: torch's SGD wherever no mask acts and SGD on the masked gradients elsewhere."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor

import balanceopt as bo
from tests.masking import every_option, masked, masked_rows, weights
from tests.models import watch
from tests.training import (
    backward,
    bare,
    batches,
    grad_of,
    groups_of,
    same_bits,
    sgd,
    small_model,
    train,
)


@every_option
def test_with_all_units_it_is_sgd_bit_for_bit(options):
    model, optimizer = masked(clamp=(1, 1), offset=100, **options)
    twin, plain = bare(lambda groups: sgd(groups, **options))
    for one, stepped in ((model, optimizer), (twin, plain)):
        train(one, stepped, batches(one, 5))
    assert optimizer.stats()["modulated"] == 5
    assert same_bits(model, twin)


@every_option
def test_outside_its_window_it_is_sgd_bit_for_bit(options):
    model, optimizer = masked(start=100, **options)
    twin, plain = bare(lambda groups: sgd(groups, **options))
    for one, stepped in ((model, optimizer), (twin, plain)):
        train(one, stepped, batches(one, 3))
    assert same_bits(model, twin)


def test_without_scores_it_is_sgd_bit_for_bit():
    model = small_model()
    monitor = watch(model, labels="observe")
    optimizer = bo.MaskedSubnetworkSGD(groups_of(model), monitor, lr=0.1, momentum=0.9, strict=False)
    twin, plain = bare(lambda groups: sgd(groups, momentum=0.9))
    with pytest.warns(UserWarning, match="no scores"):
        train(model, optimizer, batches(model, 12))
    train(twin, plain, batches(twin, 12))
    assert same_bits(model, twin)


@every_option
@pytest.mark.parametrize("scale", ["none", "unbiased", "official"])
def test_it_is_sgd_on_the_masked_gradients_bit_for_bit(options, scale):
    model, optimizer = masked(scale=scale, **options)
    twin, plain = bare(lambda groups: sgd(groups, **options))
    for given in batches(model, 4):
        train(model, optimizer, [given])
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = grad_of(p).clone()
        plain.step()
        assert same_bits(model, twin)


def test_masked_units_still_move_by_momentum_and_weight_decay():
    model, optimizer = masked(momentum=0.9, weight_decay=0.1, clamp=(0.3, 0.3))
    train(model, optimizer, batches(model, 3))
    optimizer.zero_grad()
    backward(model, batches(model, 1, first=3)[0])
    before, grads = [p.detach().clone() for p in weights(model)], [grad_of(p).clone() for p in weights(model)]
    optimizer.step()
    rows = masked_rows(grads, [grad_of(p) for p in weights(model)])
    assert sum(int(row.sum()) for row in rows) > 10
    moved = [(p != b).any(1)[row] for p, b, row in zip(weights(model), before, rows, strict=True)]
    assert all(bool(m.all()) for m in moved)


@pytest.mark.parametrize("options", [{}, {"scale": "unbiased"}])
def test_it_resumes_bit_for_bit(options):
    model, optimizer = masked(momentum=0.9, **options)
    train(model, optimizer, batches(model, 3))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    train(model, optimizer, batches(model, 3, first=3))
    file.seek(0)
    weights_then, state = torch.load(file, weights_only=True)
    twin, again = masked(momentum=0.9, **{"seed": 99, **options})
    twin.load_state_dict(weights_then)
    again.load_state_dict(state)
    train(twin, again, batches(twin, 3, first=3))
    assert same_bits(model, twin)


def test_a_closure_is_masked_and_its_loss_returned():
    model, optimizer = masked(momentum=0.9)
    twin, again = masked(momentum=0.9)

    def closure() -> Tensor:
        optimizer.zero_grad()
        return backward(model, batches(model, 1)[0])

    loss = optimizer.step(closure)  # type: ignore[arg-type]
    train(twin, again, batches(twin, 1))
    assert same_bits(model, twin)
    assert float(loss) > 0


def test_its_options_reach_sgd_and_amss():
    _, optimizer = masked(
        momentum=0.9,
        dampening=0.1,
        weight_decay=0.2,
        temperature=0.5,
        scale="official",
    )
    assert isinstance(optimizer.optimizer, torch.optim.SGD)
    group = optimizer.param_groups[0]
    found = {
        key: group[key] for key in ("lr", "momentum", "dampening", "weight_decay", "nesterov", "modality")
    }
    assert found == {
        "lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.2, "nesterov": False, "modality": "audio",
    }  # fmt: skip
    amss = optimizer.modulation
    assert isinstance(amss, bo.AMSS)
    assert (amss.temperature, amss.scale) == (0.5, "official")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1}, "`lr` should be a finite number of at least 0"),
        ({"nesterov": True}, "`nesterov` needs a momentum above 0 and a dampening of 0"),
        ({"temperature": -1}, "`temperature` should be a finite number above 0"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        masked(**options)


def test_groups_with_rates_of_their_own():
    model = small_model()
    groups = groups_of(model)
    groups[0]["lr"] = 0.0
    optimizer = bo.MaskedSubnetworkSGD(groups, watch(model), lr=0.1, seed=0)
    before = [p.detach().clone() for p in model.modalities["audio"].parameters()]
    train(model, optimizer, batches(model, 2))
    assert all(torch.equal(p, b) for p, b in zip(model.modalities["audio"].parameters(), before, strict=True))


def test_untagged_parameters_belong_to_their_encoders():
    model = small_model()
    optimizer = bo.MaskedSubnetworkSGD(model.parameters(), watch(model), lr=0.1, seed=3)
    twin, tagged = masked()
    train(model, optimizer, batches(model, 3))
    train(twin, tagged, batches(twin, 3))
    assert same_bits(model, twin)


def test_under_a_grad_scaler_it_is_the_same():
    model, optimizer = masked(momentum=0.9)
    twin, plain = masked(momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for inputs, labels in batches(model, 3):
        optimizer.zero_grad()
        scaler.scale(torch.nn.functional.cross_entropy(model(*inputs), labels)).backward()
        scaler.step(optimizer)
        scaler.update()
    train(twin, plain, batches(twin, 3))
    assert same_bits(model, twin)


def test_a_step_that_the_grad_scaler_skips_moves_nothing():
    model, optimizer = masked(momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    before = [p.detach().clone() for p in model.parameters()]
    inputs, labels = batches(model, 1)[0]
    scaler.scale(torch.nn.functional.cross_entropy(model(*inputs), labels)).backward()
    grad_of(model.get_parameter("head.weight"))[0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert optimizer.stats()["modulated"] == 0
    train(model, optimizer, batches(model, 1, first=1))
    assert optimizer.stats()["modulated"] == 1
