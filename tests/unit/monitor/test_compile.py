"""torch.compile: attached before the first call it fires; attached after, it says so."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter

import balanceopt as bo
from tests.models import Concat, Gated, SumHeads, batch, compiled, watch
from tests.unit.monitor.helpers import Spy, flat, sums_of

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's own


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def train(model, inputs, labels):
    F.cross_entropy(model(*inputs), labels).backward()


@pytest.mark.parametrize(
    ("make", "how"),
    [
        *((Gated, how) for how in ("wrapped before", "wrapped after", "in place before", "in place after")),
        (Concat, "wrapped after"),
        (SumHeads, "in place before"),
    ],
)
def test_compiled_before_the_first_call(make, how):
    """Before or after: the model's wrapping relative to the monitor's building."""
    model = make()
    inputs, labels = batch()
    expected = sums_of(model, inputs, labels)
    runs = model
    if how == "in place before":
        model.compile(backend="eager")
    elif how == "wrapped before":
        runs = compiled(model)
    monitor = bo.ModalityMonitor(runs, model.modalities, model.heads)
    if how == "in place after":
        model.compile(backend="eager")
    elif how == "wrapped after":
        runs = compiled(model)
    scores, spy = monitor.scores(), Spy(monitor)
    for _ in range(3):
        train(runs, inputs, labels)
        sums = scores.take()
        assert sums is not None
        assert expected is not None
        torch.testing.assert_close(flat(sums), flat(expected))
    assert len(spy.passes) == 3
    monitor.remove()
    train(runs, inputs, labels)
    assert len(spy.passes) == 3


def test_modes_switch_between_compiled_calls():
    model = Concat()
    runs = compiled(model)
    inputs, labels = batch()
    with watch(model) as monitor:
        scores = monitor.scores()
        for _ in range(2):
            model.train()
            train(runs, inputs, labels)
            assert scores.take() is not None
            model.eval()
            with torch.no_grad():
                runs(*inputs)
            assert scores.take() is None


def test_compiled_encoders():
    model = Concat()
    inputs, labels = batch()
    expected = sums_of(model, inputs, labels)
    for name in model.names:
        model.encoders[name] = compiled(model.encoders[name])
    found = sums_of(model, inputs, labels)
    assert found is not None
    assert expected is not None
    torch.testing.assert_close(flat(found), flat(expected))


@pytest.mark.parametrize("scores", ["auto", "split", "zero-out"])
def test_a_compiled_head(scores):
    model = Concat()
    inputs, labels = batch()
    expected = sums_of(model, inputs, labels, scores=scores)
    model.head = compiled(model.head)
    found = sums_of(model, inputs, labels, scores=scores)
    assert found is not None
    assert expected is not None
    torch.testing.assert_close(flat(found), flat(expected))


def test_a_compiled_loss_with_a_watched_loss_module():
    model = Concat()
    criterion = nn.CrossEntropyLoss()
    counter = CompileCounter()
    inputs, labels = batch()
    with watch(model, loss=criterion) as monitor:
        scores = monitor.scores()
        loss = torch.compile(lambda logits, y: criterion(logits, y), backend=counter)
        for _ in range(2):
            loss(model(*inputs), labels).backward()
            sums = scores.take()
            assert sums is not None
            assert sums.label_counts.tolist() == torch.bincount(labels, minlength=5).tolist()
        assert monitor.stats()["labels"] == {"loss": 2}


def test_graph_breaks_are_few():
    """The hooks cost breaks, not recompilations: after the first step nothing is compiled again."""
    model = Concat()
    counter = CompileCounter()
    runs = torch.compile(model, backend=counter)
    with watch(model) as monitor:
        scores = monitor.scores()
        frames = []
        for _ in range(4):
            train(runs, *batch())
            scores.take()
            frames.append(counter.frame_count)
    assert frames[0] <= 8
    assert frames[1] == frames[2] == frames[3]


@pytest.mark.parametrize("how", ["wrapper", "in place"])
def test_built_after_the_first_compiled_call(how):
    """Compiled code does not look for new hooks; where they do not fire, `silence()` tells the cure."""
    model = Concat()
    if how == "wrapper":
        runs = compiled(model)
    else:
        model.compile(backend="eager")
        runs = model
    inputs, labels = batch()
    train(runs, inputs, labels)
    with bo.ModalityMonitor(runs, model.modalities, model.head) as monitor:
        scores = monitor.scores()
        train(runs, inputs, labels)
        if scores.take() is None:
            assert "build the monitor before the first call of the compiled model" in monitor.silence()
            torch._dynamo.reset()
            train(runs, inputs, labels)
            assert scores.take() is not None


def test_a_full_graph_is_an_error_that_says_what_to_do():
    model = Concat()
    runs = compiled(model, fullgraph=True)
    inputs, labels = batch()
    with watch(model) as monitor:
        monitor.scores()
        gives_reasons = "reason" in inspect.signature(torch.compiler.disable).parameters  # since torch 2.8
        match = "without fullgraph=True" if gives_reasons else "WeakHook"
        with pytest.raises(torch._dynamo.exc.Unsupported, match=match):
            train(runs, inputs, labels)
