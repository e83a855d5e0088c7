"""What must hold of a share of the joint gradient: its limits bit for bit, and that it is affine in the share."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import balanceopt as bo
from balanceopt.functional import mixed_gradient
from tests.models import CLASSES, FUSIONS, MLPHead, watch
from tests.objectives import given as batch_of

shares = st.floats(0, 1)
seeds = st.integers(0, 2**16)
injected = st.booleans()
fusions = st.sampled_from(sorted(FUSIONS))
few = settings(max_examples=12, deadline=None)


def pair(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@given(seeds, shares)
def test_the_rule_is_affine_in_the_share(seed: int, share: float):
    joint, unimodal = pair(seed)
    ends = [mixed_gradient(joint, unimodal, end) for end in (0, 1)]
    expected = (1 - share) * ends[0] + share * ends[1]
    torch.testing.assert_close(mixed_gradient(joint, unimodal, share), expected)


@given(seeds, st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
def test_the_rules_limits(seed: int, dtype: torch.dtype):
    joint, unimodal = pair(seed, dtype)
    before = joint.clone(), unimodal.clone()
    assert torch.equal(mixed_gradient(joint, unimodal), joint + unimodal)
    assert torch.equal(mixed_gradient(joint, unimodal, 0), unimodal)
    assert torch.equal(mixed_gradient(joint, None, 0), torch.zeros_like(joint))
    assert torch.equal(mixed_gradient(joint, None), joint)
    assert torch.equal(mixed_gradient(joint, None, 0.5), joint / 2)
    assert mixed_gradient(joint, unimodal.double(), 0.3).dtype is dtype
    assert torch.equal(joint, before[0])
    assert torch.equal(unimodal, before[1])


def test_nothing_is_left_of_a_joint_gradient_without_numbers_at_0():
    bad = torch.tensor([torch.nan, torch.inf])
    assert torch.equal(mixed_gradient(bad, None, 0), torch.zeros(2))
    assert torch.equal(mixed_gradient(bad, torch.ones(2), 0), torch.ones(2))


def run(
    kind: str, seed: int, *, steps: int = 1, changed: str = "", criterion: Any = None, **options: Any
) -> tuple[Any, Tensor]:
    """A model after a few steps, and the logits of the last; without options there is no objective."""
    torch.manual_seed(seed)
    model: Any = FUSIONS[kind](3)
    monitor = watch(model, loss=criterion)
    objective = bo.UnimodalObjective(monitor, CLASSES, seed=0, **options) if options else None
    heads = [] if objective is None else [{"params": list(objective.parameters())}]
    groups = [{"params": list(model.parameters())}, *heads]
    optimizer = torch.optim.SGD([group for group in groups if group["params"]], lr=0.1, momentum=0.9)
    logits = torch.empty(0)
    for number in range(steps):
        inputs, labels = batch_of(3, torch.float32, seed=seed + number)
        inputs = [x + 1 if name == changed else x for name, x in zip(model.names, inputs, strict=True)]
        optimizer.zero_grad()
        torch.manual_seed(number)  # of dropout
        logits = model(*inputs)
        loss = (criterion or F.cross_entropy)(logits, labels)
        called = objective is not None and not objective.inject
        (loss + objective(labels) if called and objective else loss).backward()
        optimizer.step()
    return model, logits.detach()


def same_bits(a: Any, b: Any) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def same_gradients(a: Any, b: Any) -> bool:
    pairs = list(zip(a.parameters(), b.parameters(), strict=True))
    return all(p.grad is not None and q.grad is not None and torch.equal(p.grad, q.grad) for p, q in pairs)


@few
@given(fusions, seeds, injected)
def test_a_share_of_1_without_weight_is_the_base(kind: str, seed: int, inject: bool):
    plain, _ = run(kind, seed, steps=3)
    assert same_bits(run(kind, seed, steps=3, weight=0.0, joint=1.0, inject=inject)[0], plain)


@few
@given(fusions, seeds, injected)
def test_at_0_the_forward_and_the_fusion_are_those_of_the_base(kind: str, seed: int, inject: bool):
    plain, expected = run(kind, seed)
    model, logits = run(kind, seed, joint=0.0, inject=inject)
    assert torch.equal(logits, expected)
    encoders = {f"encoders.{name}" for name, _ in model.encoders.named_parameters()}
    gradients = dict(plain.named_parameters())
    for name, p in model.named_parameters():
        same = torch.equal(p.grad, gradients[name].grad)
        assert same or name in encoders, name
        assert not (same and name in encoders), name


@few
@given(fusions, seeds, injected)
def test_at_0_an_encoder_does_not_hear_of_the_others(kind: str, seed: int, inject: bool):
    # A loss module gives the scale exactly, where the gradient at the logits gives it to rounding.
    options: dict[str, Any] = {"joint": 0.0, "inject": inject, "criterion": nn.CrossEntropyLoss()}
    model, logits = run(kind, seed, **options)
    other, moved = run(kind, seed, **options, changed="visual")
    assert not torch.equal(logits, moved)
    for name in ("audio", "text"):
        assert same_gradients(model.encoders[name], other.encoders[name])
    assert not same_gradients(model.encoders["visual"], other.encoders["visual"])


@few
@given(seeds)
def test_at_0_encoders_get_the_uni_modal_losses_gradient_bit_for_bit(seed: int):
    torch.manual_seed(seed)
    model = MLPHead(2)
    twin = copy.deepcopy(model)
    objective = bo.UnimodalObjective(watch(model), CLASSES, weight=2.0, joint=0.0, seed=0)
    alone = bo.UnimodalObjective(watch(twin), CLASSES, weight=2.0, seed=0)
    inputs, labels = batch_of(2, torch.float32, seed=seed)
    (F.cross_entropy(model(*inputs), labels) + objective(labels)).backward()
    twin(*inputs)
    alone(labels).backward()
    assert same_gradients(model.encoders, twin.encoders)
    assert same_gradients(objective, alone)


@few
@given(fusions, seeds, injected, shares)
def test_gradients_are_affine_in_the_share(kind: str, seed: int, inject: bool, share: float):
    part, none, whole = (run(kind, seed, joint=s, inject=inject)[0] for s in (share, 0.0, 1.0))
    for p, a, b in zip(part.parameters(), none.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.grad, a.grad + share * (b.grad - a.grad), rtol=1e-4, atol=1e-5)
