"""ProbeMonitor: what each encoder knows, by linear heads beside the model."""

from __future__ import annotations

import copy
import gc
import io
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import balanceopt as bo
from balanceopt.probes._round import mean_average_precision
from tests.models import CLASSES, FUSIONS, Concat, HuggingFaceStyle, Multimodal, batch, train_step, watch
from tests.training import grad_of, same_bits
from tests.unit.optim.test_no_waiting import NoWaiting


def sgd(model: nn.Module, lr: float = 0.05) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.5)


def telling(size: int = 64) -> tuple[list[Tensor], Tensor]:
    """A batch in which the first modality shows the class, and the second nothing."""
    inputs, labels = batch(size)
    inputs[0] = 0.3 * inputs[0]
    inputs[0] = inputs[0] + 3 * F.one_hot(labels, inputs[0].shape[1])
    return inputs, labels


def train(model: Multimodal, optimizer: torch.optim.Optimizer, steps: int) -> None:
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        train_step(model, *telling())
        optimizer.step()


@torch.no_grad()
def validate(model: Multimodal, monitor: bo.ModalityMonitor, passes: int = 4) -> None:
    model.eval()
    for _ in range(passes):
        inputs, labels = telling()
        model(*inputs)
        monitor.observe(labels)
    model.train()


def probed(
    steps: int = 150, **options: Any
) -> tuple[Multimodal, bo.ModalityMonitor, bo.ProbeMonitor, bo.Recorder]:
    torch.manual_seed(0)
    model = Concat()
    monitor = watch(model)
    probes = bo.ProbeMonitor(monitor, **options)
    recorder = bo.Recorder(monitor, probes, every=10)
    train(model, sgd(model), steps)
    return model, monitor, probes, recorder


def test_what_the_encoders_know():
    model, monitor, probes, recorder = probed()
    assert probes.results() == {}
    validate(model, monitor)
    results = probes.results()
    assert results["audio"] > 0.9
    assert 0.05 < results["visual"] < 0.4  # chance is 0.2
    steps, values = recorder.series("probe")["audio"]
    assert values == pytest.approx([results["audio"]])
    assert steps == [140]  # the latest recorded step
    assert recorder.series("probe_train")["audio"][1][0] > 0.7


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_model_trains_as_without_probes(fusion: str):
    model = FUSIONS[fusion]()
    twin = copy.deepcopy(model)
    states = []
    for one in (model, twin):
        torch.manual_seed(1)
        monitor = watch(one)
        probes = bo.ProbeMonitor(monitor) if one is model else None
        optimizer = sgd(one)
        for _ in range(2):
            train(one, optimizer, 3)
            validate(one, monitor)
        if probes is not None:
            assert probes.passes == 5  # the next pass would teach the sixth
            assert probes.results()
        states.append(torch.get_rng_state())
    assert same_bits(model, twin)
    assert torch.equal(*states)
    assert all(
        torch.equal(grad_of(p), grad_of(q))
        for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )


def reference(batches: list[tuple[Tensor, Tensor]], lr: float) -> tuple[nn.Linear, float, float]:
    """A probe by autograd and torch's Adam, its mean accuracy and its mean loss on each batch before its step."""
    width = batches[0][0].shape[1]
    head = nn.Linear(width, CLASSES)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    adam = torch.optim.Adam(head.parameters(), lr=lr / width**0.5)
    mean, variance = torch.zeros(width), torch.ones(width)
    right, losses = [], []
    for number, (z, y) in enumerate(batches):
        logits = head((z - mean) / variance.sqrt())
        right.append((logits.argmax(1) == y).float())
        adam.zero_grad()
        loss = F.cross_entropy(logits, y)
        losses.append(loss.item())
        loss.backward()
        adam.step()
        share = max(0.05, 1 / (number + 1))
        mean = mean + share * (z.mean(0) - mean)
        variance = variance + share * (z.var(0, unbiased=False) - variance)
    return head, float(torch.cat(right).mean()), sum(losses) / len(losses)


def test_the_probe_is_torchs_adam_on_standardised_features():
    torch.manual_seed(0)
    model = Concat()
    monitor = watch(model)
    probes = bo.ProbeMonitor(monitor, lr=0.1, losses=True)
    batches = []
    for _ in range(20):
        inputs, labels = telling(16)
        batches.append((model.encoders["audio"](inputs[0]).detach(), labels))
        train_step(model, inputs, labels)
        model.zero_grad()
    recorder = bo.Recorder(probes)
    state = probes.state_dict()["probes"]["audio"]
    validate(model, monitor, 1)
    head, accuracy, loss = reference(batches, 0.1)
    torch.testing.assert_close(state["weight"], torch.cat([head.weight, head.bias[:, None]], 1).detach())
    assert recorder.series("probe_train")["audio"][1] == pytest.approx([accuracy])
    assert float(probes.take_losses().train[0]) == pytest.approx(loss, rel=1e-4)


def test_a_round_ends_with_the_next_training_pass():
    model, monitor, probes, _ = probed(20)
    told: list[tuple[str, int]] = []
    probes.listeners.append(lambda step, quantity, names, values: told.append((quantity, step)))
    validate(model, monitor, 3)
    assert told == []
    train(model, sgd(model), 2)
    assert [quantity for quantity, _ in told] == ["probe", "probe_train"]
    validate(model, monitor, 3)
    probes.flush()
    probes.flush()
    assert [quantity for quantity, _ in told] == ["probe", "probe_train"] * 2


@pytest.mark.parametrize("source", ["observe before", "observe", "loss", "model", "none"])
def test_targets_of_validation(source: str):
    torch.manual_seed(0)
    loss = nn.CrossEntropyLoss()
    model = HuggingFaceStyle()
    monitor = watch(model, loss=loss)
    probes = bo.ProbeMonitor(monitor)
    optimizer = sgd(model)
    for _ in range(60):
        inputs, labels = telling()
        optimizer.zero_grad()
        loss(model(audio=inputs[0], visual=inputs[1]).logits, labels).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        for _ in range(3):
            inputs, labels = telling()
            given = {"labels": labels} if source == "model" else {}
            logits = model(audio=inputs[0], visual=inputs[1], **given).logits
            if source == "observe":
                monitor.observe(labels)
            elif source == "loss":
                loss(logits, labels)
    results = probes.results()
    if source in ("observe", "loss", "model"):
        assert results["audio"] > 0.8
    else:
        assert results == {}


def test_labels_observed_in_validation_do_not_reach_training():
    torch.manual_seed(0)
    model = Concat()
    monitor = watch(model, strict=True)
    buffer = monitor.scores()
    validate(model, monitor, 1)
    train_step(model, *telling())
    assert buffer.take() is not None
    assert monitor.stats()["labels"] == {"gradient": 1}


@pytest.mark.parametrize(
    ("loss", "metric"),
    [(nn.MSELoss(), "R2"), (nn.SmoothL1Loss(), "R2"), (nn.BCEWithLogitsLoss(), "mAP")],
)
def test_other_tasks(loss: nn.Module, metric: str):
    torch.manual_seed(0)
    model = Concat()
    monitor = watch(model, loss=loss)
    probes = bo.ProbeMonitor(monitor, lr=0.1)
    optimizer = sgd(model)

    def target_of(labels: Tensor) -> Tensor:
        return F.one_hot(labels, CLASSES).float()

    for _ in range(150):
        inputs, labels = telling()
        optimizer.zero_grad()
        loss(model(*inputs), target_of(labels)).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        for _ in range(4):
            inputs, labels = telling()
            loss(model(*inputs), target_of(labels))
    results = probes.results()
    assert probes.task == ("labels" if metric == "mAP" else "numbers")
    assert 0.5 < results["audio"] <= 1
    assert results["visual"] < 0.45


def test_a_single_logit():
    torch.manual_seed(0)
    model = Concat(classes=1)
    loss = nn.BCEWithLogitsLoss()
    monitor = watch(model, loss=loss)
    probes = bo.ProbeMonitor(monitor)
    optimizer = sgd(model)
    for training in [True] * 80 + [False] * 3:
        model.train(training)
        inputs, labels = telling()
        optimizer.zero_grad()
        with torch.set_grad_enabled(training):
            value = loss(model(*inputs), (labels > 2).float().unsqueeze(1))
        if training:
            value.backward()
            optimizer.step()
    assert probes.results()["audio"] > 0.9


def test_resume_is_exact(tmp_path: Any):
    model, monitor, probes, _ = probed(20, losses=True)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "probes": probes.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    twin = Concat()
    twin.load_state_dict(saved["model"])
    other = watch(twin)
    resumed = bo.ProbeMonitor(other, losses=True)
    resumed.load_state_dict(saved["probes"])
    for one, its_monitor in ((model, monitor), (twin, other)):
        torch.manual_seed(3)
        train(one, torch.optim.SGD(one.parameters(), lr=0.05), 10)
        validate(one, its_monitor)
    for losses, expected in zip(resumed.take_losses(), probes.take_losses(), strict=True):
        assert torch.equal(losses, expected)
    assert resumed.passes == probes.passes == 30
    assert resumed.results() == probes.results()
    a, b = resumed.state_dict(), probes.state_dict()
    for name, part in a["probes"].items():
        for key, value in part.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(b["probes"][name][key]))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_joint_loss_is_the_models(fusion: str):
    torch.manual_seed(0)
    model = FUSIONS[fusion]()
    monitor = watch(model)
    probes = bo.ProbeMonitor(monitor, losses=True)
    (inputs, labels), (others, targets) = batch(8), batch(5)
    loss = F.cross_entropy(model(*inputs), labels)
    loss.backward()
    assert float(probes.take_losses().train[-1]) == pytest.approx(loss.item(), rel=1e-4)
    model.eval()
    means, rows = [], 0
    with torch.inference_mode():
        for x, y in ((inputs, labels), (others, targets)):
            means.append(F.cross_entropy(model(*x), y).item() * len(y))
            monitor.observe(y)
            rows += len(y)
    assert float(probes.take_losses().val[-1]) == pytest.approx(sum(means) / rows, rel=1e-4)


def test_losses_of_a_loop_that_calls_parts():
    torch.manual_seed(0)
    model = Concat()
    monitor = watch(model)
    probes = bo.ProbeMonitor(monitor, losses=True)

    def loss_of(inputs: list[Tensor], labels: Tensor) -> Tensor:
        return F.cross_entropy(model.fuse(model.encode(*inputs)), labels)

    for _ in range(2):
        loss_of(*telling()).backward()
    model.eval()
    inputs, labels = telling()
    with torch.no_grad():
        value = loss_of(inputs, labels).item()
        monitor.observe(labels)
    assert float(probes.take_losses().val[-1]) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.BCEWithLogitsLoss()])
def test_losses_of_other_tasks(loss: nn.Module):
    torch.manual_seed(0)
    model = Concat()
    probes = bo.ProbeMonitor(watch(model, loss=loss), losses=True)
    inputs, labels = telling()
    target = F.one_hot(labels, CLASSES).float()
    joint = loss(model(*inputs), target)
    joint.backward()
    untrained = loss(torch.zeros_like(target), target)
    losses = probes.take_losses()
    torch.testing.assert_close(losses.train.float(), torch.stack([untrained, untrained, joint.detach()]))
    assert bool(losses.val.isnan().all())
    model.eval()
    with torch.no_grad():
        joint = loss(model(*inputs), target)
    losses = probes.take_losses()
    assert bool((losses.val[:2].float() < untrained).all())
    torch.testing.assert_close(losses.val[2].float(), joint)


def test_losses_start_anew_and_count_valid_samples_only():
    model, monitor, probes, _ = probed(5, losses=True)
    probes.take_losses()
    assert all(bool(x.isnan().all()) for x in probes.take_losses())
    model.eval()
    inputs, labels = telling()
    with torch.no_grad():
        logits = model(*inputs)
        ignored = torch.where(torch.arange(64) < 32, labels, -100)
        monitor.observe(ignored, present={"visual": torch.arange(64) < 0})
    losses = probes.take_losses().val
    assert float(losses[-1]) == pytest.approx(F.cross_entropy(logits[:32], labels[:32]).item(), rel=1e-5)
    assert losses.isnan().tolist() == [False, True, False]
    with torch.no_grad():
        model(inputs[0] * math.nan, inputs[1])
        monitor.observe(labels)
    losses = probes.take_losses().val
    assert losses.isnan().tolist() == [True, False, False]
    assert bool(losses[-1].isinf())


def broken(state: dict[str, Any], how: str) -> Any:
    if how == "no mapping":
        return None
    if how == "missing":
        return {key: value for key, value in state.items() if key != "losses"}
    if how == "count":
        return {**state, "passes": -1}
    if how == "modality":
        return {**state, "probes": {**state["probes"], "smell": state["probes"]["audio"]}}
    if how == "losses":
        return {**state, "losses": {**state["losses"], "val": torch.zeros(2, 2)}}
    probe = dict(state["probes"]["audio"])
    if how == "shape":
        probe["mean"] = torch.zeros(99)
    elif how == "tensor":
        probe["weight"] = [0.0]
    return {**state, "probes": {"audio": probe}}


@pytest.mark.parametrize("how", ["no mapping", "missing", "count", "modality", "losses", "shape", "tensor"])
def test_a_load_that_fails_changes_nothing(how: str):
    *_, probes, _ = probed(5)
    before = probes.state_dict()
    with pytest.raises((TypeError, KeyError, ValueError)):
        probes.load_state_dict(broken(before, how))
    after = probes.state_dict()
    assert torch.equal(before["probes"]["audio"]["weight"], after["probes"]["audio"]["weight"])
    assert before["passes"] == after["passes"]


@pytest.mark.parametrize("end", ["remove", "with", "garbage"])
def test_the_end_leaves_no_hook(end: str):
    model = Concat()
    monitor = watch(model)
    probes = bo.ProbeMonitor(monitor)
    train(model, sgd(model), 2)
    if end == "remove":
        probes.remove()
        probes.remove()
    elif end == "with":
        with probes:
            pass
    else:
        del probes
        gc.collect()
    hooks = monitor.hooks
    assert [
        len(x) for x in (hooks.starts, hooks.outputs, hooks.gradients, hooks.heads, hooks.targets)
    ] == 5 * [0]
    assert not monitor._scorer.buffers


def test_a_copy_is_inert():
    model, monitor, probes, _ = probed(5)
    twin = copy.deepcopy(probes)
    train(model, sgd(model), 3)
    validate(model, monitor)
    assert twin.results() == {}
    assert twin.passes < probes.passes


def test_training_does_not_wait():
    model, monitor, probes, _ = probed(2)
    validate(model, monitor)
    given = [telling() for _ in range(3)]
    optimizer = sgd(model)
    with NoWaiting():
        for inputs, labels in given:
            optimizer.zero_grad()
            F.cross_entropy(model(*inputs), labels).backward()
            optimizer.step()
    assert probes.results()


def test_samples_without_a_modality_do_not_count():
    torch.manual_seed(0)
    model = Concat()
    monitor = watch(model)
    probes = bo.ProbeMonitor(monitor)
    train(model, sgd(model), 80)
    model.eval()
    with torch.no_grad():
        inputs, labels = telling()
        wrong = torch.where(torch.arange(64) < 32, labels, (labels + 1) % CLASSES)
        model(*inputs)
        monitor.observe(wrong, present={"audio": torch.arange(64) < 32})
    assert probes.results()["audio"] > 0.9


def test_a_diagnosis_is_no_validation():
    _, monitor, probes, _ = probed(5)
    loader = [(*telling()[0], telling()[1]) for _ in range(3)]
    bo.diagnose(loader, loader, monitor=monitor)
    assert probes.results() == {}


def test_no_targets_for_each_sample_is_said():
    torch.manual_seed(0)
    model = Concat()
    monitor = watch(model)
    bo.ProbeMonitor(monitor)
    probes = bo.ProbeMonitor(monitor)
    train(model, sgd(model), 3)
    model.eval()
    inputs, labels = telling()
    with torch.no_grad():
        model(*inputs)
    monitor.observe(labels.unsqueeze(1).expand(-1, 3).contiguous())
    with pytest.warns(UserWarning, match="probes need one target for each sample"):
        assert probes.results() == {}


@pytest.mark.parametrize("lr", [0, -1, math.nan, math.inf, "1", None])
def test_the_learning_rate_is_checked(lr: Any):
    with pytest.raises(ValueError, match="`lr` should be a finite number above 0"):
        bo.ProbeMonitor(watch(Concat()), lr=lr)


def test_what_has_no_task_is_refused():
    model = Concat()
    with pytest.raises(TypeError, match="`monitor` should be a ModalityMonitor"):
        bo.ProbeMonitor(model)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ProbeMonitor needs uni-modal scores"):
        bo.ProbeMonitor(watch(model, head=None))
    monitor = watch(model, loss=lambda prediction, target: (prediction - target).square().mean(1))
    with pytest.raises(ValueError, match="a loss function of yours does not tell"):
        bo.ProbeMonitor(monitor)


def test_mean_average_precision():
    score = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.95, 0.0]])
    y = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    weight = torch.tensor([1.0, 1.0, 1.0, 0.0])
    # The first label's positives are ranked 1 and 3 of three samples; the second label has none.
    assert float(mean_average_precision(score, y, weight)) == pytest.approx((1 + 2 / 3) / 2)


def test_a_load_forgets_the_passes_before_it():
    model, monitor, probes, _ = probed(5)
    saved = probes.state_dict()
    validate(model, monitor)
    assert probes.results()
    optimizer = sgd(model)
    train(model, optimizer, 2)
    probes.load_state_dict(saved)
    assert probes.results() == {}
    train(model, optimizer, 2)
    assert probes.passes == saved["passes"] + 1  # the second pass still waits for the next
