"""A recorder of a monitor: plain training, watched without a wrapper of the optimizer."""

from __future__ import annotations

import copy
import gc
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

import balanceopt as bo
from balanceopt import recording, signals
from tests.models import CLASSES, FUSIONS, INPUTS, Concat, Multimodal, TransformerFusion, watch
from tests.training import Batch, backward, grad_of, same_bits, small_model, train
from tests.unit.optim.test_no_waiting import NoWaiting

SIGNALS = ["gradient_norm", "gradient_share", "update_ratio", "feature_norm", "effective_rank", "agreement"]
QUANTITIES = {"score", "ratio", *SIGNALS}
Make = Callable[[Any], torch.optim.Optimizer]


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=0.01)


def lbfgs(params: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(params, max_iter=3)


def batches(model: Multimodal, count: int) -> list[Batch]:
    """Random batches of 8 that depend on nothing but their number."""
    generator = torch.Generator().manual_seed(5)
    sizes = INPUTS[: len(model.modalities)]
    return [
        (
            [torch.randn(8, n, generator=generator) for n in sizes],
            torch.randint(CLASSES, (8,), generator=generator),
        )
        for _ in range(count)
    ]


def run(
    model: Multimodal,
    optimizer: torch.optim.Optimizer,
    steps: int = 4,
    *,
    first: int = 0,
    closure: bool = False,
) -> None:
    for given in batches(model, first + steps)[first:]:

        def evaluated(given: Any = given) -> Tensor:
            optimizer.zero_grad()
            return backward(model, given)

        if closure:
            optimizer.step(evaluated)  # type: ignore[arg-type]
        else:
            evaluated()
            optimizer.step()


def quantities(recorder: bo.Recorder) -> set[str]:
    return {row.quantity for row in recorder.rows()}


def value(recorder: bo.Recorder, quantity: str, name: str, step: int = 0) -> float:
    steps, values = recorder.series(quantity)[name]
    return values[steps.index(step)]


def norm(tensors: Any) -> float:
    return float(torch.cat([x.detach().flatten() for x in tensors]).norm())


@pytest.mark.parametrize("make", [sgd, adam, lbfgs])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_recording_changes_nothing(fusion: str, make: Make):
    model = FUSIONS[fusion]()
    twin = copy.deepcopy(model)
    recorder = bo.Recorder(watch(model))
    generators = []
    for one in (model, twin):
        torch.manual_seed(1)
        run(one, make(one.parameters()), closure=make is lbfgs)
        generators.append(torch.get_rng_state())
    assert same_bits(model, twin)
    assert torch.equal(*generators)
    assert quantities(recorder) == QUANTITIES
    assert {row.step for row in recorder.rows()} == {0, 1, 2, 3}


def test_scores_and_ratios_are_those_of_a_method_that_does_nothing():
    model, twin = small_model(), small_model()
    recorder = bo.Recorder(watch(model))
    run(model, sgd(model.parameters()))
    neutral = bo.ModulatedOptimizer(sgd(twin.parameters()), watch(twin), bo.OGM(0, noise=False))
    expected = bo.Recorder(neutral)
    run(twin, neutral)
    for quantity in ("score", "ratio"):
        assert recorder.series(quantity) == expected.series(quantity)


def test_gradients_and_their_shares():
    model = small_model()
    recorder = bo.Recorder(watch(model))
    optimizer = sgd(model.parameters())
    backward(model, batches(model, 1)[0])
    norms = {name: norm(map(grad_of, e.parameters())) for name, e in model.modalities.items()}
    optimizer.step()
    for name in norms:
        assert value(recorder, "gradient_norm", name) == pytest.approx(norms[name], rel=1e-5)
        share = norms[name] / sum(norms.values())
        assert value(recorder, "gradient_share", name) == pytest.approx(share, rel=1e-5)


def changes(model: Multimodal, before: Multimodal) -> dict[str, float]:
    found = {}
    for name, encoder in model.modalities.items():
        old = list(before.modalities[name].parameters())
        moved = norm(p - q for p, q in zip(encoder.parameters(), old, strict=True))
        found[name] = moved / norm(old)
    return found


@pytest.mark.parametrize("make", [sgd, adam, lbfgs])
def test_the_update_relative_to_the_weights(make: Make):
    model = small_model()
    before = copy.deepcopy(model)
    recorder = bo.Recorder(watch(model))
    run(model, make(model.parameters()), 1, closure=make is lbfgs)
    for name, expected in changes(model, before).items():
        assert value(recorder, "update_ratio", name) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("attached", [False, True])
def test_of_a_modulated_step_the_gradient_before_it_and_the_update_after_it(attached: bool, closure: bool):
    model = small_model()
    before, monitor, base = copy.deepcopy(model), watch(model), sgd(model.parameters())
    modulations = [bo.OGM(5.0, noise=False), bo.OGM(5.0, noise=False, apply_to="update")]
    recorder = bo.Recorder(monitor)
    optimizer = base
    if attached:
        bo.attach(base, monitor, modulations)
    else:
        optimizer = bo.ModulatedOptimizer(base, monitor, modulations)
    norms: dict[str, float] = {}

    def evaluated() -> float:
        loss = backward(model, batches(model, 1)[0])
        norms.update({name: norm(map(grad_of, e.parameters())) for name, e in model.modalities.items()})
        return float(loss)

    if closure:
        optimizer.step(evaluated)
    else:
        evaluated()
        optimizer.step()
    moved = changes(model, before)
    for name in norms:
        assert value(recorder, "gradient_norm", name) == pytest.approx(norms[name], rel=1e-5)
        assert value(recorder, "update_ratio", name) == pytest.approx(moved[name], rel=1e-4)


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("attached", [False, True])
def test_beside_a_method_steps_have_the_methods_numbers(attached: bool, closure: bool):
    model = small_model()
    monitor, base = watch(model), sgd(model.parameters())
    make = bo.attach if attached else bo.ModulatedOptimizer
    source: Any = make(base, monitor, bo.OGM(0.5, noise=False))
    run(model, base if attached else source, 3)
    recorder = bo.Recorder(monitor, source)
    run(model, base if attached else source, 2, first=3, closure=closure)
    assert {row.step for row in recorder.rows()} == {3, 4}
    once = [(row.step, row.quantity, row.modality) for row in recorder.rows()]
    assert len(once) == len(set(once))
    assert quantities(recorder) == QUANTITIES | {"coefficient"}


def test_features():
    model = small_model()
    recorder = bo.Recorder(watch(model))
    (inputs, _), given = batches(model, 1)[0], batches(model, 1)[0]
    features = model.encode(*inputs)
    backward(model, given)
    sgd(model.parameters()).step()
    for name, z in zip(model.modalities, features, strict=True):
        assert value(recorder, "feature_norm", name) == pytest.approx(
            float(z.detach().norm(dim=1).mean()), rel=1e-5
        )
        eigenvalues = torch.linalg.eigvalsh(torch.cov(z.detach().T.double()))
        rank = float(eigenvalues.sum() ** 2 / eigenvalues.square().sum())
        assert value(recorder, "effective_rank", name) == pytest.approx(rank, rel=1e-4)


def test_agreement_with_the_joint_answer():
    model = small_model()
    recorder = bo.Recorder(watch(model))
    (inputs, _), given = batches(model, 1)[0], batches(model, 1)[0]
    joint = model(*inputs).detach()
    weights, bias = model.head.weight.detach().split(model.widths, 1), model.head.bias.detach() / 2
    features = [z.detach() for z in model.encode(*inputs)]
    backward(model, given)
    sgd(model.parameters()).step()
    for name, z, weight in zip(model.modalities, features, weights, strict=True):
        same = (z @ weight.T + bias).argmax(1) == joint.argmax(1)
        assert value(recorder, "agreement", name) == pytest.approx(float(same.float().mean()))


def test_a_modality_without_samples_makes_no_row():
    model = small_model()
    monitor = watch(model)
    recorder = bo.Recorder(monitor)
    inputs, labels = batches(model, 1)[0]
    monitor.observe(labels, present={"visual": torch.zeros(8, dtype=torch.bool)})
    backward(model, (inputs, labels))
    sgd(model.parameters()).step()
    assert set(recorder.series("score")) == {"audio"}
    assert recorder.series("ratio") == {}


def test_a_modality_without_a_gradient_makes_no_row_of_it():
    model = small_model()
    model.encoders["visual"].requires_grad_(False)
    recorder = bo.Recorder(watch(model))
    run(model, sgd(model.parameters()), 1)
    assert recorder.series("gradient_share") == {"audio": ([0], [1.0])}
    assert value(recorder, "update_ratio", "visual") == 0


def test_numbers_that_are_not_finite_are_rows():
    model = small_model()
    recorder = bo.Recorder(watch(model))
    inputs, labels = batches(model, 1)[0]
    inputs[0][0, 0] = torch.nan
    backward(model, (inputs, labels))
    sgd(model.parameters()).step()
    for quantity in ("gradient_norm", "feature_norm", "effective_rank"):
        assert math.isnan(value(recorder, quantity, "audio")), quantity


def test_features_that_are_all_equal_have_rank_0():
    assert bo.functional.effective_rank(torch.ones(5, 3)) == 0


def test_every():
    model = small_model()
    recorder = bo.Recorder(watch(model), every=3)
    run(model, sgd(model.parameters()), 7)
    assert {row.step for row in recorder.rows()} == {0, 3, 6}
    assert quantities(recorder) == QUANTITIES


def test_micro_batches_are_one_step():
    model = small_model()
    recorder = bo.Recorder(watch(model))
    optimizer = sgd(model.parameters())
    for number, given in enumerate(batches(model, 6)):
        backward(model, given)
        if number % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
    assert {row.step for row in recorder.rows()} == {0, 1}


def test_a_resumed_run_goes_on_with_the_rows(tmp_path: Path):
    whole, parts = small_model(), small_model()
    expected = bo.Recorder(watch(whole))
    run(whole, sgd(whole.parameters()), 5)
    first = bo.Recorder(watch(parts))
    optimizer = sgd(parts.parameters())
    run(parts, optimizer, 3)
    torch.save(first.state_dict(), tmp_path / "recorder.pt")
    first.remove()
    resumed = bo.Recorder(watch(parts))
    resumed.load_state_dict(torch.load(tmp_path / "recorder.pt", weights_only=True))
    run(parts, optimizer, 2, first=3)
    assert resumed.rows() == expected.rows()


@pytest.mark.parametrize(
    "state",
    [
        None,
        {},
        {"rows": []},
        {"rows": 3, "steps": 1},
        {"rows": [], "steps": -1},
        {"rows": [(1, "score")], "steps": 1},
    ],
)
def test_a_state_that_is_none_changes_nothing(state: Any):
    model = small_model()
    recorder = bo.Recorder(watch(model))
    run(model, sgd(model.parameters()), 1)
    rows = recorder.rows()
    with pytest.raises((TypeError, KeyError, ValueError)):
        recorder.load_state_dict(state)
    assert recorder.rows() == rows


def test_several_optimizers_are_one_step():
    model = small_model()
    recorder = bo.Recorder(watch(model))
    parts = [*model.modalities.values(), model.head]
    optimizers = [sgd(part.parameters()) for part in parts]
    before = copy.deepcopy(model)
    for number, given in enumerate(batches(model, 2)):
        model.zero_grad()
        backward(model, given)
        for optimizer in optimizers:
            optimizer.step()
        if number == 0:
            moved = changes(model, before)
    assert {row.step for row in recorder.rows()} == {0, 1}
    for name in model.modalities:
        assert value(recorder, "update_ratio", name) == pytest.approx(moved[name], rel=1e-4)


class Outer(torch.optim.Optimizer):
    """An optimizer that steps another one, and then goes half of the way back."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        super().__init__([p for group in inner.param_groups for p in group["params"]], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        old = [p.clone() for group in self.param_groups for p in group["params"]]
        self.inner.step()
        for p, q in zip((p for group in self.param_groups for p in group["params"]), old, strict=True):
            p.lerp_(q, 0.5)


def test_an_optimizer_inside_another_one():
    model = small_model()
    before = copy.deepcopy(model)
    recorder = bo.Recorder(watch(model))
    run(model, Outer(sgd(model.parameters())), 1)
    for name, expected in changes(model, before).items():
        steps, values = recorder.series("update_ratio")[name]
        assert steps == [0]
        assert values == pytest.approx([expected], rel=1e-4)


def test_other_models_steps_are_not_recorded():
    model, other = small_model(), small_model()
    recorder = bo.Recorder(watch(model))
    run(other, sgd(other.parameters()))
    assert recorder.rows() == []


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_of_gradients(fused: bool):
    model, twin = small_model(), small_model()
    recorder, expected = bo.Recorder(watch(model)), bo.Recorder(watch(twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    for inputs, labels in batches(model, 2):
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(*inputs), labels)).backward()
        scaler.step(optimizer)
        scaler.update()
    run(twin, torch.optim.SGD(twin.parameters(), lr=0.1, fused=fused), 2)
    for quantity in QUANTITIES:
        for name, (steps, values) in expected.series(quantity).items():
            recorded_steps, recorded_values = recorder.series(quantity)[name]
            assert recorded_steps == steps
            assert recorded_values == pytest.approx(values, rel=1e-4), quantity


def test_features_without_a_head():
    model = small_model()
    recorder = bo.Recorder(watch(model, head=None))
    run(model, sgd(model.parameters()))
    assert quantities(recorder) == QUANTITIES - {"score", "ratio", "agreement"}


def test_one_modality_has_no_ratio():
    model = Concat(1)
    recorder = bo.Recorder(watch(model))
    run(model, sgd(model.parameters()))
    assert quantities(recorder) == QUANTITIES - {"ratio"}


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.BCEWithLogitsLoss(), nn.L1Loss()])
def test_other_losses(loss: nn.Module):
    model = small_model()
    monitor = watch(model, loss=loss)
    recorder = bo.Recorder(monitor)
    optimizer = sgd(model.parameters())
    for inputs, labels in batches(model, 3):
        optimizer.zero_grad()
        loss(model(*inputs), F.one_hot(labels, 5).float()).backward()
        optimizer.step()
    assert quantities(recorder) == QUANTITIES
    assert all(-1 <= row.value <= 1 for row in recorder.rows() if row.quantity == "agreement")


# -- nothing stays ----------------------------------------------------------------------------------------------------


def hooks_on_optimizers() -> int:
    gc.collect()  # recorders of other tests
    return len(torch_optimizer._global_optimizer_pre_hooks) + len(
        torch_optimizer._global_optimizer_post_hooks
    )


def assert_nothing_listens(monitor: bo.ModalityMonitor) -> None:
    hooks = monitor.hooks
    steps = (hooks.before_step, hooks.after_closure, hooks.after_step)
    assert [len(registry) for registry in (hooks.outputs, hooks.gradients, *steps)] == [0, 0, 0, 0, 0]
    assert not monitor._scorer.buffers


@pytest.mark.parametrize("end", ["remove", "with", "garbage", "error"])
def test_the_end_leaves_no_hook(end: str):
    before = hooks_on_optimizers()
    model = small_model()
    monitor = watch(model)
    recorder = bo.Recorder(monitor)
    assert hooks_on_optimizers() == before + 2
    run(model, sgd(model.parameters()), 1)
    count = len(recorder.rows())
    if end == "remove":
        recorder.remove()
        recorder.remove()
    elif end == "with":
        with recorder:
            pass
    elif end == "error":
        with pytest.raises(ZeroDivisionError), recorder:
            raise ZeroDivisionError
    else:
        del recorder
        gc.collect()
    assert hooks_on_optimizers() == before
    assert_nothing_listens(monitor)
    run(model, sgd(model.parameters()), 1)
    if end != "garbage":
        assert len(recorder.rows()) == count


def test_a_step_that_raises_leaves_the_next_one_right():
    model = small_model()
    recorder = bo.Recorder(watch(model))
    optimizer = sgd(model.parameters())

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = optimizer.register_step_pre_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model, optimizer, 1)
    hook.remove()
    before = copy.deepcopy(model)
    run(model, optimizer, 1)
    for name, expected in changes(model, before).items():
        assert value(recorder, "update_ratio", name, step=1) == pytest.approx(expected, rel=1e-4)


def test_copies_hold_the_rows_and_hear_nothing():
    model = small_model()
    recorder = bo.Recorder(watch(model), log=lambda name, value, step: None)
    run(model, sgd(model.parameters()), 1)
    copies = [copy.deepcopy(recorder), pickle.loads(pickle.dumps(recorder))]
    rows, hooks = recorder.rows(), hooks_on_optimizers()
    run(model, sgd(model.parameters()), 1)
    for one in copies:
        assert one.rows() == rows
        one.remove()
    assert hooks_on_optimizers() == hooks
    assert len(recorder.rows()) == 2 * len(rows)


def test_a_copied_model_is_not_recorded():
    model = small_model()
    recorder = bo.Recorder(watch(model))
    twin = copy.deepcopy(model)
    run(twin, sgd(twin.parameters()))
    assert recorder.rows() == []


def test_a_monitor_without_a_recorder_makes_no_scores():
    model = small_model()
    monitor = watch(model)
    run(model, sgd(model.parameters()), 1)  # the first pass shows the layout
    recorder = bo.Recorder(monitor)
    recorder.remove()
    run(model, sgd(model.parameters()), 1)
    assert monitor.hooks.latest is not None
    assert not monitor.hooks.latest.unimodal


def test_a_method_that_only_its_recorder_refers_to_goes_on():
    model = small_model()
    recorder = bo.Recorder(bo.OPM(watch(model), q_base=0.3))
    gc.collect()
    run(model, sgd(model.parameters()), 4)
    assert "drop_probability" in quantities(recorder) or "q" in quantities(recorder)


def test_a_step_does_not_wait(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(recording, "on_host", lambda tensor: None)
    model = TransformerFusion()
    recorder = bo.Recorder(watch(model))
    optimizer = sgd(model.parameters())
    run(model, optimizer, 1)
    given = batches(model, 4)[1:]
    with NoWaiting():
        train(model, optimizer, given)
    assert {row.step for row in recorder.rows()} == {0, 1, 2, 3}


# -- what can't be recorded is said ---------------------------------------------------------------------------------


def test_training_without_an_optimizer_is_said():
    model = small_model()
    recorder = bo.Recorder(watch(model))
    for given in batches(model, 2):
        backward(model, given)
    with pytest.warns(UserWarning, match="2 training forwards were seen, and no step of an optimizer"):
        assert recorder.rows() == []


def test_steps_without_scores_are_said():
    model = small_model()
    recorder = bo.Recorder(watch(model))
    optimizer = sgd(model.parameters())

    def train_encoders() -> None:
        for inputs, _ in batches(model, 10):
            optimizer.zero_grad()
            torch.cat(model.encode(*inputs)).sum().backward()
            optimizer.step()

    with pytest.warns(UserWarning, match="no score came in 10 steps"):
        train_encoders()
    assert "score" not in quantities(recorder)
    assert "gradient_norm" in quantities(recorder)


# -- large encoders are sampled -------------------------------------------------------------------------------------


def test_a_sample_of_the_weights_is_enough(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(signals, "_SAMPLED", 2**12)
    model = Concat(
        encoder=lambda n, d: nn.Sequential(nn.Linear(n, 300), nn.Linear(300, 300), nn.Linear(300, d))
    )
    before = copy.deepcopy(model)
    recorder = bo.Recorder(watch(model))
    run(model, torch.optim.Adam(model.parameters(), lr=1e-3), 1)
    for name, expected in changes(model, before).items():
        assert value(recorder, "update_ratio", name) == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("layout", ["plain", "channels_last", "transposed", "complex"])
def test_a_stride_of_1_takes_every_element(layout: str):
    x = torch.randn(3, 4, 5, 6)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        x = x.transpose(0, 3)
    elif layout == "complex":
        x = torch.view_as_complex(torch.randn(3, 4, 2))
    taken = signals.sample([nn.Parameter(x)], 1)
    everything = torch.view_as_real(x) if x.is_complex() else x
    assert torch.equal(taken.sort().values, everything.flatten().sort().values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_norms_of_any_dtype(dtype: torch.dtype):
    p = nn.Parameter(torch.full((70_000,), 300.0, dtype=dtype))
    p.grad = torch.full_like(p, 300.0)
    assert float(signals.norm_of_gradients([p]) or 0) == pytest.approx(300 * 70_000**0.5, rel=1e-3)


def test_a_batch_without_samples_is_no_nan():
    model = Concat()
    recorder = bo.Recorder(watch(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs, labels = batches(model, 1)[0]
    for size in (8, 0, 8):
        optimizer.zero_grad()
        F.cross_entropy(model(*(x[:size] for x in inputs)), labels[:size], reduction="sum").backward()
        optimizer.step()
    quantities = {step: {row.quantity for row in recorder.rows() if row.step == step} for step in range(3)}
    assert {"feature_norm", "gradient_share"} <= quantities[0] == quantities[2]
    assert quantities[1] == {"gradient_norm", "update_ratio"}
    assert all(math.isfinite(row.value) for row in recorder.rows())
