"""Samples in bounded memory: classes as equal as can be, the same whatever the batches."""

from __future__ import annotations

import pytest
import torch

from balanceopt.relearn._diagnosis import options
from balanceopt.relearn._features import Collector, Reservoir, Samples, balanced
from tests.relearning import OPTIONS


def collected(labels, limit, *, sizes=(7, 20), width=2):
    features = torch.arange(len(labels)).float()[:, None].expand(-1, width)
    collector = Collector(("a",), options(0, None, **{**OPTIONS, "max_samples": limit}), "here")
    at, i = 0, 0
    while at < len(labels):
        rows = slice(at, at + sizes[i % len(sizes)])
        collector.add({"a": features[rows]}, labels[rows])
        at, i = rows.stop, i + 1
    return collector.split().samples["a"]


@pytest.mark.parametrize("limit", [1, 10, 33, 90, 1000])
def test_classes_are_kept_as_equally_as_can_be(limit):
    labels = torch.tensor([0] * 80 + [1] * 5 + [2] * 30)
    kept = collected(labels[torch.randperm(115)], limit)
    counts = [int((kept.labels == c).sum()) for c in range(3)]
    assert sum(counts) == min(limit, 115)
    level = max(counts)
    for count, total in zip(counts, (80, 5, 30), strict=True):
        assert count >= min(total, level - 1)


@pytest.mark.parametrize("limit", [5, 24, 60])
def test_the_choice_does_not_depend_on_the_batches(limit):
    labels = torch.randint(4, (100,))
    first = collected(labels, limit, sizes=(100,))
    second = collected(labels, limit, sizes=(3, 11, 1))
    assert torch.equal(first.features, second.features)
    assert torch.equal(first.labels, second.labels)


def test_features_stay_with_their_labels_and_in_order():
    labels = torch.randint(4, (100,))
    kept = collected(labels, 40)
    rows = kept.features[:, 0].long()
    assert torch.equal(labels[rows], kept.labels)
    assert bool((rows[1:] > rows[:-1]).all())


def test_memory_is_bounded_while_samples_come_in():
    held = Reservoir(64)
    for _ in range(100):
        held.add(torch.zeros(8, 3), torch.randint(3, (8,)), torch.rand(8))
        assert sum(len(x) for x in held._features) <= 64 + 8
    assert held.samples().features.shape == (64, 3)


def test_all_equal_keys_still_choose():
    assert len(balanced(torch.zeros(9, dtype=torch.int64), torch.zeros(9), 4)) == 4


def test_widths_must_agree():
    held = Reservoir(64)
    held.add(torch.zeros(2, 3), torch.zeros(2), torch.rand(2))
    with pytest.raises(ValueError, match=r"same width in every batch\. Found 3 and 4"):
        held.add(torch.zeros(2, 4), torch.zeros(2), torch.rand(2))


def test_random_parts():
    whole = Samples(torch.arange(20.0)[:, None], torch.arange(20))
    one, two = whole.parts(8, 2, seed=1)
    assert len(one) == len(two) == len({*one.labels.tolist(), *two.labels.tolist()}) // 2 == 8
    for part in (one, two):
        assert torch.equal(part.features[:, 0], part.labels.float())
    assert torch.equal(one.labels, whole.parts(8, 2, seed=1)[0].labels)
    assert not torch.equal(one.labels, whole.parts(8, 2, seed=2)[0].labels)
    assert all(part is whole for part in whole.parts(20, 3, seed=1))
