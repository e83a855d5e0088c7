"""Which way to uni-modal logits is taken, what `stats()` and `repr` say, and what the constructor refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import balanceopt as bo
from balanceopt.monitor import require_scores
from tests.models import FUSIONS, PER_HEAD, SPLIT, Concat, Gated, SumHeads, batch, train_step, watch
from tests.unit.monitor.helpers import no_hooks, step


@pytest.mark.parametrize("fusion", FUSIONS)
def test_auto_takes_the_first_that_is_exact_and_says_which(fusion):
    expected = "split" if fusion in SPLIT else "per-head" if fusion in PER_HEAD else "zero-out"
    model = FUSIONS[fusion](3)
    with watch(model) as monitor:
        assert step(monitor, model, *batch(8, 3)) is not None
        assert monitor.stats()["scores"] == expected
        assert f"scores={expected!r}" in repr(monitor)


def test_before_the_first_pass_auto_says_that_it_does_not_know():
    with watch(Concat()) as monitor:
        assert monitor.stats()["scores"] == "auto"
        expected = "ModalityMonitor(modalities=['audio', 'visual'], scores='auto', labels='auto')"
        assert repr(monitor) == expected


def test_stats_of_a_few_passes():
    model = Concat()
    with watch(model) as monitor:
        scores = monitor.scores()
        inputs, labels = batch(8)
        for _ in range(2):
            train_step(model, inputs, labels)
        monitor.observe(labels)
        train_step(model, inputs, labels)
        model(*inputs)
        train_step(model, *batch(0))
        scores.take()
        assert monitor.stats() == {
            "scores": "split",
            "passes": 4,
            "passes_without_scores": 1,
            "labels": {"observe": 1, "gradient": 2},
            "recovered_labels": {"rows": 16, "ambiguous": 0},
            "missing": {"audio": 0, "visual": 0},
        }


def test_no_head_is_features_only():
    model = Concat()
    with bo.ModalityMonitor(model, model.modalities) as monitor:
        scores = monitor.scores()
        train_step(model, *batch(8))
        assert scores.take() is None
        assert monitor.stats()["scores"] is None
        assert "scores='features only'" in repr(monitor)
        with pytest.raises(ValueError, match=r"OGM needs uni-modal scores. Build the monitor with `head=`"):
            require_scores(monitor, "OGM")


def test_a_single_modality():
    model = Concat(1)
    with watch(model) as monitor:
        sums = step(monitor, model, *batch(8, 1))
    assert sums is not None
    assert sums.count.tolist() == [8]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scores": "exact"}, ValueError, "or a function. Found scores = 'exact'"),
        ({"labels": "guess"}, ValueError, "Found labels = 'guess'"),
        ({"select": {"smell": lambda x: x}}, ValueError, r"Found also \['smell'\]"),
        ({"head": "nowhere"}, ValueError, "`head` should name a module of Concat"),
        ({"head": nn.Linear(8, 5)}, ValueError, "Found a Linear outside of it"),
        ({"head": 3}, TypeError, "`head` should be a module or the dotted name of one. Found 3"),
        (
            {"head": "encoders.audio"},
            ValueError,
            "`head` should come after the encoders. Found .* of 'audio'",
        ),
        (
            {"head": "encoders.audio.0"},
            ValueError,
            "`head` should come after the encoders. Found .* of 'audio'",
        ),
        ({"head": None, "scores": "split"}, ValueError, "`scores='split'` needs `head=`"),
        ({"slices": {"smell": slice(0, 4)}}, ValueError, r"Found also \['smell'\]"),
    ],
)
def test_refused(options, error, message):
    model = Concat()
    with pytest.raises(error, match=message):
        watch(model, **options)
    assert no_hooks(model)


def test_slices_without_a_linear_head():
    with pytest.raises(ValueError, match="`slices` go with one linear head"):
        watch(SumHeads(), slices={"audio": slice(0, 4), "visual": slice(4, 8)})


def test_split_needs_a_linear_head():
    model = Gated()
    model.head = nn.Sequential(model.head)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"needs a linear head. Found Sequential"):
        watch(model, scores="split")


def test_an_own_head_inside_its_own_encoder():
    """Late fusion of whole uni-modal classifiers."""
    model = nn.ModuleDict({m: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)) for m in "ab"})
    with bo.ModalityMonitor(model, {"a": "a", "b": "b"}, {"a": "a.2", "b": "b.2"}) as monitor:
        scores = monitor.scores()
        x, labels = torch.randn(8, 3), torch.randint(5, (8,))
        nn.functional.cross_entropy(model["a"](x) + model["b"](x), labels).backward()
        assert scores.take() is not None
    with pytest.raises(ValueError, match=r"`head\['a'\]` should come after"):
        bo.ModalityMonitor(model, {"a": "a", "b": "b"}, {"a": "b.2", "b": "a.2"})
