"""Diagnosis and diagnose: numbers, table, options, bad input."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

import balanceopt as bo
from tests.models import Concat, watch
from tests.relearning import loaders, random_streams, scheduled, weights


def given(train_spread=0.3, val_spread=0.3, *, rows=(90, 60), classes=3, width=4, seed=0):
    """Features of each class around a point of its own, in two modalities, the second mere noise."""
    draw = torch.Generator().manual_seed(seed)
    centres = 4 * torch.randn(classes, width, generator=draw)
    parts = []
    for count, spread in zip(rows, (train_spread, val_spread), strict=True):
        labels = torch.arange(count) % classes
        near = centres[labels] + spread * torch.randn(count, width, generator=draw)
        parts.append(({"near": near, "noise": torch.randn(count, width, generator=draw)}, labels))
    return parts


class TestNumbers:
    def test_separable_features_are_pure(self):
        found = bo.diagnose(*given(), seed=0)
        assert (found.train_purity["near"], found.val_purity["near"], found.gap["near"]) == (1, 1, 0)
        assert found.train_purity["noise"] < 0.7
        assert found.num_clusters == 3
        assert found.train_count == found.val_count == {"near": 60, "noise": 60}
        everything = bo.diagnose(*given(), seed=0, equal_counts=False)
        assert everything.train_count == {"near": 90, "noise": 90}
        assert everything.val_count == {"near": 60, "noise": 60}

    def test_an_overfitted_encoder_has_the_largest_gap(self):
        found = bo.diagnose(*given(0.1, 8.0), seed=0, lam=3.0)
        assert found.largest_gap == "near"
        assert found.strength["near"] == pytest.approx(math.tanh(3 * found.gap["near"]))

    def test_equal_features_have_no_gap(self):
        train, _ = given()
        assert set(bo.diagnose(train, train, seed=5).gap.values()) == {0.0}

    def test_the_same_seed_gives_the_same(self):
        train, val = given(2.0, 3.0)
        assert bo.diagnose(train, val, seed=1) == bo.diagnose(train, val, seed=1)

    def test_half_precision_is_clustered_in_single(self):
        train, val = given(1.0, 2.0)
        halves = [({m: z.half() for m, z in x.items()}, y) for x, y in (train, val)]
        singles = [({m: z.half().float() for m, z in x.items()}, y) for x, y in (train, val)]
        assert bo.diagnose(*halves, seed=0) == bo.diagnose(*singles, seed=0)

    def test_of_a_loader(self):
        model = Concat()
        before, streams = weights(model), random_streams()
        found = bo.diagnose(*loaders(shuffle=True), monitor=watch(model), seed=0)
        assert found.modalities == ("audio", "visual")
        assert random_streams() == streams
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())

    def test_is_that_of_a_scheduler(self):
        _, _, scheduler = scheduled(lam=4.0)
        monitor = scheduler.monitor
        alone = bo.diagnose(scheduler.train_loader, scheduler.val_loader, monitor=monitor, lam=4.0, seed=0)
        assert scheduler.diagnose() == alone
        assert scheduler.step() == dataclasses.replace(alone, epoch=1)


class TestNoise:
    @pytest.mark.parametrize("rows", [(600, 30), (90, 60)])
    def test_its_gap_is_that_of_other_noise(self, rows):
        gaps, expected = [], []
        for seed in range(12):
            parts = given(rows=rows, classes=10, seed=seed)
            found = bo.diagnose(*parts, seed=seed, equal_counts=False)
            gaps.append(found.gap["noise"])
            expected.append(found.noise_gap["noise"])
        # Both are means of 12 of the same quantity: five standard errors of their difference.
        spread = 5 * math.sqrt((torch.tensor(gaps).var() + torch.tensor(expected).var()) / 12)
        assert abs(sum(gaps) - sum(expected)) / 12 <= spread

    def test_a_gap_of_noise_is_said(self):
        parts = given(rows=(600, 30), classes=10)
        with pytest.warns(UserWarning, match=r"'noise' 0\.\d+, where noise gives 0\.\d+ in the mean") as said:
            found = bo.diagnose(*parts, seed=0, equal_counts=False)
        assert f"'noise' {found.gap['noise']:.3f}" in str(said[0].message)
        assert f"gives {found.noise_gap['noise']:.3f}" in str(said[0].message)

    def test_a_gap_beyond_it_is_not(self, recwarn):
        train, val = given(0.1, 8.0)
        parts = [({"near": x["near"]}, y) for x, y in (train, val)]
        found = bo.diagnose(*parts, seed=0)
        assert found.gap["near"] > 2 * found.noise_gap["near"]
        assert not recwarn.list

    def test_no_gap_is_none(self, recwarn):
        train, _ = given()
        found = bo.diagnose(train, train, seed=0)
        assert found.largest_gap is None
        assert "largest gap" not in str(found)
        assert not recwarn.list


def test_a_one_sided_gap_is_none_where_validation_samples_are_purer():
    purer, blurred = given(0.1, 8.0)
    for parts in ((purer, blurred), (blurred, purer)):
        both = bo.diagnose(*parts, seed=0)
        one = bo.diagnose(*parts, seed=0, gap="one-sided")
        for name in both.modalities:
            difference = both.train_purity[name] - both.val_purity[name]
            assert both.gap[name] == abs(difference)
            assert one.gap[name] == max(0, difference)
            assert one.strength[name] == pytest.approx(math.tanh(3 * one.gap[name]))


class TestOptions:
    def test_normalize(self):
        # One feature's unit drowns the telling ones unless features are scaled.
        parts = given()
        for x, _ in parts:
            x["near"] = torch.cat([x["near"], 1e3 * torch.rand(len(x["near"]), 1)], 1)
        assert bo.diagnose(*parts, seed=0).train_purity["near"] > 0.9
        assert bo.diagnose(*parts, seed=0, normalize="none").train_purity["near"] < 0.7

    def test_n_init(self):
        assert bo.diagnose(*given(), n_init=8, seed=0).train_purity["near"] == 1

    def test_classes(self):
        (x, y), (v, w) = given()
        targets = [(x, y.double() / 4), (v, w.double() / 4)]
        with pytest.raises(ValueError, match=r"class index each. Found dtype torch.float64: pass `classes=`"):
            bo.diagnose(*targets, seed=0)
        found = bo.diagnose(*targets, seed=0, classes=lambda labels: (4 * labels).long())
        of_labels = bo.diagnose((x, y), (v, w), seed=0)
        assert found == dataclasses.replace(of_labels, classes=found.classes)
        one_hot = [(x, torch.nn.functional.one_hot(y)), (v, torch.nn.functional.one_hot(w))]
        assert found == bo.diagnose(*one_hot, seed=0, classes=lambda labels: labels.argmax(1))

    def test_classes_are_those_of_both_splits(self):
        (x, y), val = given()
        seen = y < 2
        train = ({m: z[seen] for m, z in x.items()}, y[seen])
        assert bo.diagnose(train, val).num_clusters == 3

    def test_equal_counts(self):
        for rows in ((300, 30), (30, 300)):
            found = bo.diagnose(*given(rows=rows))
            assert found.train_count == found.val_count == {"near": 30, "noise": 30}

    def test_unequal_counts_alone_make_a_gap_and_equal_ones_do_not(self):
        gaps = {False: 0.0, True: 0.0}
        for seed in range(10):
            parts = given(rows=(600, 30), classes=10, seed=seed)
            for equal in gaps:
                gaps[equal] += bo.diagnose(*parts, seed=seed, equal_counts=equal).gap["noise"] / 10
        assert gaps[False] > 3 * gaps[True]

    def test_max_samples(self):
        found = bo.diagnose(*given(rows=(300, 30)), max_samples=60, equal_counts=False)
        assert found.train_count["near"] == 60

    def test_ignored_labels(self):
        (x, y), val = given()
        y = torch.where(torch.arange(90) < 30, -100, y)
        assert bo.diagnose((x, y), val).train_count["near"] == 60

    def test_feature_maps_are_pooled(self):
        (x, y), val = given()
        maps = {m: z[:, :, None, None].expand(-1, -1, 3, 3) for m, z in x.items()}
        assert bo.diagnose((maps, y), val, seed=0) == bo.diagnose((x, y), val, seed=0)


def without_loaders(**options):
    model, optimizer, scheduler = scheduled(**options)
    return (
        model,
        optimizer,
        bo.ReLearnScheduler(
            optimizer, scheduler.monitor, None, None, **{"every": 1, "epochs": 99, **options}
        ),
    )


class TestGivenToTheScheduler:
    def test_each_step(self):
        _, _, scheduler = without_loaders()
        train, val = [({"audio": x["near"], "visual": x["noise"]}, y) for x, y in given(0.1, 8.0)]
        found = scheduler.step(train=train, val=val)
        assert found.gap["audio"] > found.gap["visual"]

    def test_none_are_needed_when_it_does_not_fire(self):
        _, _, scheduler = without_loaders(every=2)
        assert scheduler.step() is None
        with pytest.raises(ValueError, match=r"call step\(train=\(features, labels\)"):
            scheduler.step()
        assert scheduler.last_epoch == 1

    def test_unknown_modalities_are_refused(self):
        _, _, scheduler = without_loaders()
        with pytest.raises(KeyError, match="Found \\['near', 'noise'\\]"):
            scheduler.step(train=given()[0], val=given()[1])


class TestBadInput:
    def test_loaders_need_a_monitor(self):
        with pytest.raises(TypeError, match="pass `monitor=`"):
            bo.diagnose(*loaders())

    def test_nothing_given(self):
        with pytest.raises(ValueError, match="no training features"):
            bo.diagnose(({"a": torch.empty(0, 3)}, torch.empty(0, dtype=torch.int64)), given()[1])

    def test_one_class(self):
        (x, y), (v, w) = given()
        with pytest.raises(ValueError, match=r"two classes or more. Found only \[0\]"):
            bo.diagnose((x, 0 * y), (v, 0 * w))

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_features_that_are_not_finite(self, bad):
        train, val = given(0.1, 8.0)
        val[0]["noise"][3, 1] = bad
        with pytest.warns(UserWarning, match="'noise' was left out"):
            found = bo.diagnose(train, val)
        assert set(found.skipped) == {"noise"}
        assert found.strength["noise"] == 0
        assert found.largest_gap == "near"
        assert "noise     skipped: its features are not finite" in str(found)

    def test_widths_that_differ(self):
        train, val = given()
        val[0]["noise"] = val[0]["noise"][:, :2]
        with pytest.warns(UserWarning, match="more than one width"):
            assert set(bo.diagnose(train, val).skipped) == {"noise"}

    def test_integers_are_numbers(self):
        train, val = given()
        for features, _ in (train, val):
            features["noise"] = (10 * features["noise"]).round()
        expected = bo.diagnose(train, val, seed=0)
        for features, _ in (train, val):
            features["noise"] = features["noise"].long()
        assert bo.diagnose(train, val, seed=0) == expected

    def test_a_modality_of_one_split_only(self):
        train, val = given()
        del val[0]["noise"]
        with pytest.warns(UserWarning, match="90 training and 0 validation samples"):
            assert set(bo.diagnose(train, val).skipped) == {"noise"}

    def test_constant_features_have_the_purity_of_chance(self):
        (x, y), (v, w) = given(rows=(90, 90))
        x["noise"], v["noise"] = torch.zeros(90, 2), torch.zeros(90, 2)
        found = bo.diagnose((x, y), (v, w))
        assert found.train_purity["noise"] == pytest.approx(1 / 3)


class TestTable:
    def test_lines(self):
        lines = str(bo.diagnose(*given(0.1, 8.0), seed=0)).splitlines()
        assert lines[0].split("  ")[0] == "modality"
        assert len({len(line) for line in lines[:3]}) == 1
        assert lines[1].endswith("60 + 60")
        assert lines[3:] == ["3 classes: the labels", "largest gap: near"]

    def test_frozen(self):
        found: Any = bo.diagnose(*given())
        with pytest.raises(dataclasses.FrozenInstanceError):
            found.gap = {}

    def test_all_skipped(self):
        train, val = given(rows=(90, 2))
        with pytest.warns(UserWarning, match="left out"):
            found = bo.diagnose(train, val)
        assert found.largest_gap is None
        assert len(str(found).splitlines()) == 4
