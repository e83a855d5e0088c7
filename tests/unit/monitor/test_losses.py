"""What could go wrong silently with a loss: other targets than the loop's, shapes that broadcast, masked entries."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import balanceopt as bo
from balanceopt.functional import likelihood_score
from balanceopt.monitor._scores import Sums
from tests.models import FUSIONS, INPUTS, Concat, Multimodal, batch, watch
from tests.training import groups_of, sgd
from tests.unit.monitor.helpers import no_hooks

B = 8
SQUARES = [
    nn.MSELoss(),
    nn.MSELoss(reduction="sum"),
    nn.L1Loss(),
    nn.SmoothL1Loss(beta=0.5),
    nn.HuberLoss(delta=0.5),
]


def numbers(outputs: int = 1, size: int = B) -> tuple[list[Tensor], Tensor]:
    inputs, _ = batch(size)
    return inputs, 2 * torch.randn(size, outputs) + 3


def scored(
    model: Multimodal, loss: Any, run: Callable[[bo.ModalityMonitor], None], **options: Any
) -> tuple[list[float], list[float]]:
    """Mean scores and counts of what `run` does."""
    with watch(model, loss=loss, **options) as monitor:
        scores = monitor.scores()
        run(monitor)
        taken = scores.take()
    assert taken is not None
    return taken.mean_score.tolist(), taken.count.tolist()


def observed(model: Multimodal, loss: Any, inputs: list[Tensor], target: Tensor, criterion: Any) -> Any:
    """What targets give that are observed."""

    def run(monitor: bo.ModalityMonitor) -> None:
        monitor.observe(target)
        criterion(model(*inputs), target).backward()

    return scored(model, loss, run)


# Calls of the watched loss


@pytest.mark.parametrize("loss", SQUARES)
@pytest.mark.parametrize(
    "call",
    [
        lambda loss, f, y: loss(f.squeeze(1), y.squeeze(1)),
        lambda loss, f, y: loss(f.flatten(), y.flatten()),
        lambda loss, f, y: loss(y, f),
        lambda loss, f, y: loss(target=f, input=y),
        lambda loss, f, y: loss(input=f, target=y),
        lambda loss, f, y: 3 * loss(f / 2, y / 2) + loss(f, y),
    ],
    ids=["squeezed", "flat", "swapped", "swapped by name", "by name", "first call of two"],
)
def test_any_call_of_the_loss_on_the_output_tells_the_targets(loss: nn.Module, call: Any, request: Any):
    model = Concat(classes=1)
    inputs, target = numbers()
    scale = 2 if "two" in request.node.name else 1

    def run(monitor: bo.ModalityMonitor) -> None:
        call(loss, model(*inputs), target).backward()

    found = scored(model, loss, run)
    assert found == observed(model, copy.deepcopy(loss), inputs, target / scale, F.mse_loss)


@pytest.mark.parametrize("loss", SQUARES)
@pytest.mark.parametrize(
    ("rows", "columns"), [(lambda f: f, lambda y: y.flatten()), (torch.flatten, Tensor.clone)]
)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_a_loss_that_broadcasts_is_refused(loss: nn.Module, rows: Any, columns: Any):
    model = Concat(classes=1)
    inputs, target = numbers()
    with (
        watch(model, loss=loss),
        pytest.raises(ValueError, match=r"each prediction with its own target.*view_as"),
    ):
        loss(rows(model(*inputs)), columns(target))


class TwoHeads(Concat):
    """A second task's head, whose output has the same shape."""

    def __init__(self) -> None:
        super().__init__(classes=1)
        self.other = nn.Linear(self.head.in_features, 1)

    def forward(self, *inputs: Tensor) -> Any:
        z = torch.cat(self.encode(*inputs), 1)
        return self.head(z), self.other(z)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.BCEWithLogitsLoss()])
def test_a_loss_that_two_heads_share(loss: nn.Module, order: tuple[int, int]):
    model = TwoHeads()
    inputs, _ = numbers()
    targets = [torch.rand(B, 1).round() for _ in order]

    def run(monitor: bo.ModalityMonitor) -> None:
        outputs = model(*inputs)
        sum(loss(outputs[i], targets[i]) for i in order).backward()
        assert monitor.hooks.latest is not None
        assert monitor.hooks.latest.label_source == "loss"
        assert torch.equal(monitor.hooks.latest.labels, targets[0])  # type: ignore[arg-type]

    scored(model, loss, run)


def test_the_loss_of_another_head_alone_tells_no_targets():
    model, loss = TwoHeads(), nn.MSELoss()
    inputs, target = numbers()
    with watch(model, loss=loss) as monitor:
        scores = monitor.scores()
        output, other = model(*inputs)
        (loss(other, target) + F.mse_loss(output, target)).backward()
        with pytest.raises(RuntimeError, match=r"targets of a pass did not come.*`loss=`.*monitor.observe"):
            scores.take()


def test_losses_after_two_forwards_give_each_pass_its_targets():
    """As in siamese loops: both forwards, then both losses."""
    model, loss = Concat(classes=1), nn.MSELoss()
    (first, y), (second, z) = numbers(), numbers()
    together = [torch.cat(pair) for pair in zip(first, second, strict=True)]

    def run(monitor: bo.ModalityMonitor) -> None:
        outputs = model(*first), model(*second)
        (loss(outputs[0], y) + loss(outputs[1], z)).backward()

    found, count = scored(model, loss, run)
    assert count == [2 * B, 2 * B]
    expected, _ = observed(model, loss, together, torch.cat([y, z]), F.mse_loss)
    assert found == pytest.approx(expected, rel=1e-5)


# Targets that the gradient contradicts


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.L1Loss(), nn.BCEWithLogitsLoss()])
def test_targets_of_another_batch_are_refused(loss: nn.Module):
    model, criterion = Concat(classes=3), copy.deepcopy(loss)
    with watch(model, loss=loss) as monitor:
        optimizer = bo.ModulatedOptimizer(sgd(groups_of(model)), monitor, bo.OGM(0.5))

        def step(shift: int) -> None:
            inputs, _ = batch(32)
            target = (
                (torch.randn(32, 3) > 1.5).float()
                if isinstance(loss, nn.BCEWithLogitsLoss)
                else torch.randn(32, 3)
            )
            monitor.observe(target.roll(shift, 0))
            optimizer.zero_grad()
            criterion(model(*inputs), target).backward()
            optimizer.step()

        for _ in range(5):
            step(0)

        def others() -> None:
            for _ in range(30):
                step(1)

        with pytest.raises(RuntimeError, match=r"monitor\.observe are not those of the loss.*other sign"):
            others()


def test_a_loss_that_is_maximised_is_refused():
    model, loss = Concat(classes=5), nn.MSELoss()
    inputs, target = numbers(5)

    def run(monitor: bo.ModalityMonitor) -> None:
        (-loss(model(*inputs), target)).backward()

    with pytest.raises(RuntimeError, match=r"the watched loss are not those of the loss.*maximised"):
        scored(model, loss, run)


@pytest.mark.parametrize("loss", [*SQUARES, lambda f, y: (f - y).abs()])
def test_without_targets_the_error_says_what_to_pass(loss: Any):
    model = Concat(classes=1)
    inputs, target = numbers()
    with pytest.raises(
        RuntimeError, match=r"can't tell them.*`loss=` the very module.*monitor\.observe\(targets\)"
    ):
        scored(model, loss, lambda _: F.mse_loss(model(*inputs), target).backward())
    with pytest.raises(ValueError, match=r"`labels='gradient'` needs cross-entropy or nn\.BCEWithLogitsLoss"):
        watch(model, loss=loss, labels="gradient")


# Entries that do not count


@pytest.mark.parametrize("loss", [*SQUARES, nn.BCEWithLogitsLoss()])
@pytest.mark.parametrize("source", ["observe", "loss"])
def test_samples_that_the_loop_masks_do_not_count(loss: nn.Module, source: str):
    model = Concat(classes=1)
    inputs, target = batch()[0], torch.rand(B, 1).round() + torch.arange(B)[:, None] / 100
    target = target.clamp(max=1)
    mask = torch.tensor([True, True, False, True, False, True, True, True])[:, None]
    loss, single = copy.deepcopy(loss), copy.deepcopy(loss)
    single.reduction = loss.reduction = "none"  # type: ignore[assignment]

    def run(monitor: bo.ModalityMonitor) -> None:
        if source == "observe":
            monitor.observe(target)
        ((loss if source == "loss" else single)(model(*inputs), target) * mask).sum().backward()

    found, count = scored(model, loss, run)
    assert count == [6, 6]
    kept = mask.flatten()
    # The parts of a regression are centred over all samples, masked or not: the fusion sees them all.
    with torch.no_grad():
        features = model.encode(*inputs)
        parts = torch.stack(
            [
                F.linear(z, model.head.weight[:, 4 * m : 4 * m + 4], model.head.bias / 2)
                for m, z in enumerate(features)
            ]
        )
        if not isinstance(loss, nn.BCEWithLogitsLoss):
            joint = model.head(torch.cat(features, 1))
            parts = parts + (joint - parts).mean(1, keepdim=True)
    expected = likelihood_score(parts[:, kept], target[kept], loss).mean(1)
    assert found == pytest.approx(expected.tolist(), rel=1e-5)


@pytest.mark.parametrize("loss", [*SQUARES, nn.BCEWithLogitsLoss()])
def test_targets_that_are_nan_do_not_count(loss: nn.Module):
    """As where the loop indexes its loss, `loss(f[known], y[known])`, some outputs of some samples being unknown."""
    model, single = Concat(classes=3), copy.deepcopy(loss)
    inputs, target = batch()[0], torch.rand(B, 3)
    known = torch.rand(B, 3) < 0.6
    known[0] = False
    sparse = torch.where(known, target, torch.nan)

    def run(monitor: bo.ModalityMonitor) -> None:
        monitor.observe(sparse)
        single(model(*inputs)[known], target[known]).backward()

    found, count = scored(model, loss, run, scores="zero-out")
    assert count == [B - 1, B - 1]
    with torch.no_grad():
        z = model.encode(*inputs)
        fill = torch.zeros_like(z[0]) if isinstance(loss, nn.BCEWithLogitsLoss) else None
        means = [x.mean(0).expand_as(x) if fill is None else fill for x in z]
        alone = torch.stack([model.head(torch.cat(pair, 1)) for pair in ((z[0], means[1]), (means[0], z[1]))])
    expected = likelihood_score(alone, sparse, loss)
    assert found == pytest.approx((expected.sum(1) / (B - 1)).tolist(), rel=1e-5)


@pytest.mark.parametrize("loss", SQUARES)
@pytest.mark.parametrize("spoilt", [torch.inf, -torch.inf])
def test_infinite_targets_leave_the_step_to_the_base(loss: nn.Module, spoilt: float):
    model = Concat(classes=2)
    monitor = watch(model, loss=loss)
    optimizer = bo.ModulatedOptimizer(sgd(groups_of(model)), monitor, bo.OGM(0.5))
    inputs, target = numbers(2)
    monitor.observe(torch.where(torch.arange(B)[:, None] == 3, spoilt, target))
    F.mse_loss(model(*inputs), target).backward()
    with pytest.warns(UserWarning, match="scores are not finite"):
        optimizer.step()
    assert optimizer.stats()["unusable_scores"] == 1
    assert optimizer.stats()["modulated"] == 0
    monitor.remove()


@pytest.mark.parametrize("loss", SQUARES)
def test_steps_that_tell_no_scale_are_counted_and_then_an_error(loss: nn.Module):
    """A single sample, or targets that are all equal."""
    model = Concat(classes=1)
    with watch(model, loss=loss) as monitor:
        optimizer = bo.ModulatedOptimizer(sgd(groups_of(model), lr=0.0), monitor, bo.OGM(0.5))

        def step(size: int, target: Tensor) -> None:
            inputs, _ = batch(size)
            optimizer.zero_grad()
            loss(model(*inputs), target).backward()
            optimizer.step()

        with pytest.warns(UserWarning, match="scores are not finite"):
            step(1, torch.ones(1, 1))
        step(5, torch.full((5, 1), 2.0))
        step(5, torch.randn(5, 1))
        assert optimizer.stats()["unusable_scores"] == 2
        assert optimizer.stats()["modulated"] == 1

        def single_samples() -> None:
            for _ in range(12):
                step(1, torch.ones(1, 1))

        with pytest.raises(RuntimeError, match=r"10 steps in a row.*one sample, or of equal targets"):
            single_samples()


# The loss module


@pytest.mark.parametrize("loss", [*SQUARES, nn.BCEWithLogitsLoss(), nn.CrossEntropyLoss()])
def test_remove_leaves_the_loss_module_as_it_was(loss: nn.Module):
    model = Concat(classes=1)
    monitor = watch(model, loss=loss)
    assert not no_hooks(loss)
    monitor.remove()
    assert no_hooks(loss)
    assert no_hooks(model)


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("loss", [nn.HuberLoss(delta=0.3), nn.BCEWithLogitsLoss(), nn.CrossEntropyLoss()])
def test_a_copy_of_a_monitor_is_inert_and_has_a_loss_of_its_own(loss: nn.Module, twin_of: Any):
    model = Concat()
    inputs, classes = batch()
    target = classes if isinstance(loss, nn.CrossEntropyLoss) else F.one_hot(classes, 5).float()
    with watch(model, loss=loss) as monitor:
        twin = twin_of(monitor)
        assert type(twin.loss) is type(loss)
        assert twin.loss is not loss
        scores = twin.scores()
        twin.loss(twin.model(*inputs), target).backward()
        assert scores.take() is None
        assert monitor.stats()["passes"] == 0


def test_options_of_the_loss_may_change_between_steps():
    model, loss = Concat(classes=3), nn.HuberLoss(delta=0.1)
    inputs, target = numbers(3)
    found = []
    with watch(model, loss=loss) as monitor:
        scores = monitor.scores()
        for delta in (0.1, 5.0):
            loss.delta = delta
            loss(model(*inputs), target).backward()
            taken = scores.take()
            assert taken is not None
            found.append(taken.mean_score.tolist())
    fresh = [observed(model, nn.HuberLoss(delta=d), inputs, target, F.mse_loss)[0] for d in (0.1, 5.0)]
    assert found == fresh
    assert found[0] != found[1]


# A loop of another loss than the monitor's


@pytest.mark.parametrize("outputs", [1, 3, 5])
@pytest.mark.parametrize("how", ["gradient", "observe"])
def test_a_regression_under_the_default_names_the_option(outputs: int, how: str):
    model = Concat(classes=outputs)
    inputs, target = numbers(outputs, size=32)

    def run(monitor: bo.ModalityMonitor) -> None:
        if how == "observe":
            monitor.observe(target)
        F.mse_loss(model(*inputs), target).backward()

    with pytest.raises((RuntimeError, ValueError), match=r"`loss=`"):
        scored(model, None, run)


@pytest.mark.parametrize("how", ["gradient", "observe"])
def test_several_labels_under_the_default_name_the_option(how: str):
    model = Concat(classes=5)
    inputs, target = batch(32)[0], torch.randint(2, (32, 5)).float()

    def run(monitor: bo.ModalityMonitor) -> None:
        if how == "observe":
            monitor.observe(target)
        F.binary_cross_entropy_with_logits(model(*inputs), target).backward()

    with pytest.raises((RuntimeError, ValueError), match=r"`loss=`"):
        scored(model, None, run)


@pytest.mark.parametrize("loss", [F.mse_loss, F.cross_entropy])
def test_another_loss_than_binary_cross_entropy_tells_no_labels(loss: Any):
    model = Concat(classes=5)
    inputs, classes = batch(32)
    target = classes if loss is F.cross_entropy else torch.randn(32, 5)
    with pytest.raises(RuntimeError, match=r"should be that of a binary cross-entropy of hard labels"):
        scored(model, nn.BCEWithLogitsLoss(), lambda _: loss(model(*inputs), target).backward())


@pytest.mark.parametrize(
    "loss",
    [
        nn.TripletMarginLoss(),
        nn.CosineEmbeddingLoss(),
        nn.MarginRankingLoss(),
        nn.CTCLoss(),
        F.triplet_margin_loss,
    ],
)
def test_losses_without_a_score_say_what_works(loss: Any):
    model = Concat()
    cure = r"has no uni-modal score.*re-learning.*fixed coefficients.*dropout.*`scores=function`"
    with pytest.raises(ValueError, match=cure):
        watch(model, loss=loss)
    if isinstance(loss, nn.Module):
        with watch(model) as monitor, pytest.raises(ValueError, match=cure):
            monitor.watch_loss(loss)
        assert no_hooks(loss)
    assert no_hooks(model)


# Encoders whose outputs have samples in another dimension, or in some rows


class Sequences(nn.Module):
    """A recurrent or a transformer layer beside a linear one, under an MLP."""

    def __init__(self, layer: nn.Module, read: Callable[[Any], Tensor], width: int = 6) -> None:
        super().__init__()
        self.layer, self.linear, self.read = layer, nn.Linear(4, 6), read
        self.head = nn.Sequential(nn.Linear(width + 6, 8), nn.Tanh(), nn.Linear(8, 2))

    def features(self, sequence: Tensor, x: Tensor) -> list[Tensor]:
        return [self.read(self.layer(sequence)), self.linear(x)]

    def forward(self, sequence: Tensor, x: Tensor) -> Tensor:
        return self.head(torch.cat(self.features(sequence, x), 1))


def last_of(output: Any) -> Tensor:
    state = output[1][0] if isinstance(output[1], tuple) else output[1]
    return state[-1]


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Tensor], bool]] = {
    "GRU, state": (lambda: nn.GRU(6, 6, batch_first=True), last_of, True),
    "two GRUs, state": (lambda: nn.GRU(6, 6, 2, batch_first=True), last_of, True),
    "LSTM, state": (lambda: nn.LSTM(6, 6, batch_first=True), last_of, True),
    "LSTM, output": (lambda: nn.LSTM(6, 6, batch_first=True), lambda out: out[0][:, -1], True),
    "GRU, time first, state": (lambda: nn.GRU(6, 6), last_of, False),
    "GRU, time first, output": (lambda: nn.GRU(6, 6), lambda out: out[0][-1], False),
    "transformer": (
        lambda: nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True),
        lambda z: z.mean(1),
        True,
    ),
    "transformer, time first": (lambda: nn.TransformerEncoderLayer(6, 2, 8, 0.0), lambda z: z.mean(0), False),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.L1Loss()])
def test_averages_are_over_samples_whatever_their_dimension(name: str, loss: nn.Module):
    make, read, batch_first = LAYERS[name]
    model = Sequences(make(), read)
    sequence, x, target = torch.randn(B, 5, 6), torch.randn(B, 4), torch.randn(B, 2)
    sequence = sequence if batch_first else sequence.transpose(0, 1)
    with bo.ModalityMonitor(
        model, {"layer": model.layer, "linear": model.linear}, model.head, loss=loss
    ) as monitor:
        scores = monitor.scores()
        loss(model(sequence, x), target).backward()
        found = scores.take()
    assert found is not None
    with torch.no_grad():
        z, w = model.features(sequence, x)
        alone = [
            model.head(torch.cat(pair, 1))
            for pair in ((z, w.mean(0).expand_as(w)), (z.mean(0).expand_as(z), w))
        ]
    expected = likelihood_score(torch.stack(alone), target, loss).mean(1)
    assert found.mean_score.tolist() == pytest.approx(expected.tolist(), rel=1e-5)


class Frames(nn.Module):
    """Three frames a sample as rows of the encoder, or some samples only."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.video, self.audio, self.head = nn.Linear(INPUTS[0], 6), nn.Linear(4, 6), head

    def forward(self, video: Tensor, audio: Tensor, some: Tensor | None = None) -> Tensor:
        if some is None:
            z = self.video(video.flatten(0, 1)).unflatten(0, (len(audio), -1)).mean(1)
        else:
            z = torch.zeros(len(audio), 6)
            z[some] = self.video(video[some])
        return self.head(torch.cat([z, self.audio(audio)], 1))


@pytest.mark.parametrize("linear", [True, False])
def test_frames_as_rows(linear: bool):
    head = nn.Linear(12, 1) if linear else nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 1))
    model, loss = Frames(head), nn.MSELoss()
    video, audio, target = torch.randn(B, 3, INPUTS[0]), torch.randn(B, 4), torch.randn(B, 1)
    with bo.ModalityMonitor(model, {"video": model.video, "audio": model.audio}, head, loss=loss) as monitor:
        scores = monitor.scores(needs_entropy=True)
        loss(model(video, audio), target).backward()
        found = scores.take()
    assert found is not None
    with torch.no_grad():
        z, w = model.video(video).mean(1), model.audio(audio)
        # Of a linear head the centred part is the answer with the other modality at its mean.
        alone = [
            head(torch.cat(pair, 1)) for pair in ((z, w.mean(0).expand_as(w)), (z.mean(0).expand_as(z), w))
        ]
    expected = likelihood_score(torch.stack(alone), target, loss).mean(1)
    assert found.mean_score.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    entropies = [torch.special.entr(x.softmax(1)).sum().item() for x in (z, w)]
    assert found.feature_entropy.tolist() == pytest.approx(entropies, rel=1e-5)


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.L1Loss()])
def test_an_encoder_of_some_samples(loss: nn.Module):
    head = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 1))
    model = Frames(head)
    video, audio, target = torch.randn(B, INPUTS[0]), torch.randn(B, 4), torch.randn(B, 1)
    some = torch.arange(B) < 5
    with bo.ModalityMonitor(model, {"video": model.video, "audio": model.audio}, head, loss=loss) as monitor:
        scores = monitor.scores()
        loss(model(video, audio, some), target).backward()
        with pytest.raises(ValueError, match=r"5 rows for 8 samples.*present="):
            scores.take()
        monitor.observe(target, present={"video": some})
        loss(model(video, audio, some), target).backward()
        found = scores.take()
    assert found is not None
    assert found.count.tolist() == [5, 8]
    with torch.no_grad():
        z, w = torch.zeros(B, 6), model.audio(audio)
        z[some] = model.video(video[some])
        mean = torch.where(some[:, None], z[some].mean(0), 0)
        alone = [head(torch.cat(pair, 1)) for pair in ((z, w.mean(0).expand_as(w)), (mean, w))]
    values = likelihood_score(torch.stack(alone), target, loss)
    assert found.score.tolist() == pytest.approx(
        [float(values[0][some].sum()), float(values[1].sum())], rel=1e-5
    )


class Steps(nn.Module):
    """Outputs for each step of a sequence, in the last dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(8, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(torch.cat([self.a(a), self.b(b)], -1))


def test_a_function_of_outputs_in_the_last_dimension_is_centred_by_output():
    torch.manual_seed(0)
    model = Steps()
    a, b = torch.randn(B, 5, 3), torch.randn(B, 5, 2)
    target = torch.randn(B, 5, 2) + torch.tensor([5.0, -5.0])
    losses: list[Any] = [nn.MSELoss(), lambda f, y: (f - y).square()]
    found = []
    for loss in losses:
        with bo.ModalityMonitor(model, {"a": "a", "b": "b"}, "head", loss=loss) as monitor:
            scores = monitor.scores()
            monitor.observe(target)
            F.mse_loss(model(a, b), target).backward()
            taken = scores.take()
        assert taken is not None
        found.append(taken.cross_entropy / taken.cross_entropy.sum())  # the two have other units
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("fusion", ["concat", "sum", "mlp"])
def test_a_rank_without_a_forward_adds_nothing_in_the_shape_of_the_others(fusion: str):
    model = FUSIONS[fusion]()
    scores = watch(model).scores()
    nothing = scores._nothing()  # what the rank adds before its first forward
    inputs, labels = batch(B)
    F.cross_entropy(model(*inputs), labels).backward()
    scores._fold()
    some = scores._sums
    assert isinstance(nothing, Sums)
    assert isinstance(some, Sums)
    assert [x.shape for x in nothing.tensors] == [x.shape for x in some.tensors]
