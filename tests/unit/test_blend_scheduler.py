"""BlendScheduler: when it measures, what it does with losses that say nothing, and its life."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch

import balanceopt as bo
from balanceopt.probes import ProbeLosses
from tests.blending import Run
from tests.models import CLASSES, Concat, watch
from tests.training import same_bits

START = {"audio": 1.0, "visual": 1.0}


def measured(run: Run, monkeypatch: pytest.MonkeyPatch, *rows: list[list[float]]) -> list[Any]:
    """Results of steps that find these training and validation losses (audio, visual, joint)."""
    results = []
    for train, val in rows:
        losses = ProbeLosses(*(torch.tensor(x, dtype=torch.float64) for x in (train, val)))
        monkeypatch.setattr(run.probes, "take_losses", lambda losses=losses: losses)
        results.append(run.scheduler.step())
    return results


def test_it_measures_after_the_first_epoch_and_every_super_epoch():
    run = Run(every=3)
    recorder = bo.Recorder(run.scheduler)
    results = [run.epoch(epoch) for epoch in range(8)]
    assert [result is not None for result in results] == [False] * 3 + [True] + [False] * 2 + [True, False]
    assert dict(run.objective.weight) == results[6] != results[3] != START
    steps, values = recorder.series("loss_weight")["audio"]
    assert steps == [4, 7]
    assert results[3] is not None
    assert values[0] == results[3]["audio"]
    assert set(recorder.series("gain")) == set(recorder.series("overfitting")) == {"audio", "visual"}


BEFORE = [[1.6, 1.6, 1.6], [1.6, 1.6, 1.6]]


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        # gains 0.6, 0.3, 0.6 and gaps 0.2, 0.1, 0.2: w is proportional to 15, 30, 15
        ([[0.8, 1.2, 0.8], [1.0, 1.3, 1.0]], {"audio": 1.0, "visual": 2.0}),
        # the visual validation loss rose
        ([[0.8, 1.2, 0.8], [1.0, 1.7, 1.0]], {"audio": 1.0, "visual": 0.0}),
        # the joint one rose: its share counts as 0.1
        ([[0.8, 0.8, 1.4], [1.0, 1.0, 1.7]], {"audio": 5.0, "visual": 5.0}),
        # only the joint one gained
        ([[1.6, 1.6, 0.8], [1.6, 1.7, 1.0]], {"audio": 0.0, "visual": 0.0}),
        # nobody gained: the weights stay
        ([[1.6, 1.6, 0.8], [1.7, 1.7, 1.6]], START),
    ],
)
def test_weights_of_given_losses(
    after: list[list[float]], expected: dict[str, float], monkeypatch: pytest.MonkeyPatch
):
    run = Run(every=1)
    assert measured(run, monkeypatch, BEFORE)[0] is None
    (result,) = measured(run, monkeypatch, after)
    assert result == pytest.approx(expected, rel=1e-9)
    assert dict(run.objective.weight) == result


@pytest.mark.parametrize("inject", [False, True])
def test_a_loss_of_weight_0_can_come_back(inject: bool, monkeypatch: pytest.MonkeyPatch):
    run = Run(every=1, inject=inject)
    only_joint = [[1.6, 1.6, 0.8], [1.6, 1.6, 1.0]]
    measured(run, monkeypatch, BEFORE, only_joint)
    head = copy.deepcopy(run.model).encoders["audio"]
    run.train(run.training(0))
    assert not any(p.grad is not None for p in run.objective.parameters())
    assert not same_bits(head, run.model.encoders["audio"])  # the joint loss goes on
    all_gain = [[0.8, 1.2, 0.4], [1.0, 1.3, 0.6]]
    measured(run, monkeypatch, all_gain)
    run.train(run.training(1))
    assert all(p.grad is not None for p in run.objective.parameters())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("split", [0, 1])
def test_losses_that_are_not_finite_are_left_out(bad: float, split: int, monkeypatch: pytest.MonkeyPatch):
    run, twin = Run(every=1), Run(every=1)
    after = [[0.8, 1.2, 0.8], [1.0, 1.3, 1.0]]
    spoilt = copy.deepcopy(after)
    spoilt[split][1] = bad
    measured(run, monkeypatch, BEFORE)
    with pytest.warns(UserWarning, match=r"leaves the weights as they are: the losses of \['visual'\]"):
        assert measured(run, monkeypatch, spoilt, spoilt) == [None, None]  # one warning
    assert dict(run.objective.weight) == START
    assert run.scheduler.stats() == {"unusable_losses": 2}
    expected = measured(twin, monkeypatch, BEFORE, after)[1]
    assert measured(run, monkeypatch, after) == [expected]


def test_a_modality_that_validation_lacks():
    run = Run(every=1)
    run.epoch(0)
    run.train(run.training(1))
    for one in run.validation():
        run.validate([one], present={"visual": torch.zeros(len(one[1]), dtype=torch.bool)})
    with pytest.warns(UserWarning, match=r"the losses of \['visual'\] are missing"):
        assert run.scheduler.step() is None
    assert run.epoch(2) is not None


def test_without_validation_the_first_measure_raises():
    run = Run(every=2)
    run.train(run.training(0))
    with pytest.raises(RuntimeError, match="no validation came since the last step: run the model"):
        run.scheduler.step()
    assert run.scheduler.last_epoch == 0
    assert run.epoch(0) is None
    run.train(run.training(1))
    assert run.scheduler.step() is None  # no measure is due
    run.train(run.training(2))
    with pytest.raises(RuntimeError, match="no validation came"):
        run.scheduler.step()
    run.validate(run.validation())
    with pytest.raises(RuntimeError, match="no training pass with targets came"):
        run.scheduler.step()
    assert dict(run.objective.weight) == START


def test_a_model_that_diverged_keeps_its_weights_of_losses():
    run = Run(every=1)
    run.epoch(0)
    with torch.no_grad():
        next(run.model.parameters()).fill_(math.nan)
    run.train(run.training(1))
    with pytest.warns(UserWarning, match="leaves the weights as they are"):
        assert run.scheduler.step() is None
    assert dict(run.objective.weight) == START


def test_a_validation_that_broke_off_does_not_count_twice():
    run, twin = Run(every=1), Run(every=1)
    for one in (run, twin):
        one.train(one.training(0))
    first, second = run.validation()
    for pair in ([first], [second]):
        run.validate(pair)
        run.model.eval()
        with torch.no_grad(), pytest.raises(RuntimeError, match="shape"):
            run.model(first[0][0], first[0][0])  # no targets come of it
    twin.validate([first, second])
    for one in (run, twin):
        one.scheduler.step()
    for a, b in zip(run.scheduler.state_dict()["losses"], twin.scheduler.state_dict()["losses"], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("inject", [False, True])
@pytest.mark.parametrize("within", [False, True], ids=["between epochs", "in an epoch"])
def test_a_resumed_run_goes_on_bit_for_bit(inject: bool, within: bool):
    """In the middle of a super-epoch, after a first blend."""
    run = Run(inject=inject)
    for epoch in range(4):
        run.epoch(epoch)
    assert dict(run.objective.weight) != START
    rest = run.training(4)
    if within:
        run.train(rest[:1])
        rest = rest[1:]
    file = io.BytesIO()
    torch.save(run.state(), file)
    file.seek(0)
    twin = Run(inject=inject)
    twin.load(torch.load(file, weights_only=True))
    assert twin.objective.weight == run.objective.weight
    for one in (run, twin):
        one.train(rest)
        one.validate(one.validation())
        assert one.scheduler.step() is not None
        one.train(one.training(5))
    assert twin.objective.weight == run.objective.weight
    assert same_bits(run.model, twin.model)


def test_an_exception_undoes_the_step():
    run = Run(every=1)
    run.epoch(0)
    before = run.scheduler.state_dict()

    def fails(*_: Any) -> None:
        raise OSError("disk full")

    run.scheduler.listeners.append(fails)
    with pytest.raises(OSError, match="disk full"):
        run.epoch(1)
    after = run.scheduler.state_dict()
    assert torch.equal(before.pop("losses"), after.pop("losses"))
    assert before == after


def test_removed_it_leaves_the_weights():
    run = Run(every=1)
    with run.scheduler:
        run.epoch(0)
        weights = run.epoch(1)
    assert run.epoch(2) is None
    assert dict(run.objective.weight) == weights


def test_what_cannot_be_blended_is_refused():
    monitor = watch(Concat())
    probes = bo.ProbeMonitor(monitor, losses=True)
    for options in ({"joint": 0.5}, {"weight": 0.0}):
        with pytest.raises(ValueError, match="`objective` should have joint=1"):
            bo.BlendScheduler(bo.UnimodalObjective(monitor, CLASSES, **options), probes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"with the objective's monitor and losses=True\. Found another"):
        bo.BlendScheduler(bo.UnimodalObjective(watch(Concat()), CLASSES), probes)
    probes = bo.ProbeMonitor(monitor)
    with pytest.raises(ValueError, match=r"and losses=True\. Found losses=False"):
        bo.BlendScheduler(bo.UnimodalObjective(monitor, CLASSES), probes)
    with pytest.raises(RuntimeError, match=r"build them with ProbeMonitor\(monitor, losses=True\)"):
        probes.take_losses()
