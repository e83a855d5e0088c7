"""What holds of every diagnosis, whatever the features."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import balanceopt as bo
from balanceopt.relearn._features import balanced

seeds = st.integers(0, 2**16)


def features(seed: int, rows: int, names: tuple[str, ...] = ("a", "b", "c"), classes: int = 3):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(classes), torch.randint(classes, (rows - classes,), generator=draw)])
    shown = torch.nn.functional.one_hot(labels, classes).float()
    return {m: 2 * i * shown + torch.randn(rows, 3, generator=draw) for i, m in enumerate(names)}, labels


@given(seeds, st.integers(6, 40), st.integers(6, 40), st.floats(0, 20))
def test_ranges(seed, rows, held, lam):
    found = bo.diagnose(features(seed, rows), features(seed + 1, held), lam=lam, seed=seed)
    for name in found.modalities:
        assert 1 / 3 <= found.train_purity[name] <= 1
        assert found.gap[name] == abs(found.train_purity[name] - found.val_purity[name])
        assert found.strength[name] == pytest.approx(math.tanh(lam * found.gap[name]))


@given(seeds, st.permutations(["a", "b", "c"]))
def test_the_order_of_modalities_does_not_matter(seed, order):
    (x, y), val = features(seed, 30), features(seed + 1, 20)
    one = bo.diagnose((x, y), val, seed=seed)
    other = bo.diagnose(({m: x[m] for m in order}, y), val, seed=seed)
    assert one.gap == other.gap
    assert other.modalities == tuple(order)


@given(seeds, st.permutations(range(3)))
def test_names_of_classes_do_not_matter(seed, renamed):
    (x, y), (v, w) = features(seed, 30), features(seed + 1, 20)
    names = torch.tensor(renamed)
    one = bo.diagnose((x, y), (v, w), seed=seed)
    assert bo.diagnose((x, names[y]), (v, names[w]), seed=seed) == one


@given(seeds, st.integers(-20, 20), st.floats(-100, 100, width=32))
def test_the_scale_of_features_does_not_matter(seed, exponent, shift):
    (x, y), val = features(seed, 30), features(seed + 1, 20)
    moved = {m: (z.double() + shift) * 2.0**exponent for m, z in x.items()}
    exact = {m: z.double() for m, z in x.items()}
    assert bo.diagnose((moved, y), val, seed=seed) == bo.diagnose((exact, y), val, seed=seed)


@given(seeds)
def test_arguments_are_not_changed(seed):
    (x, y), (v, w) = features(seed, 30), features(seed + 1, 20)
    copies = [{m: z.clone() for m, z in part.items()} for part in (x, v)]
    bo.diagnose((x, y), (v, w), seed=seed)
    for part, copy in zip((x, v), copies, strict=True):
        assert all(torch.equal(part[m], copy[m]) for m in part)


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
