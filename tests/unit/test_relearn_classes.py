"""Which classes a diagnosis has under each loss, against naive ones, and what it refuses."""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import balanceopt as bo
from tests.models import Concat, watch
from tests.relearning import samples, scheduled

ROWS = (120, 70)


def absolute(prediction, target):
    return (prediction - target).abs()


def features(seed=0):
    """Features of both modalities, training and validation, that show what makes the targets of `numbers`."""
    draw = torch.Generator().manual_seed(seed)
    hidden = [torch.randn(n, 4, generator=draw) for n in ROWS]
    return [{"audio": x + 0.1 * torch.randn(x.shape, generator=draw), "visual": x[:, :2]} for x in hidden]


def numbers(seed=1):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randperm(3 * n, generator=draw)[:n] / 7 - 5 for n in ROWS]


def label_sets(seed=1, labels=6):
    draw = torch.Generator().manual_seed(seed)
    return [(torch.rand(n, labels, generator=draw) < 0.35).float() for n in ROWS]


def by_bins(train, bins=10):
    """A class is the number of cuts below a target; a cut is the largest of a tenth of the training targets."""
    ordered = sorted(train.flatten().tolist())
    cuts = sorted({ordered[-(-k * len(ordered) // bins) - 1] for k in range(1, bins)} - {ordered[-1]})
    return lambda y: torch.tensor([bisect.bisect_left(cuts, value) for value in y.flatten().tolist()])


def by_sets(train, most=10):
    counts = Counter(map(tuple, train.tolist()))
    ranked = sorted(counts, key=lambda members: (-counts[members], members))[:most]
    return lambda y: torch.tensor([ranked.index(s) if s in ranked else most for s in map(tuple, y.tolist())])


def side(y):
    return (y.flatten() > 0.5).long()


def soft(seed=2):
    return [torch.randn(n, 4, generator=torch.Generator().manual_seed(seed)).softmax(1) for n in ROWS]


HARD = [torch.arange(n) % 5 for n in ROWS]
BITS = [y[:, 0] for y in label_sets()]
BINS = "10 classes: quantile bins of the training targets"
SIDES = "2 classes: a label above 0.5 or not"
SETS = "11 classes: the most frequent label sets of the training samples, and one of all other sets ("
BCE = nn.BCEWithLogitsLoss()
CASES: dict[str, tuple[Any, list[torch.Tensor], Any, str]] = {
    "cross-entropy": (None, HARD, lambda y: y, "5 classes: the labels"),
    "cross-entropy (N, 1)": (nn.CrossEntropyLoss(), [y[:, None] for y in HARD], lambda y: y[:, 0], "the labels"),
    "soft labels": (None, soft(), lambda y: y.argmax(1), "4 classes: the most probable class of soft labels"),
    "binary": (BCE, BITS, side, SIDES),
    "binary (N, 1)": (BCE, [y[:, None] for y in BITS], side, SIDES),
    "binary, bool": (BCE, [y > 0.5 for y in BITS], side, SIDES),
    "multi-label": (BCE, label_sets(), by_sets(label_sets()[0]), SETS),
    "few labels": (BCE, label_sets(labels=3), by_sets(label_sets(labels=3)[0]), "8 classes: the most"),
    "mse": (nn.MSELoss(), numbers(), by_bins(numbers()[0]), BINS),
    "mse (N, 1)": (nn.MSELoss(), [y[:, None] for y in numbers()], by_bins(numbers()[0]), BINS),
    "l1, whole numbers": (nn.L1Loss(), [(7 * y).long() for y in numbers()], by_bins((7 * numbers()[0]).long()), BINS),
    "smooth l1": (nn.SmoothL1Loss(), [y.double() for y in numbers()], by_bins(numbers()[0]), BINS),
    "huber, half": (nn.HuberLoss(), [y.half() for y in numbers()], by_bins(numbers()[0].half()), BINS),
    "function of numbers": (absolute, numbers(), by_bins(numbers()[0]), BINS),
    "function of classes": (absolute, HARD, lambda y: y, "5 classes: the labels"),
}  # fmt: skip


def diagnose(loss, targets, **options):
    monitor = watch(Concat(), loss=loss)
    train, val = zip(features(), targets, strict=True)
    return bo.diagnose(train, val, monitor=monitor, seed=0, **options)


@pytest.mark.parametrize("case", CASES)
def test_the_loss_tells_the_classes(case):
    loss, targets, classes, name = CASES[case]
    found = diagnose(loss, targets)
    expected = diagnose(loss, targets, classes=classes)
    assert name in str(found).splitlines()[3]
    assert str(expected).splitlines()[3] == f"{expected.num_clusters} classes: of the function `classes=`"
    assert found == dataclasses.replace(expected, classes=found.classes)


@pytest.mark.parametrize("classes", ["quantiles", "label-set"])
def test_a_rule_may_be_given_under_any_loss_and_without_a_monitor(classes):
    loss, targets = (nn.MSELoss(), numbers()) if classes == "quantiles" else (BCE, label_sets())
    train, val = zip(features(), targets, strict=True)
    expected = diagnose(loss, targets)
    assert diagnose(None, targets, classes=classes) == expected
    assert bo.diagnose(train, val, classes=classes, seed=0) == expected


def test_label_sets_of_whole_numbers_and_bools():
    targets = label_sets()
    expected = diagnose(BCE, targets)
    for other in ([y.long() for y in targets], [y > 0.5 for y in targets]):
        assert diagnose(None, other, classes="label-set") == expected


def test_another_number_of_bins_by_the_function_of_the_training_targets():
    targets = numbers()
    found = diagnose(nn.MSELoss(), targets, classes=bo.functional.quantile_classes(targets[0], bins=4))
    assert found.num_clusters == 4
    expected = diagnose(nn.MSELoss(), targets, classes=by_bins(targets[0], 4))
    assert found == expected


def test_bins_of_validation_targets_have_the_cuts_of_training():
    train, val = numbers()
    beyond = val + 2 * float(train.max() - train.min())  # all of them in the last bin
    found = diagnose(nn.MSELoss(), [train, beyond])
    assert found.num_clusters == 10
    assert set(found.val_purity.values()) == {1.0}


def test_targets_that_repeat_give_fewer_bins():
    targets = [(y / 20).round().clamp(0, 2) for y in numbers()]
    found = diagnose(nn.MSELoss(), targets)
    assert found.num_clusters == 3
    assert str(found).splitlines()[3] == "3 classes: quantile bins of the training targets"


def test_ignored_samples_do_not_count():
    hard = [torch.where(torch.arange(len(y)) < 30, 7, y) for y in HARD]
    found = diagnose(nn.CrossEntropyLoss(ignore_index=7), hard, equal_counts=False)
    assert found.train_count == {"audio": 90, "visual": 90}
    empty = [y.clone() for y in soft()]
    empty[0][:30] = 0
    assert diagnose(None, empty, equal_counts=False).train_count == {"audio": 90, "visual": 90}


@pytest.mark.parametrize("case", ["mse", "mse (N, 1)", "binary", "multi-label"])
def test_samples_with_a_missing_target_do_not_count(case):
    loss, targets, *_ = CASES[case]
    missing = [y.clone() for y in targets]
    missing[0].view(ROWS[0], -1)[::3, -1] = float("nan")
    seen = torch.arange(ROWS[0]) % 3 > 0
    (train, val), (y, w) = features(), missing
    without = ({m: x[seen] for m, x in train.items()}, y[seen])
    monitor = watch(Concat(), loss=loss)
    found = bo.diagnose((train, y), (val, w), monitor=monitor, seed=0)
    assert found == bo.diagnose(without, (val, w), monitor=monitor, seed=0)
    assert not any(math.isnan(p) for p in found.train_purity.values())


MULTI = [torch.ones(n, 3) for n in ROWS]
REFUSED: list[tuple[Any, Any, list[torch.Tensor], str]] = [
    (nn.MSELoss(), None, MULTI, r"one number a sample to be cut into bins. Found shape \(120, 3\).*Pass `classes=`, a"),
    (nn.L1Loss(), None, [y[..., None] for y in MULTI], "with several outputs or positions no bins are the right ones"),
    (absolute, None, MULTI, "no bins are the right ones"),
    (nn.MSELoss(), None, [y.abs() / 0 for y in numbers()], "should be finite, or NaN .* Found infinity"),
    (BCE, None, [y[..., None] for y in label_sets()], r"\(N, C\), 0 or 1 for each of C labels.*shape \(120, 6, 1"),
    (None, None, numbers(), r'class index each. Found dtype torch.float32: pass `classes=`.*"quantiles" for numbers'),
    (None, None, label_sets(), r'none negative.*For several labels a sample pass `classes="label-set"`'),
    (None, None, [y.long() for y in label_sets()], r"should have shape \(N,\).*positions \(tokens, pixels\)"),
    (None, None, [y > 0.5 for y in BITS], "class index each. Found dtype torch.bool"),
    (None, "label-set", HARD, r"labels given with the training features should be \(N, C\)"),
    (None, "quantiles", label_sets(), "one number a sample"),
    (absolute, None, [numbers()[0], HARD[1]], "of one kind in all training and validation batches. Found labels, q"),
    (BCE, None, [label_sets()[0], BITS[1]], "of one kind .*Found binary, label-set of 6 labels"),
    (BCE, None, [label_sets()[0], label_sets()[1][:, :5]], "Found label-set of 5 labels, label-set of 6 labels"),
]  # fmt: skip


@pytest.mark.parametrize(("loss", "classes", "targets", "message"), REFUSED)
def test_targets_without_classes_are_refused(loss, classes, targets, message):
    with pytest.raises(ValueError, match=message):
        diagnose(loss, targets, classes=classes)


@pytest.mark.parametrize("classes", [10, "bins", str])
def test_rules_that_are_none_are_refused(classes):
    with pytest.raises(
        ValueError, match=r"`classes` should be a function of .*\('quantiles', 'label-set'\), or None"
    ):
        diagnose(None, HARD, classes=classes)


def loaders_of(targets):
    parts = (samples(n, seed=seed).tensors[:-1] for n, seed in zip(ROWS, (1, 2), strict=True))
    return [DataLoader(TensorDataset(*x, y), 16) for x, y in zip(parts, targets, strict=True)]


@pytest.mark.parametrize("case", ["mse", "mse (N, 1)", "multi-label", "binary", "soft labels"])
def test_of_a_loader(case):
    loss, targets, classes, name = CASES[case]
    model = Concat()
    train, val = loaders_of(targets)
    found, expected = (
        bo.diagnose(train, val, monitor=watch(model, loss=loss), seed=0, classes=rule)
        for rule in (None, lambda y: classes(y))
    )
    assert name in str(found)
    assert found == dataclasses.replace(expected, classes=found.classes)


def test_targets_of_any_kind_come_from_a_forward_of_the_users():
    model = Concat()
    targets = numbers()
    expected = bo.diagnose(*loaders_of(targets), monitor=watch(model, loss=nn.MSELoss()), seed=0)
    swapped = [[(y, *x) for *x, y in loader] for loader in loaders_of(targets)]

    def forward(model, batch):
        model(*batch[1:])
        return {"labels": batch[0]}

    monitor = watch(model, loss=nn.MSELoss())
    assert bo.diagnose(*swapped, monitor=monitor, seed=0, forward=forward) == expected


def test_more_samples_than_the_limit_are_chosen_at_random_with_the_cuts_of_those():
    draw = torch.Generator().manual_seed(0)
    y = torch.rand(4000, generator=draw)
    data = ({"audio": torch.randn(4000, 2, generator=draw)}, y)
    found = bo.diagnose(data, data, classes="quantiles", max_samples=200, equal_counts=False)
    assert found.train_count == {"audio": 200}
    assert found.num_clusters == 10


def test_a_scheduler_resumes_with_the_same_classes():
    settings: dict[str, Any] = {"every": 1, "epochs": 99, "lam": 5.0}
    torch.manual_seed(0)
    model = Concat(classes=1)
    found: list[bo.Diagnosis] = []
    for seed in (3, 4):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        monitor = watch(model, loss=nn.MSELoss())
        scheduler = bo.ReLearnScheduler(optimizer, monitor, *loaders_of(numbers()), seed=seed, **settings)
        if not found:
            state = scheduler.state_dict()
        scheduler.load_state_dict(state)
        found.append(scheduler.diagnose())
    assert found[0] == found[1]
    assert found[0].num_clusters == 10


def test_a_scheduler_of_regression_takes_encoders_back():
    model, _, scheduler = scheduled(lam=9.0, model_options={"classes": 1})
    monitor = watch(model, loss=nn.MSELoss())
    optimizer = scheduler.optimizer
    scheduler = bo.ReLearnScheduler(optimizer, monitor, *loaders_of(numbers()), every=1, epochs=99, lam=9.0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = scheduler.step()
    assert found is not None
    assert found.classes == "quantile bins of the training targets"
    assert any(alpha > 0 for alpha in found.strength.values())
    for name, p in model.named_parameters():
        strength = next((a for m, a in found.strength.items() if f".{m}." in f".{name}"), 0.0)
        torch.testing.assert_close(p.detach(), before[name] - strength * torch.ones_like(p))
