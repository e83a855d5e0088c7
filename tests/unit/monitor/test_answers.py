"""Which tensor of a head's output holds the logits, and where the classes are in it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import balanceopt as bo
from tests.unit.monitor.helpers import Spy

B, C = 8, 3


class Official(nn.Module):
    """A model that returns its features beside the logits, as the published ones do."""

    def __init__(self, answer=lambda a, b, out: (a, b, out)):
        super().__init__()
        self.first, self.second, self.fc = nn.Linear(5, 4), nn.Linear(6, 4), nn.Linear(8, C)
        self.answer = answer

    def forward(self, a, b):
        a, b = self.first(a), self.second(b)
        return self.answer(a, b, self.fc(torch.cat([a, b], 1)))


def watched(model, head, **options):
    return bo.ModalityMonitor(model, {"a": model.first, "b": model.second}, head, **options)


def test_the_logits_are_the_tensor_made_of_every_modality():
    model = Official()
    inputs, labels = (torch.randn(B, 5), torch.randn(B, 6)), torch.randint(C, (B,))
    taken = {}
    for head in (model, model.fc):
        with watched(model, head, scores="zero-out") as monitor:
            scores = monitor.scores()
            F.cross_entropy(model(*inputs)[2], labels).backward()
            taken[head] = scores.take()
    torch.testing.assert_close(taken[model].score, taken[model.fc].score)


@pytest.mark.parametrize(
    "answer",
    [
        lambda a, b, out: (out, out * 2),
        lambda a, b, out: (out.detach(), a),
        lambda a, b, out: {"logits_per_image": a @ b.T, "logits_per_text": b @ a.T},
    ],
)
def test_logits_that_can_not_be_told_are_refused(answer):
    model = Official(answer)
    with (
        watched(model, model),
        pytest.raises(ValueError, match=r"returns several tensors .*which are the logits"),
    ):
        model(torch.randn(B, 5), torch.randn(B, 6))


def test_heads_of_different_widths_are_refused():
    class TwoTasks(Official):
        def __init__(self):
            super().__init__()
            self.x, self.y = nn.Linear(4, 3), nn.Linear(4, 5)

        def forward(self, a, b):
            return self.x(self.first(a)), self.y(self.second(b))

    model = TwoTasks()
    monitor = watched(model, {"a": model.x, "b": model.y})
    with monitor, pytest.raises(ValueError, match=r"heads of the same classes"):
        model(torch.randn(B, 5), torch.randn(B, 6))


class Temporal(nn.Module):
    """Class scores for each time step: classes along dimension 1 or last, by layers that tell, or by none that do."""

    def __init__(self, kind, first):
        super().__init__()
        self.first, self.second = nn.Conv1d(5, 4, 1), nn.Conv1d(6, 4, 1)
        self.conv = nn.Conv1d(8, C, 1)
        self.kind, self.classes_first = kind, first
        self.head = nn.Sequential(nn.ReLU(), self.conv) if kind == "sequential" else Last(self.conv, first)

    def forward(self, a, b):
        return self.head(torch.cat([self.first(a), self.second(b)], 1))


class Last(nn.Module):
    def __init__(self, conv, first):
        super().__init__()
        self.conv, self.classes_first = conv, first

    def forward(self, x):
        logits = self.conv(x.relu())
        return logits if self.classes_first else logits.transpose(1, 2)


@pytest.mark.parametrize("observed", [False, True])
@pytest.mark.parametrize("steps", [C, 7])
@pytest.mark.parametrize(("kind", "first"), [("sequential", True), ("module", True), ("module", False)])
def test_classes_are_found_in_dense_outputs(kind, first, steps, observed):
    model = Temporal(kind, first)
    inputs, labels = (torch.randn(B, 5, steps), torch.randn(B, 6, steps)), torch.randint(C, (B, steps))
    with watched(model, model.head) as monitor:
        spy = Spy(monitor)
        for _ in range(2):
            model.zero_grad()
            logits = model(*inputs)
            if observed:
                monitor.observe(labels)
            F.cross_entropy(logits if first else logits.transpose(1, 2), labels).backward()
            sums = spy.scores.take()
            assert sums is not None
            a = torch.cat([model.first(inputs[0]), torch.zeros(B, 4, steps)], 1)
            alone = model.conv(a.relu()).log_softmax(1)
            expected = alone.gather(1, labels[:, None]).mean((1, 2)).exp().sum()
            torch.testing.assert_close(sums.score[0], expected)
            assert sums.count.tolist() == [B, B]
