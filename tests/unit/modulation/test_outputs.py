"""OGM at the encoders' outputs: the same step as by scaling gradients, and where it can't be, that one by itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import balanceopt as bo
from balanceopt.modulation import _ogm, _outputs
from balanceopt.modulation._gradients import scale_grads_
from tests.models import (
    FUSIONS,
    INPUTS,
    Concat,
    ConcatOfWrapped,
    Multimodal,
    batch_norm,
    mlp,
    watch,
    with_dropout,
)
from tests.training import batches, distance, grad_of, groups_of, sgd

Step = Callable[[nn.Module, Any], None]


def numbered(number: int, model: Multimodal) -> Any:
    """A batch whose first modality alone shows the class."""
    generator = torch.Generator().manual_seed(number)
    labels = torch.randint(5, (8,), generator=generator)
    inputs = [torch.randn(8, n, generator=generator) for n in INPUTS[: len(model.modalities)]]
    return [inputs[0] + 3 * F.one_hot(labels, 5), *inputs[1:]], labels


def backward(model: nn.Module, given: Any) -> None:
    inputs, labels = given
    F.cross_entropy(model(*inputs), labels).backward()


def ogm(apply_to: Any, **options: Any) -> bo.OGM:
    return bo.OGM(0.8, noise=False, apply_to=apply_to, min_ndim=0, **options)


def trained(
    make: Callable[[], Multimodal],
    apply_to: str,
    *,
    step: Step = backward,
    groups: Callable[[Any], Any] = groups_of,
    given: dict[str, Any] | None = None,
    steps: int = 6,
    **options: Any,
) -> tuple[Multimodal, bo.ModulatedOptimizer]:
    torch.manual_seed(0)
    model = make()
    monitor = watch(model, **(given or {}))
    optimizer = bo.ModulatedOptimizer(sgd(groups(model), momentum=0.9), monitor, ogm(apply_to, **options))
    for number in range(steps):
        torch.manual_seed(number)
        optimizer.zero_grad()
        step(model, numbered(number, model))
        optimizer.step()
    return model, optimizer


def agree(make: Callable[[], Multimodal], **options: Any) -> None:
    """Both ways train alike, and OGM does something at all."""
    (model, optimizer), (twin, other) = (trained(make, to, **options) for to in ("output", "grad"))
    assert distance(model, twin) < 1e-6
    assert optimizer.stats() == other.stats()
    plain, _ = trained(make, "grad", **{**options, "start": 100})
    assert distance(model, plain) > 1e-3


@pytest.fixture
def touched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many gradients were scaled at steps, one number for each time that some were."""
    counts: list[int] = []

    def counting(slots: Any, coefficient: Tensor, scale: Any = scale_grads_) -> Tensor:
        counts.append(len(slots))
        result: Tensor = scale(slots, coefficient)
        return result

    monkeypatch.setattr(_ogm, "scale_grads_", counting)
    return counts


def at_outputs(make: Callable[[], Multimodal], touched: list[int], **options: Any) -> None:
    """No gradient is touched in a step."""
    trained(make, "output", **options)
    assert touched == []
    agree(make, **options)


def at_steps(make: Callable[[], Multimodal], touched: list[int], **options: Any) -> None:
    """The fall-back."""
    trained(make, "output", **options)
    assert sum(touched) > 0
    agree(make, **options)


# -- exact -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modalities", [2, 3])
@pytest.mark.parametrize("fusion", [name for name in FUSIONS if name not in ("sum", "gated")])
def test_any_fusion(fusion, modalities, touched):
    at_outputs(lambda: FUSIONS[fusion](modalities), touched)


@pytest.mark.parametrize("encoder", [mlp, batch_norm, with_dropout])
def test_any_encoder(encoder, touched):
    at_outputs(lambda: Concat(encoder=encoder), touched)


@pytest.mark.parametrize("wrapping", ["tuple", "list", "dict", "namedtuple", "dataclass"])
def test_any_output(wrapping, touched):
    at_outputs(lambda: ConcatOfWrapped(wrapping), touched)


def test_a_scaled_loss(touched):
    def step(model: nn.Module, given: Any) -> None:
        inputs, labels = given
        (1024 * F.cross_entropy(model(*inputs), labels)).backward()
        for p in model.parameters():
            p.grad = None if p.grad is None else p.grad / 1024

    at_outputs(Concat, touched, step=step)


def test_features_changed_in_place_on_their_way(touched):
    at_outputs(lambda: Concat(between=lambda z: z.relu_()), touched)


def test_checkpointed_encoders(touched):
    class Checkpointed(Concat):
        def encode(self, *inputs: Tensor) -> list[Any]:
            pairs = zip(self.encoders.values(), inputs, strict=True)
            return [checkpoint(encoder, x, use_reentrant=False) for encoder, x in pairs]

    at_outputs(Checkpointed, touched)


def test_labels_from_a_loss_module(touched):
    loss = nn.CrossEntropyLoss()

    def step(model: Any, given: Any) -> None:
        inputs, labels = given
        loss(model(*inputs), labels).backward()

    at_outputs(Concat, touched, given={"labels": loss}, step=step)


def test_a_loss_on_the_features_is_scaled_with_the_rest(touched):
    def step(model: Any, given: Any) -> None:
        inputs, labels = given
        features = model.encode(*inputs)
        loss = F.cross_entropy(model.fuse(features), labels)
        (loss + sum(z.square().mean() for z in features)).backward()

    at_outputs(Concat, touched, step=step)


def test_injected_unimodal_gradients_are_scaled_with_the_rest():
    def run(apply_to: str, first: bool) -> nn.Module:
        torch.manual_seed(0)
        model = Concat()
        monitor = watch(model)
        objectives = []
        if first:
            objectives.append(bo.UnimodalObjective(monitor, 5, inject=True, seed=0))
        optimizer = bo.ModulatedOptimizer(sgd(groups_of(model)), monitor, ogm(apply_to))
        if not first:
            objectives.append(bo.UnimodalObjective(monitor, 5, inject=True, seed=0))
        for number in range(4):
            optimizer.zero_grad()
            backward(model, numbered(number, model))
            optimizer.step()
        assert objectives
        return model

    for first in (True, False):
        assert distance(run("output", first), run("grad", first)) < 1e-6


# -- the fall-back -----------------------------------------------------------------------------------------------


class Shortcut(Concat):
    """What is inside the first encoder reaches the logits past its output."""

    def fuse(self, features: list[Tensor]) -> Tensor:
        first: Any = self.encoders["audio"]
        return super().fuse([features[0] + first[0].bias.sum(), *features[1:]])


class Stem(Concat):
    """A layer before the encoders, which is trained through both."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.stem = nn.Linear(5, 5)

    def encode(self, *inputs: Tensor) -> list[Any]:
        return super().encode(self.stem(inputs[0]), *inputs[1:])


class Twice(Concat):
    """Each encoder is called twice."""

    def encode(self, *inputs: Tensor) -> list[Any]:
        return [a + b for a, b in zip(super().encode(*inputs), super().encode(*inputs), strict=True)]


class Nested(nn.Module):
    """One output stands behind the other."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.lower, self.upper = nn.Linear(inputs, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        lower = self.lower(x)
        return self.upper(lower), lower


class OfNested(Concat):
    def fuse(self, features: list[Any]) -> Tensor:
        return super().fuse([upper + lower for upper, lower in features])


class Hidden(Concat):
    """Reentrant checkpoints: what they run does not show in the graph."""

    def encode(self, *inputs: Tensor) -> list[Any]:
        return [
            checkpoint(encoder, x.clone().requires_grad_(), use_reentrant=True)
            for encoder, x in zip(self.encoders.values(), inputs, strict=True)
        ]


@pytest.mark.parametrize(
    "make", [Shortcut, Stem, Twice, lambda: OfNested(encoder=Nested), Hidden, FUSIONS["sum"]]
)
def test_what_is_not_shown_to_be_exact(make, touched):
    given = {"select": {name: lambda output: output[0] for name in ("audio", "visual")}}
    nested = isinstance(make(), OfNested)
    at_steps(make, touched, given={**given, "scores": "zero-out"} if nested else {})


def test_ranks(touched, monkeypatch):
    monkeypatch.setattr(_outputs, "active_group", lambda group: "a group")
    at_steps(Concat, touched)


def test_tagged_parameters_outside_the_encoder(touched):
    def groups(model: Any) -> Any:
        first, second, _ = groups_of(model)
        return [
            {**first, "params": [*first["params"], model.head.bias]},
            second,
            {"params": [model.head.weight]},
        ]

    trained(Concat, "output", groups=groups)
    assert set(touched) == {1}
    agree(Concat, groups=groups)


def test_labels_that_come_after_backward(touched):
    torch.manual_seed(0)
    model = Concat()
    monitor = watch(model, labels="observe")
    optimizer = bo.ModulatedOptimizer(sgd(groups_of(model)), monitor, ogm("output"))
    backward(model, numbered(0, model))
    monitor.observe(numbered(0, model)[1])
    optimizer.step()
    assert optimizer.stats()["modulated"] == 1
    assert touched


def test_a_copy_scales_at_its_first_step_and_then_at_outputs(touched):
    model, optimizer = trained(Concat, "output")
    twin, copied = copy.deepcopy((model, optimizer))
    found = []
    for one, its in ((model, optimizer), (twin, copied)):
        for number in range(10, 14):
            its.zero_grad()
            backward(one, numbered(number, one))
            its.step()
        found.append(len(touched))
    assert found[0] == 0
    assert 0 < found[1] <= 2
    assert distance(model, twin) < 1e-6


# -- the life of a step ------------------------------------------------------------------------------------------


def started(**options: Any) -> tuple[Concat, bo.ModulatedOptimizer]:
    torch.manual_seed(0)
    model = Concat()
    return model, bo.ModulatedOptimizer(sgd(groups_of(model)), watch(model), ogm("output", **options))


@pytest.mark.parametrize("retain", [False, True])
def test_a_second_backward_in_a_step_is_refused(retain):
    model, _optimizer = started()
    inputs, labels = numbered(0, model)
    loss = F.cross_entropy(model(*inputs), labels)
    loss.backward(retain_graph=retain)
    if not retain:
        loss = F.cross_entropy(model(*inputs), labels)
    with pytest.raises(NotImplementedError, match="one backward a step"):
        loss.backward()


def test_gradients_thrown_away_are_no_step():
    model, optimizer = started()
    backward(model, numbered(0, model))
    optimizer.zero_grad()
    backward(model, numbered(1, model))
    optimizer.step()
    assert optimizer.stats()["modulated"] == 1


def test_outside_its_window_it_is_the_base_optimizer():
    model, _ = trained(Concat, "output", start=100)
    plain, _ = trained(Concat, "grad", start=100)
    assert distance(model, plain) == 0


def test_alpha_zero_is_the_base_optimizer():
    torch.manual_seed(0)
    model, twin = Concat(), Concat()
    twin.load_state_dict(model.state_dict())
    modulation = bo.OGM(0, noise=False, apply_to="output", min_ndim=0)
    optimizer = bo.ModulatedOptimizer(sgd(groups_of(model)), watch(model), modulation)
    plain = sgd(groups_of(twin))
    for given in batches(model, 4):
        for one, its in ((model, optimizer), (twin, plain)):
            its.zero_grad()
            backward(one, given)
            its.step()
    assert distance(model, twin) == 0


def test_attached_and_removed():
    torch.manual_seed(0)
    model = Concat()
    base, monitor = sgd(groups_of(model)), watch(model)
    handle = bo.attach(base, monitor, ogm("output"))
    handle.remove()
    backward(model, numbered(0, model))
    expected = [grad_of(p) for p in model.parameters()]
    model.zero_grad()
    handle = bo.attach(base, monitor, ogm("output"))
    backward(model, numbered(0, model))
    pairs = zip(model.parameters(), expected, strict=True)
    changed = [not torch.equal(grad_of(p), q) for p, q in pairs]
    assert any(changed)
    handle.remove()
    assert not monitor._taps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": True, "min_ndim": 0}, "takes noise=False"),
        ({"noise": False}, "give min_ndim=0"),
    ],
)
def test_options_that_do_not_go_with_it(options, message):
    with pytest.raises(ValueError, match=message):
        bo.OGM(apply_to="output", **options)
