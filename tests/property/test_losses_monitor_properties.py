"""What must hold for the monitor's scores of any loss: splits of a step, order, units, what is absent or ignored."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import balanceopt as bo
from balanceopt.monitor import Scores
from tests.models import INPUTS, Concat, Multimodal, SumHeads, Tokens, watch
from tests.training import sgd

M, OUTPUTS = 3, 3


class Nonlinear(Multimodal):
    def __init__(self, modalities: int = M, *, classes: int = OUTPUTS, **options: Any) -> None:
        super().__init__(modalities, classes=classes, **options)
        self.head = nn.Sequential(nn.Linear(sum(self.widths), 6), nn.Tanh(), nn.Linear(6, classes))

    def fuse(self, features: list[Tensor]) -> Tensor:
        return self.head(torch.cat(features, -1))


REGRESSIONS = {
    "mse": nn.MSELoss(),
    "l1": nn.L1Loss(),
    "smooth l1": nn.SmoothL1Loss(beta=0.4),
    "huber": nn.HuberLoss(delta=0.6),
}
LOSSES: dict[str, Any] = {
    "indices": nn.CrossEntropyLoss(),
    "weighted": nn.CrossEntropyLoss(torch.tensor([1.0, 0.5, 3.0]), label_smoothing=0.1),
    "multi-label": nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 4.0, 0.3])),
    **REGRESSIONS,
    "function": lambda f, y: (f - y).abs() ** 1.5,
}
FUSIONS = {"split": Concat, "per-head": SumHeads, "zero-out": Nonlinear}
names, fusions, seeds = st.sampled_from(list(LOSSES)), st.sampled_from(list(FUSIONS)), st.integers(0, 2**31)
sizes = st.integers(2, 9)
few = settings(max_examples=25)


def model_of(fusion: str, seed: int, outputs: int = OUTPUTS) -> Multimodal:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return FUSIONS[fusion](M, classes=outputs)


def batch(name: str, seed: int, size: int) -> tuple[list[Tensor], Tensor]:
    g = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(size, n, generator=g) for n in INPUTS[:M]]
    if name in ("indices", "weighted"):
        return inputs, torch.randint(OUTPUTS, (size,), generator=g)
    if name == "multi-label":
        return inputs, torch.randint(2, (size, OUTPUTS), generator=g).float()
    return inputs, torch.randn(size, OUTPUTS, generator=g) + 1


def taken(
    model: Multimodal,
    name: str,
    passes: list[tuple[list[Tensor], Tensor]],
    present: list[dict[str, Tensor]] | None = None,
    **options: Any,
) -> Scores | None:
    """The scores of some passes; gradients go through a loss of the same kind, unless a pass is empty."""
    criterion = copy.deepcopy(LOSSES[name])
    with watch(model, loss=LOSSES[name], **options) as monitor:
        scores = monitor.scores(needs_entropy=True)
        for i, (inputs, target) in enumerate(passes):
            monitor.observe(target, present=present[i] if present else None)
            criterion(model(*inputs), target).sum().backward()
        return scores.take()


FIELDS = ("score", "count", "cross_entropy", "feature_entropy", "baseline")


def expect_same(found: Scores | None, expected: Scores | None, fields: tuple[str, ...] = FIELDS) -> None:
    assert found is not None
    assert expected is not None
    for field in fields:
        x, y = getattr(found, field), getattr(expected, field)
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5, equal_nan=True, msg=f"{field}: {x} {y}")


@few
@given(names, st.sampled_from(["split", "per-head"]), seeds, sizes, st.data())
def test_micro_batches_equal_one_batch(name, fusion, seed, size, data):
    """Not so of zero-out's means, which are those of a micro-batch."""
    model, (inputs, target) = model_of(fusion, seed), batch(name, seed, size)
    cuts = sorted(data.draw(st.sets(st.integers(1, size - 1), max_size=3)))
    pieces = zip(*(x.tensor_split(cuts) for x in (*inputs, target)), strict=True)
    split = taken(model, name, [(list(piece[:-1]), piece[-1]) for piece in pieces])
    expect_same(split, taken(model, name, [(inputs, target)]))


@few
@given(names, seeds, sizes, st.data())
def test_micro_batches_of_zeroed_features_equal_one_batch(name, seed, size, data):
    model, (inputs, target) = model_of("zero-out", seed), batch(name, seed, size)
    cut = data.draw(st.integers(1, size - 1))
    pieces = zip(*(x.tensor_split([cut]) for x in (*inputs, target)), strict=True)
    split = taken(model, name, [(list(piece[:-1]), piece[-1]) for piece in pieces], fill="zero")
    expect_same(split, taken(model, name, [(inputs, target)], fill="zero"))


@few
@given(names, fusions, seeds, sizes)
def test_the_order_of_samples_does_not_matter(name, fusion, seed, size):
    model, (inputs, target) = model_of(fusion, seed), batch(name, seed, size)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    permuted = taken(model, name, [([x[order] for x in inputs], target[order])])
    expect_same(permuted, taken(model, name, [(inputs, target)]))


@few
@given(
    st.sampled_from(["mse", "l1"]),
    fusions,
    seeds,
    sizes,
    st.floats(0.1, 10),
    st.sampled_from([-1, 1]),
    st.floats(-10, 10),
)
def test_units_and_origins_of_numbers_change_no_score(name, fusion, seed, size, a, sign, b):
    """Targets a y + b, and the model whose output is transformed alike; smooth losses have a scale of their own."""
    model, (inputs, target) = model_of(fusion, seed), batch(name, seed, size)
    expected, a = taken(model, name, [(inputs, target)]), a * sign
    last = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == OUTPUTS]
    heads = last[-M:] if fusion == "per-head" else last[-1:]
    with torch.no_grad():
        for head in heads:
            head.weight.mul_(a)
            head.bias.mul_(a)
        heads[0].bias.add_(b)
    found = taken(model, name, [(inputs, a * target + b)])
    assert found is not None
    assert expected is not None
    torch.testing.assert_close(found.score, expected.score, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.cross_entropy, expected.cross_entropy, rtol=1e-3, atol=1e-3)


@few
@given(names, st.sampled_from(["split", "per-head"]), seeds, st.integers(3, 9))
def test_a_modality_that_is_absent_in_a_sample_adds_nothing_there(name, fusion, seed, size):
    """Its scores are those of the samples that have it, whatever its encoder made of the others."""
    model, (inputs, target) = model_of(fusion, seed), batch(name, seed, size)
    g = torch.Generator().manual_seed(seed)
    flags = {n: torch.rand(size, generator=g) < 0.6 for n in model.names[1:]}
    found = taken(model, name, [(inputs, target)], [flags])
    whole = taken(model, name, [(inputs, target)])
    assert found is not None
    assert whole is not None
    assert found.count.tolist() == [size, *(float(f.sum()) for f in flags.values())]
    torch.testing.assert_close(found.baseline, whole.baseline)
    if name != "function":  # whose scale is the mean loss of all modalities
        torch.testing.assert_close(found.score[0], whole.score[0])
    assert (found.score[found.count == 0] == 0).all()
    assert (found.score <= found.count).all()


class Shifted(Tokens):
    """Tokens with an offset each."""

    offset: Tensor | float = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.offset


@few
@given(seeds, sizes)
def test_ignored_positions_never_matter(seed, size):
    """Nor does what the encoders make of them."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = Concat(2, classes=4, encoder=Shifted)
    g = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(size, n, generator=g) for n in INPUTS[:2]]
    target = torch.randint(4, (size, 3), generator=g)
    target[torch.rand(size, 3, generator=g) < 0.4] = -100
    target[0] = torch.tensor([-100, 1, -100])
    loss, found = nn.CrossEntropyLoss(), []
    for offset in (0.0, 100.0):
        for encoder in model.encoders.values():
            encoder.offset = torch.where((target == -100).unsqueeze(2), offset, 0.0)
        with watch(model, loss=loss) as monitor:
            scores = monitor.scores()
            loss(model(*inputs).flatten(0, 1), target.flatten()).backward()
            found.append(scores.take())
    expect_same(found[1], found[0], ("score", "count", "cross_entropy", "baseline"))


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_an_empty_batch_adds_nothing(name: str, fusion: str):
    model, (inputs, target) = model_of(fusion, 0), batch(name, 0, 5)
    empty = [x[:0] for x in inputs], target[:0]
    expected = taken(model, name, [(inputs, target)])
    for order in ([empty, (inputs, target)], [(inputs, target), empty]):
        expect_same(taken(model, name, order), expected)
    alone = taken(model, name, [empty])
    assert alone is None or alone.count.tolist() == [0] * M


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_of_one_is_no_error(name: str, fusion: str):
    """Only a loss without a scale of its own can't be scored there; over two passes it can."""
    model, (inputs, target) = model_of(fusion, 0), batch(name, 0, 2)
    passes = [([x[i : i + 1] for x in inputs], target[i : i + 1]) for i in range(2)]
    found = taken(model, name, passes[:1])
    assert found is not None
    assert found.count.tolist() == [1] * M
    assert bool(found.score.isnan().all()) == (name in REGRESSIONS)
    both = taken(model, name, passes)
    assert both is not None
    assert both.score.isfinite().all()


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize(("name", "m"), list(itertools.product(REGRESSIONS, range(M))))
def test_predictions_that_are_nan_leave_the_step_to_the_base(name: str, m: int, fusion: str):
    model, (inputs, target) = model_of(fusion, 0), batch(name, 0, 6)
    monitor = watch(model, loss=LOSSES[name])
    optimizer = bo.ModulatedOptimizer(
        sgd(bo.modality_groups(model, model.modalities), lr=0.0), monitor, bo.OGM(0.5)
    )
    for spoilt in (False, True):
        optimizer.zero_grad()
        given_inputs = [
            torch.where(torch.tensor(spoilt and i == m), torch.nan, x) for i, x in enumerate(inputs)
        ]
        monitor.observe(target)
        LOSSES[name](model(*given_inputs), target).backward()
        if spoilt:
            with pytest.warns(UserWarning, match="scores are not finite"):
                optimizer.step()
        else:
            optimizer.step()
    assert optimizer.stats()["modulated"] == 1
    assert optimizer.stats()["unusable_scores"] == 1
    monitor.remove()
