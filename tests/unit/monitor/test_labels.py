"""Where a pass's labels come from: observed, a loss module, the model's own keyword, the gradient at the logits."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import balanceopt as bo
from tests.models import BatchDict, Concat, HuggingFaceStyle, Tokens, batch, train_step, watch
from tests.unit.monitor.helpers import Spy


def counts_of(labels, classes=5):
    return torch.bincount(labels[labels >= 0], minlength=classes).float().tolist()


def taken(monitor, run):
    """What one pass gives."""
    scores = monitor.scores()
    run()
    sums = scores.take()
    scores.remove()
    assert sums is not None
    return sums


def wrong(labels):
    """Labels that differ from the loss's everywhere."""
    return (labels + 1) % 5


def wrong_at(labels, row):
    """Labels that differ from the loss's in one row, which refutes none of them."""
    changed = labels.clone()
    changed[row] = (changed[row] + 1) % 5
    return changed


# observe


@pytest.mark.parametrize("when", ["before forward", "after forward", "after backward"])
@pytest.mark.parametrize("kind", [lambda y: y, lambda y: y.tolist(), lambda y: y.numpy(), lambda y: y.int()])
def test_observed_labels_at_any_time(when, kind):
    model = Concat()
    with watch(model) as monitor:
        scores = monitor.scores()
        for _ in range(3):
            inputs, labels = batch(6)
            given = kind(wrong(labels))
            if when == "before forward":
                monitor.observe(given)
            loss = F.cross_entropy(model(*inputs), labels)
            if when == "after forward":
                monitor.observe(given)
            loss.backward()
            if when == "after backward":
                monitor.observe(given)
            sums = scores.take()
            assert sums is not None
            assert sums.label_counts.tolist() == counts_of(wrong(labels))
        assert monitor.stats()["labels"] == {"observe": 3}
        assert monitor.stats()["recovered_labels"] == {"rows": 0, "ambiguous": 0}


def observed(model, monitor, inputs, buffer):
    monitor.observe(buffer)
    F.cross_entropy(model(*inputs), buffer.clone()).backward()


def through_the_loss(model, monitor, inputs, buffer):
    criterion = nn.CrossEntropyLoss()
    monitor.watch_loss(criterion)
    criterion(model(*inputs), buffer).backward()


def through_the_model(model, monitor, inputs, buffer):
    F.cross_entropy(model(*inputs, labels=buffer), buffer.clone()).backward()


class Labelled(Concat):
    def forward(self, *inputs, labels=None):
        return super().forward(*inputs)


@pytest.mark.parametrize("run", [observed, through_the_loss, through_the_model])
def test_a_buffer_of_labels_may_be_reused(run):
    model = Labelled()
    inputs, labels = batch(6)
    buffer = labels.clone()
    with watch(model) as monitor:
        scores = monitor.scores()
        run(model, monitor, inputs, buffer)
        buffer.copy_(wrong(labels))
        sums = scores.take()
    assert sums is not None
    assert sums.label_counts.tolist() == counts_of(labels)
    assert "gradient" not in monitor.stats()["labels"]


def test_a_buffer_of_flags_may_be_reused():
    model = Concat()
    inputs, labels = batch(6)
    flags = torch.tensor([True, False] * 3)
    with watch(model) as monitor:
        scores = monitor.scores()
        monitor.observe(labels, present={"audio": flags})
        train_step(model, inputs, labels)
        flags.fill_(True)
        sums = scores.take()
    assert sums is not None
    assert sums.count.tolist() == [3, 6]


def test_observed_labels_of_micro_batches():
    model = Concat()
    with watch(model) as monitor:
        scores = monitor.scores()
        expected = torch.zeros(5)
        for size in (3, 5, 4):
            inputs, labels = batch(size)
            F.cross_entropy(model(*inputs), labels).backward()
            monitor.observe(wrong(labels))
            expected += torch.bincount(wrong(labels), minlength=5)
        sums = scores.take()
        assert sums is not None
        assert sums.label_counts.tolist() == expected.tolist()


def test_soft_labels():
    model = Concat()
    with watch(model) as monitor:
        spy = Spy(monitor)
        scores = monitor.scores()
        inputs, labels = batch(6)
        soft = 0.7 * F.one_hot(labels, 5) + 0.3 * F.one_hot(labels.flip(0), 5)
        monitor.observe(soft)
        F.cross_entropy(model(*inputs), soft).backward()
        sums = scores.take()
    assert sums is not None
    expected = (spy.unimodal[0]["audio"].log_softmax(1) * soft).sum(1).exp().sum()  # geometric mean
    assert sums.score[0].item() == pytest.approx(float(expected), rel=1e-5)
    assert sums.count.tolist() == [6, 6]


def test_soft_labels_for_each_position():
    model = Concat(encoder=Tokens)
    inputs, _ = batch(4)
    soft = torch.rand(4, 3, 5).softmax(-1)
    with watch(model) as monitor:
        monitor.observe(soft)
        scores = monitor.scores()
        F.cross_entropy(model(*inputs).flatten(0, 1), soft.flatten(0, 1)).backward()
        sums = scores.take()
    assert sums is not None
    assert sums.count.tolist() == [4, 4]
    torch.testing.assert_close(sums.label_counts, soft.sum((0, 1)) / 3)


@pytest.mark.parametrize("ignore_index", [-100, 255, 0])
def test_ignored_samples(ignore_index):
    model = Concat()
    inputs, labels = batch(8)
    labels = labels.clamp(min=1)
    given = labels.clone()
    given[:3] = ignore_index
    with watch(model, ignore_index=ignore_index) as monitor:
        monitor.observe(given)
        sums = taken(monitor, lambda: train_step(model, inputs, labels))
        assert sums.count.tolist() == [5, 5]
        assert sums.label_counts.tolist() == counts_of(labels[3:])


def test_all_samples_ignored():
    model = Concat()
    with watch(model) as monitor:
        scores = monitor.scores()
        inputs, _ = batch(4)
        monitor.observe(torch.full((4,), -100))
        model(*inputs).sum().backward()
        sums = scores.take()
        assert sums is not None
        assert not sums.present.any()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            torch.zeros(5, dtype=torch.long),
            r"one entry for each of the 8 rows of the logits. Found shape \(5,\)",
        ),
        (torch.zeros(8, 3), r"one entry for each of the head's outputs, of shape \(8, 5\)"),
        (torch.full((8,), 5), r"lie in \[0, 5\)"),
        (torch.full((8,), 0.5), "class indices of shape"),
    ],
)
def test_labels_that_do_not_fit_are_an_error_when_they_are_used(labels, message):
    model = Concat()
    with watch(model) as monitor:
        scores = monitor.scores()
        monitor.observe(labels)
        train_step(model, *batch(8))
        with pytest.raises(ValueError, match=message):
            scores.take()
        assert scores.take() is None


def test_only_observed_labels_where_asked_for():
    model = Concat()
    with watch(model, labels="observe") as monitor:
        scores = monitor.scores()
        train_step(model, *batch(8))
        assert scores.take() is None
        assert monitor.stats()["passes_without_scores"] == 1
        assert "no labels or no features came with the pass: call monitor.observe" in monitor.silence()
        monitor.observe(torch.zeros(8, dtype=torch.long))
        assert taken(monitor, lambda: train_step(model, *batch(8))).count.tolist() == [8, 8]


def test_reset_forgets_what_was_observed_for_the_next_pass():
    model = Concat()
    with watch(model) as monitor:
        inputs, labels = batch(8)
        monitor.observe(wrong(labels))
        monitor.reset()
        sums = taken(monitor, lambda: train_step(model, inputs, labels))
        assert sums.label_counts.tolist() == counts_of(labels)


# A watched loss module


@pytest.mark.parametrize(
    "criterion",
    [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(label_smoothing=0.2),
        nn.CrossEntropyLoss(weight=torch.tensor([0.0, 1.0, 1.0, 2.0, 3.0])),
    ],
)
def test_labels_of_the_loss_module(criterion):
    model = Concat()
    inputs, labels = batch(8)
    with watch(model) as monitor:
        monitor.watch_loss(criterion)
        sums = taken(monitor, lambda: criterion(model(*inputs), labels).backward())
        assert sums.label_counts.tolist() == counts_of(labels)
        assert monitor.stats()["labels"] == {"loss": 1}
    assert not criterion._forward_hooks


def test_ignore_index_of_the_loss_module():
    criterion = nn.CrossEntropyLoss(ignore_index=2)
    model = Concat()
    inputs, labels = batch(8)
    labels[:4] = 2
    with watch(model) as monitor:
        monitor.watch_loss(criterion)
        sums = taken(monitor, lambda: criterion(model(*inputs), labels).backward())
    assert sums.count.tolist() == [int((labels != 2).sum())] * 2


def test_labels_given_by_keyword():
    criterion = nn.CrossEntropyLoss()
    model = Concat()
    inputs, labels = batch(8)
    with watch(model, loss=criterion) as monitor:
        sums = taken(monitor, lambda: criterion(input=model(*inputs), target=labels).backward())
        assert sums.label_counts.tolist() == counts_of(labels)


def test_soft_targets_of_the_loss_module():
    criterion = nn.CrossEntropyLoss()
    model = Concat()
    inputs, labels = batch(8)
    soft = 0.9 * F.one_hot(labels, 5) + 0.02
    with watch(model, loss=criterion) as monitor:
        sums = taken(monitor, lambda: criterion(model(*inputs), soft).backward())
        torch.testing.assert_close(sums.label_counts, soft.sum(0))


def test_a_loss_without_graph_is_that_of_an_eval_pass():
    criterion = nn.CrossEntropyLoss()
    model = Concat()
    inputs, labels = batch(8)
    with watch(model, loss=criterion) as monitor:

        def run():
            logits = model(*inputs)
            with torch.no_grad():
                criterion(torch.randn(3, 5), torch.tensor([0, 0, 0]))
            criterion(logits, labels).backward()

        assert taken(monitor, run).label_counts.tolist() == counts_of(labels)


def test_the_same_loss_on_other_outputs_too():
    """An auxiliary head with labels of its own through the same instance."""
    criterion = nn.CrossEntropyLoss()
    model = Concat()
    other = nn.Linear(5, 3)
    (x, y), labels = batch(8)
    with watch(model, loss=criterion) as monitor:

        def run():
            logits = model(x, y)
            aux = criterion(other(x), torch.randint(3, (8,)))
            (aux + criterion(logits, labels)).backward()

        assert taken(monitor, run).label_counts.tolist() == counts_of(labels)


def test_a_loss_module_that_returns_several_terms():
    class Terms(nn.Module):
        def forward(self, logits, target):
            return {"ce": F.cross_entropy(logits, target), "norm": logits.square().mean()}

    criterion, model = Terms(), Concat()
    inputs, labels = batch(8)
    with watch(model) as monitor:
        monitor.watch_loss(criterion)
        sums = taken(monitor, lambda: sum(criterion(model(*inputs), labels).values()).backward())
        assert sums.label_counts.tolist() == counts_of(labels)


# The model's own arguments


@pytest.mark.parametrize("key", ["labels", "label"])
def test_labels_in_a_batch_that_is_a_dictionary(key):
    model = BatchDict()
    (x, y), labels = batch(8)
    with watch(model) as monitor:

        def run():
            F.cross_entropy(model({"audio": x, "visual": y, key: wrong_at(labels, 0)}), labels).backward()

        assert taken(monitor, run).label_counts.tolist() == counts_of(wrong_at(labels, 0))
        assert monitor.stats()["labels"] == {"model": 1}


def test_labels_as_the_models_keyword():
    model = HuggingFaceStyle()
    (x, y), labels = batch(8)
    for head in (model.head, model):
        with watch(model, head=head) as monitor:
            sums = taken(monitor, lambda: model(audio=x, visual=y, labels=labels).loss.backward())
            assert sums.label_counts.tolist() == counts_of(labels)
            assert monitor.stats()["labels"] == {"model": 1}


def test_an_hf_style_model_whose_loss_is_outside():
    model = HuggingFaceStyle()
    (x, y), labels = batch(8)
    with watch(model, head=model) as monitor:
        sums = taken(monitor, lambda: F.cross_entropy(model(audio=x, visual=y).logits, labels).backward())
        assert sums.label_counts.tolist() == counts_of(labels)
        assert monitor.stats()["labels"] == {"gradient": 1}


@pytest.mark.parametrize(
    "not_labels", [torch.rand(8), torch.randint(2, (8, 3)), torch.ones(8, dtype=torch.bool)]
)
def test_a_keyword_that_holds_something_else(not_labels):
    """Regression targets, several labels a sample: not what the scores need, and no reason to stop."""
    model = BatchDict()
    (x, y), labels = batch(8)
    with watch(model) as monitor:

        def run():
            F.cross_entropy(model({"audio": x, "visual": y, "labels": not_labels}), labels).backward()

        assert taken(monitor, run).label_counts.tolist() == counts_of(labels)
        assert monitor.stats()["labels"] == {"gradient": 1}


# Order


def test_observed_before_loss_before_model_before_gradient():
    criterion = nn.CrossEntropyLoss()
    model = BatchDict()
    (x, y), labels = batch(8)
    inputs = {"audio": x, "visual": y}
    labels[:3] = torch.arange(3)
    keyword, lossy, observed = (wrong_at(labels, row) for row in range(3))
    with watch(model) as monitor:

        def run(*, loss, give, observe):
            if observe:
                monitor.observe(observed)
            logits = model({**inputs, **({"labels": keyword} if give else {})})
            if loss:
                criterion(logits, lossy).backward()
            else:
                F.cross_entropy(logits, labels).backward()

        def found(**options: bool) -> Any:
            return taken(monitor, lambda: run(**options)).label_counts.tolist()

        assert found(loss=False, give=False, observe=False) == counts_of(labels)
        assert found(loss=False, give=True, observe=False) == counts_of(keyword)
        monitor.watch_loss(criterion)
        assert found(loss=True, give=True, observe=False) == counts_of(lossy)
        assert found(loss=True, give=True, observe=True) == counts_of(observed)
        assert monitor.stats()["labels"] == {"observe": 1, "loss": 1, "model": 1, "gradient": 1}


@pytest.mark.parametrize("source", ["observe", "loss", "model", "gradient"])
def test_a_single_source_where_asked_for(source):
    criterion = nn.CrossEntropyLoss()
    model = BatchDict()
    (x, y), labels = batch(8)
    with watch(model, labels=source) as monitor:
        monitor.watch_loss(criterion)

        def run():
            monitor.observe(labels)
            criterion(model({"audio": x, "visual": y, "labels": labels}), labels).backward()

        assert taken(monitor, run).label_counts.tolist() == counts_of(labels)
        assert monitor.stats()["labels"] == {source: 1}


# Recovery


def recovered(model, inputs, loss, **options):
    with watch(model, labels="gradient", **options) as monitor:
        return taken(monitor, lambda: loss(model(*inputs)).backward()).label_counts.tolist()


@pytest.mark.parametrize("scale", [1.0, 0.25, 65536.0])
@pytest.mark.parametrize("classes", [2, 3, 5, 40])
def test_recovered_labels(scale, classes):
    model = Concat(classes=classes)
    inputs, labels = batch(16, classes=classes)
    found = recovered(model, inputs, lambda z: scale * F.cross_entropy(z, labels))
    assert found == counts_of(labels, classes)


def test_recovered_labels_leave_ignored_rows_and_classes_of_weight_zero_out():
    model = Concat()
    inputs, labels = batch(16)
    labels[:4] = -100
    weight = torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0])
    found = recovered(model, inputs, lambda z: F.cross_entropy(z, labels, weight))
    assert found == counts_of(torch.where(labels == 0, -100, labels))


@pytest.mark.parametrize("smoothing", [0.05, 0.2])
def test_label_smoothing_is_counted_and_warned_of(smoothing):
    model = Concat()
    inputs, labels = batch(64)
    criterion = nn.CrossEntropyLoss(label_smoothing=smoothing)
    with watch(model) as monitor:
        for _ in range(3):
            optimizer = torch.optim.SGD(model.parameters(), 1.0)
            criterion(model(*inputs), labels).backward()
            optimizer.step()
        scores = monitor.scores()
        criterion(20 * model(*inputs), labels).backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scores.take()
            criterion(20 * model(*inputs), labels).backward()
            scores.take()
        assert monitor.stats()["recovered_labels"]["ambiguous"] > 0
    assert [str(w.message).split(" rows")[1][:36] for w in caught] == [
        " have several negative gradients at t"[:36]
    ]


def confuse(model, inputs, labels):
    """A loss whose gradient has several negative entries in most rows."""
    logits = model(*inputs)
    return F.cross_entropy(logits, labels) - logits.mean()


def test_doubtful_labels_are_an_error_when_strict():
    model = Concat()
    with watch(model, strict=True) as monitor:
        scores = monitor.scores()
        confuse(model, *batch(16)).backward()
        with pytest.raises(
            RuntimeError, match=r"rows have several negative gradients.*monitor.observe\(labels\)"
        ):
            scores.take()


@pytest.mark.parametrize("classes", [2, 3])
def test_doubtful_labels_are_an_error_with_few_classes(classes):
    model = Concat(classes=classes)
    inputs, labels = batch(16, classes=classes)
    with watch(model) as monitor:
        scores = monitor.scores()
        logits = model(*inputs)
        (F.cross_entropy(logits, labels) - 3 * logits.mean()).backward()
        with pytest.raises(RuntimeError, match="rows have several negative gradients"):
            scores.take()


def test_the_warning_names_the_users_line():
    model = Concat()
    with watch(model) as monitor:
        scores = monitor.scores()
        confuse(model, *batch(64)).backward()
        with pytest.warns(UserWarning, match="several negative gradients") as caught:
            scores.take()
    assert caught[0].filename == __file__


def test_a_single_doubtful_row_among_many_is_no_reason_to_warn():
    model = Concat()
    inputs, labels = batch(200)
    with watch(model) as monitor:
        scores = monitor.scores()
        logits = model(*inputs)
        (F.cross_entropy(logits, labels, reduction="sum") - 2 * logits[0].sum()).backward()
        sums = scores.take()
        assert sums is not None
        assert monitor.stats()["recovered_labels"] == {"rows": 200, "ambiguous": 1}


def test_labels_given_are_not_judged_by_the_gradient():
    model = Concat()
    inputs, labels = batch(16)
    with watch(model, strict=True) as monitor:
        monitor.observe(labels)
        sums = taken(monitor, lambda: confuse(model, inputs, labels).backward())
    assert sums.label_counts.tolist() == counts_of(labels)


# A single logit


@pytest.mark.parametrize("squeeze", [False, True])
@pytest.mark.parametrize("given", [None, "long", "float", "bool", "soft"])
def test_a_binary_head_with_one_logit(squeeze, given):
    model = Concat(classes=1)
    inputs, _ = batch(8)
    labels = torch.tensor([0, 1, 1, 0, 1, 1, 1, 0])
    with watch(model) as monitor:
        spy = Spy(monitor)

        def run():
            if given == "soft":
                monitor.observe(labels * 0.8 + 0.1)
            elif given is not None:
                monitor.observe(getattr(labels, given)().view(8, 1))
            logits = model(*inputs)
            if squeeze:
                F.binary_cross_entropy_with_logits(logits.squeeze(1), labels.float()).backward()
            else:
                F.binary_cross_entropy_with_logits(logits, labels.float().view(8, 1)).backward()

        sums = taken(monitor, run)
    assert sums.label_counts.tolist() == [3, 5]
    z = spy.unimodal[0]["audio"].squeeze(1)
    expected = torch.where(labels == 1, z.sigmoid(), 1 - z.sigmoid()).sum()
    assert sums.score[0].item() == pytest.approx(float(expected), rel=1e-5)


def test_a_binary_head_that_returns_a_vector():
    class Vector(Concat):
        def fuse(self, features):
            return super().fuse(features).squeeze(1)

    model = Vector(classes=1)
    inputs, _ = batch(8)
    labels = torch.tensor([0.0, 1, 1, 0, 1, 1, 1, 0])
    for head in (model.head, model):
        with bo.ModalityMonitor(model, model.modalities, head) as monitor:
            sums = taken(
                monitor, lambda: F.binary_cross_entropy_with_logits(model(*inputs), labels).backward()
            )
            assert sums.label_counts.tolist() == [3, 5]


def test_binary_labels_out_of_range():
    model = Concat(classes=1)
    with watch(model) as monitor:
        scores = monitor.scores()
        monitor.observe(torch.full((8,), 3))
        model(*batch(8)[0]).sum().backward()
        with pytest.raises(ValueError, match=r"lie in \[0, 2\)"):
            scores.take()


# Labels that the gradient refutes


class NextToken(Labelled):
    """The loss shifts `labels=` by one position, as causal language models do."""

    def __init__(self):
        super().__init__(encoder=Tokens)


def shifted_loss(logits, labels, **options):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), **options)


def tokens(seed, size=32):
    generator = torch.Generator().manual_seed(seed)
    return batch(size)[0], torch.randint(5, (size, 3), generator=generator)


@pytest.mark.parametrize("size", [1, 8, 32])
def test_labels_that_the_model_shifts_are_aligned_from_the_first_batch_on(size):
    model = NextToken()
    with watch(model) as monitor, watch(model, labels="gradient") as oracle:
        scores, expected = monitor.scores(), oracle.scores()
        for seed in range(3):
            inputs, labels = tokens(seed, size)
            shifted_loss(model(*inputs, labels=labels), labels).backward()
            sums, want = scores.take(), expected.take()
            assert sums is not None
            assert want is not None
            torch.testing.assert_close(sums.score, want.score, rtol=0, atol=0)
        assert monitor.stats()["labels"] == {"model": 3}


@pytest.mark.parametrize("sharpness", [1.0, 30.0])  # as of a pretrained model, which rules most classes out
def test_labels_that_the_model_shifts_and_smooths_are_aligned(sharpness):
    model = NextToken()
    with torch.no_grad():
        model.head.weight.mul_(sharpness)
    with watch(model) as monitor, watch(model, labels="observe") as oracle:
        scores, expected = monitor.scores(), oracle.scores()
        inputs, labels = tokens(0)
        oracle.observe(torch.cat([labels[:, 1:], torch.full((32, 1), -100)], 1))
        shifted_loss(model(*inputs, labels=labels), labels, label_smoothing=0.3).backward()
        sums, want = scores.take(), expected.take()
        assert sums is not None
        assert want is not None
        torch.testing.assert_close(sums.score, want.score, rtol=0, atol=0)


def test_labels_that_the_model_shifts_are_aligned_where_only_they_are_allowed():
    model = NextToken()
    with watch(model, labels="model") as monitor, watch(model, labels="gradient") as oracle:
        scores, expected = monitor.scores(), oracle.scores()
        inputs, labels = tokens(0)
        shifted_loss(model(*inputs, labels=labels), labels).backward()
        sums, want = scores.take(), expected.take()
        assert sums is not None
        assert want is not None
        torch.testing.assert_close(sums.score, want.score, rtol=0, atol=0)


@pytest.mark.parametrize("source", ["observe", "loss"])
def test_labels_that_the_gradient_refutes_are_an_error_where_the_user_named_their_source(source):
    model = NextToken()
    inputs, labels = tokens(0)
    criterion = nn.CrossEntropyLoss()
    with watch(model, labels=source) as monitor:
        scores = monitor.scores()
        monitor.watch_loss(criterion)
        monitor.observe(labels)
        logits = model(*inputs, labels=labels)
        (0 * criterion(logits.flatten(0, 1), labels.flatten()) + shifted_loss(logits, labels)).backward()
        with pytest.raises(
            RuntimeError, match=r"contradicts them in \d+ of \d+ rows.*monitor.observe\(labels\)"
        ):
            scores.take()


def test_labels_of_another_task_are_refuted():
    model = Concat()
    inputs, labels = batch(64)
    with watch(model) as monitor:
        scores = monitor.scores()
        monitor.observe(labels.flip(0))
        train_step(model, inputs, labels)
        with pytest.raises(RuntimeError, match="another task's labels"):
            scores.take()


@pytest.mark.parametrize(
    "criterion",
    [
        nn.CrossEntropyLoss(label_smoothing=0.3),
        nn.MultiMarginLoss(),
        nn.CrossEntropyLoss(weight=torch.tensor([0.0, 1.0, 1.0, 2.0, 3.0])),
        lambda z, y: F.mse_loss(z, F.one_hot(y, 5).float()),
        lambda z, y: F.binary_cross_entropy_with_logits(z, F.one_hot(y, 5).float()),
    ],
)
@pytest.mark.parametrize("sharpness", [1.0, 30.0])
def test_labels_of_any_classifications_loss_are_not_refuted(criterion, sharpness):
    model = Concat()
    with torch.no_grad():
        model.head.weight.mul_(sharpness)
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    with watch(model) as monitor:
        scores = monitor.scores()
        for _ in range(5):
            inputs, labels = batch(64)
            monitor.observe(labels)
            optimizer.zero_grad()
            criterion(model(*inputs), labels).backward()
            optimizer.step()
            assert scores.take() is not None


# Losses without classes


def regression(loss, mean=0.0, outputs=1):
    def of(logits):
        generator = torch.Generator().manual_seed(3)
        return loss(logits, mean + torch.randn(logits.shape, generator=generator))

    return pytest.param(of, outputs, id=f"{loss.__name__}-{mean}-{outputs}")


def several_labels(logits):
    generator = torch.Generator().manual_seed(3)
    hot = torch.randint(2, logits.shape, generator=generator).float()
    return F.binary_cross_entropy_with_logits(logits, hot)


def smoothed(logits):
    labels = (torch.arange(len(logits)) % 2).float().unsqueeze(1)
    return F.binary_cross_entropy_with_logits(logits, 0.9 * labels + 0.05)


@pytest.mark.parametrize(
    ("loss", "outputs"),
    [
        *(
            regression(f, mean)
            for f in (F.mse_loss, F.l1_loss, F.smooth_l1_loss)
            for mean in (0.0, 3.0, 30.0)
        ),
        *(regression(F.mse_loss, 2.0, outputs) for outputs in (2, 3, 6)),
        (several_labels, 6),
        (smoothed, 1),
    ],
)
def test_a_loss_without_one_class_for_each_sample_is_refused(loss, outputs):
    model = Concat(classes=outputs)
    with watch(model) as monitor:
        scores = monitor.scores()
        loss(model(*batch(16)[0])).backward()
        with pytest.raises(
            RuntimeError, match=r"regression.*monitor.observe\(labels\).*build the monitor with `loss=`"
        ):
            scores.take()


@pytest.mark.parametrize("factor", [1e-4, 1.0, 65536.0])
@pytest.mark.parametrize("weight", [None, 3.0])
@pytest.mark.parametrize("sharpness", [1.0, 100.0])
def test_a_binary_cross_entropy_of_any_scale_is_one(factor, weight, sharpness):
    model = Concat(classes=1)
    with torch.no_grad():
        model.head.weight.mul_(sharpness)
    labels = (torch.arange(64) % 3 == 0).float().unsqueeze(1)
    pos_weight = None if weight is None else torch.tensor(weight)

    def run():
        logits = model(*batch(64)[0])
        (factor * F.binary_cross_entropy_with_logits(logits, labels, pos_weight=pos_weight)).backward()

    with watch(model) as monitor:
        assert taken(monitor, run).count.min() >= 60  # gradients of sure rows vanish


GRADED = torch.tensor([torch.nan, 1, 0, 1, 0, 1, 0, 1])


@pytest.mark.parametrize(
    "targets", [torch.linspace(-2, 2, 8), torch.linspace(0, 5, 8), torch.linspace(0, 1, 8), GRADED]
)
def test_targets_of_a_regression_are_no_labels_of_a_single_logit(targets):
    model = Concat(classes=1)
    with watch(model) as monitor:
        scores = monitor.scores()
        monitor.observe(targets)
        F.mse_loss(model(*batch(8)[0])[:, 0], targets).backward()
        with pytest.raises(ValueError, match=r"0 or 1, or those of a class all.*a regression's targets\?"):
            scores.take()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothed", [(0.1, 0.9), (0.0, 0.9), (0.05, 1.0)])
def test_labels_of_a_single_logit_may_be_smoothed_and_ignored(dtype, smoothed):
    model = Concat(classes=1)
    index = torch.tensor([0, 1, 1, 0, 1, -100, -100, 0])
    labels = torch.where(index < 0, -100.0, torch.tensor(smoothed)[index.clamp(min=0)]).to(dtype)
    valid = index >= 0
    with watch(model) as monitor:

        def run():
            monitor.observe(labels)
            logits = model(*batch(8)[0])[:, 0]
            F.binary_cross_entropy_with_logits(logits[valid], labels[valid].float()).backward()

        assert taken(monitor, run).label_counts.tolist() == [3, 3]


def test_a_batch_of_ignored_floats_has_no_labels():
    model = Concat(classes=1)
    with watch(model) as monitor:
        scores = monitor.scores()
        monitor.observe(torch.full((8,), -100.0))
        model(*batch(8)[0]).sum().backward()
        sums = scores.take()
        assert sums is None or sums.count.sum() == 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_observed_labels_of_every_integer_dtype(dtype):
    classes = 200 if dtype == torch.uint8 else 100
    model = Concat(classes=classes)
    inputs, labels = batch(64, classes=classes)
    labels[:2] = classes - 44  # 156 is -100 in a byte
    with watch(model) as monitor:
        monitor.observe(labels.to(dtype))
        sums = taken(monitor, lambda: F.cross_entropy(model(*inputs), labels).backward())
    assert sums.label_counts.tolist() == counts_of(labels, classes)
    assert sums.count.tolist() == [64, 64]


@pytest.mark.parametrize("criterion", [nn.MSELoss(), nn.HuberLoss(), nn.MultiLabelSoftMarginLoss()])
def test_a_loss_whose_targets_are_no_classes_is_not_watched(criterion):
    with pytest.raises(ValueError, match=f"Found {type(criterion).__name__}"):
        watch(Concat()).watch_loss(criterion)
    assert not criterion._forward_hooks


class Upsampled(nn.Module):
    """Dense: a head on small maps, whose logits are interpolated for the loss."""

    def __init__(self):
        super().__init__()
        self.rgb, self.depth = nn.Conv2d(3, 4, 4, 4), nn.Conv2d(1, 4, 4, 4)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, rgb, depth):
        small = self.head(torch.cat([self.rgb(rgb), self.depth(depth)], 1))
        return F.interpolate(small, scale_factor=4, mode="bilinear")


@pytest.mark.parametrize("how", ["observe", "watch", "gradient"])
def test_logits_that_are_changed_after_the_head_are_told_to_take_the_model_as_head(how):
    model = Upsampled()
    inputs, labels = (torch.randn(2, 3, 16, 16), torch.randn(2, 1, 16, 16)), torch.randint(5, (2, 16, 16))
    loss = nn.CrossEntropyLoss()

    def sums_with(head):
        with bo.ModalityMonitor(
            model, {"rgb": model.rgb, "depth": model.depth}, head, strict=True
        ) as monitor:
            scores = monitor.scores()
            if how == "watch":
                monitor.watch_loss(loss)
            logits = model(*inputs)
            if how == "observe":
                monitor.observe(labels)
            loss(logits, labels).backward()
            return scores.take()

    with pytest.raises((ValueError, RuntimeError), match=r"upsampled.*such as the model itself"):
        sums_with(model.head)
    sums = sums_with(model)
    counts = torch.bincount(labels.flatten(), minlength=5)
    torch.testing.assert_close(sums.label_counts, counts / 256)
    with torch.no_grad():
        both = torch.cat([model.rgb(inputs[0]), torch.zeros(2, 4, 4, 4)], 1)
        alone = F.interpolate(model.head(both), scale_factor=4, mode="bilinear").log_softmax(1)
    expected = alone.gather(1, labels[:, None]).mean((1, 2, 3)).exp().sum()
    torch.testing.assert_close(sums.score[0], expected)
