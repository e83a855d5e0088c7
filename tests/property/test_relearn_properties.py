"""What holds of every diagnosis, whatever the features."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import balanceopt as bo
from balanceopt.functional import as_loss
from balanceopt.relearn._classes import TargetReader, fit_classes
from balanceopt.relearn._features import balanced

seeds = st.integers(0, 2**16)
# Where an example is two whole diagnoses.
few = settings(max_examples=max(12, settings().max_examples // 4))


def features(seed: int, rows: int, names: tuple[str, ...] = ("a", "b", "c"), classes: int = 3):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(classes), torch.randint(classes, (rows - classes,), generator=draw)])
    shown = torch.nn.functional.one_hot(labels, classes).float()
    return {m: 2 * i * shown + torch.randn(rows, 3, generator=draw) for i, m in enumerate(names)}, labels


@few
@given(seeds, st.integers(6, 40), st.integers(6, 40), st.floats(0, 20))
def test_ranges(seed, rows, held, lam):
    found = bo.diagnose(features(seed, rows), features(seed + 1, held), lam=lam, seed=seed)
    for name in found.modalities:
        assert 1 / 3 <= found.train_purity[name] <= 1
        assert found.gap[name] == abs(found.train_purity[name] - found.val_purity[name])
        assert found.strength[name] == pytest.approx(math.tanh(lam * found.gap[name]))


@few
@given(seeds, st.permutations(["a", "b", "c"]))
def test_the_order_of_modalities_does_not_matter(seed, order):
    (x, y), val = features(seed, 30), features(seed + 1, 20)
    one = bo.diagnose((x, y), val, seed=seed)
    other = bo.diagnose(({m: x[m] for m in order}, y), val, seed=seed)
    assert one.gap == other.gap
    assert other.modalities == tuple(order)


@few
@given(seeds, st.permutations(range(3)))
def test_names_of_classes_do_not_matter(seed, renamed):
    (x, y), (v, w) = features(seed, 30), features(seed + 1, 20)
    names = torch.tensor(renamed)
    one = bo.diagnose((x, y), (v, w), seed=seed)
    assert bo.diagnose((x, names[y]), (v, names[w]), seed=seed) == one


@few
@given(seeds, st.integers(-20, 20), st.floats(-100, 100, width=32))
def test_the_scale_of_features_does_not_matter(seed, exponent, shift):
    (x, y), val = features(seed, 30), features(seed + 1, 20)
    moved = {m: (z.double() + shift) * 2.0**exponent for m, z in x.items()}
    exact = {m: z.double() for m, z in x.items()}
    assert bo.diagnose((moved, y), val, seed=seed) == bo.diagnose((exact, y), val, seed=seed)


@few
@given(seeds)
def test_arguments_are_not_changed(seed):
    (x, y), (v, w) = features(seed, 30), features(seed + 1, 20)
    copies = [{m: z.clone() for m, z in part.items()} for part in (x, v)]
    bo.diagnose((x, y), (v, w), seed=seed)
    for part, copy in zip((x, v), copies, strict=True):
        assert all(torch.equal(part[m], copy[m]) for m in part)


# Classes of targets that are none

whole = st.lists(st.integers(-40, 40), min_size=8, max_size=50)
RISING = (lambda y: 3 * y - 7, lambda y: y**3, torch.exp, lambda y: y.clamp(min=0) * 9 + y)


def classes_of(train, val, rule, sizes=(50,)):
    """Classes of both splits, read in batches of other `sizes`."""
    reader = TargetReader(rule, as_loss(None), "here", -100)
    read = [torch.cat([reader.read(part)[0] for part in split.split(sizes[0])]) for split in (train, val)]
    fitted = fit_classes(reader.kinds, read[0], False)
    return [fitted.of(rows) for rows in read]


@few
@given(seeds, whole, whole, st.sampled_from(RISING))
def test_a_rising_function_of_the_targets_leaves_the_diagnosis_as_it_is(seed, train, val, rising):
    y, w = (torch.tensor(values, dtype=torch.float64) / 4 for values in (train, val))
    assume(y.unique().numel() > 1)
    draw = torch.Generator().manual_seed(seed)
    x, v = ({m: torch.randn(len(t), 2, generator=draw) for m in ("a", "b")} for t in (y, w))
    assume(len(classes_of(y, w, "quantiles")[0].unique()) <= len(w))
    found = bo.diagnose((x, y), (v, w), classes="quantiles", seed=seed)
    assert bo.diagnose((x, rising(y)), (v, rising(w)), classes="quantiles", seed=seed) == found


@given(seeds, whole, whole, st.integers(1, 9))
def test_bins_do_not_depend_on_the_order_or_the_batches_and_their_cuts_are_those_of_training(
    seed, train, val, size
):
    y, w = torch.tensor(train), torch.tensor(val)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    of_train, of_val = classes_of(y, w, "quantiles")
    again, of_some = classes_of(y[order], w[::2], "quantiles", (size,))
    assert torch.equal(again, of_train[order])
    assert torch.equal(of_some, of_val[::2])
    both, classes = torch.cat([y, w]), torch.cat([of_train, of_val])
    assert (classes[both.argsort()].diff() >= 0).all()
    assert all(len(classes[both == value].unique()) == 1 for value in both.unique())


rows_of_labels = st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=40)


@given(seeds, rows_of_labels, rows_of_labels)
def test_label_sets_do_not_depend_on_the_order_of_samples(seed, train, val):
    y, w = torch.tensor(train), torch.tensor(val)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    of_train, of_val = classes_of(y, w, "label-set")
    again, same = classes_of(y[order].float(), w.long(), "label-set", (3,))
    assert torch.equal(again, of_train[order])
    assert torch.equal(same, of_val)
    unseen = [row not in train for row in val]
    assert len(of_val[unseen].unique()) <= 1


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 60), seeds)
def test_balanced_keeps_as_many_of_each_class_as_it_can(labels, limit, seed):
    classes = torch.tensor(labels)
    keys = torch.rand(len(labels), generator=torch.Generator().manual_seed(seed))
    kept = balanced(classes, keys, limit)
    assert len(kept) == min(limit, len(labels))
    assert len(kept.unique()) == len(kept)
    counts = torch.bincount(classes[kept], minlength=5)
    totals = torch.bincount(classes, minlength=5)
    short = counts < totals
    assert not short.any() or int(counts[short].min()) >= int(counts.max()) - 1
