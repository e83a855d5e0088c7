"""The three bases that methods stand on, each by a method of a few lines as a user would write it."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import balanceopt as bo
from tests.models import watch
from tests.training import batches, groups_of, modulated, same_bits, sgd, small_model, train


class Slower(bo.GradientScaling):
    """Slows whoever is above the running mean of the scores; has a state, counts a name of its own."""

    def __init__(self, start: int = 0, end: int | None = None) -> None:
        super().__init__(start=start, end=end)
        self.mean: Tensor | None = None

    def coefficients(self, step: bo.StepContext) -> Tensor:
        score = step.scores.mean_score
        self.mean = score if self.mean is None else 0.9 * self.mean + 0.1 * score
        step.report("mean", self.mean)
        step.count("above", (score > self.mean).sum())
        return torch.where(score > self.mean.mean(), 0.5, 1.0)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.mean is None else {"mean": self.mean}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.mean = state.get("mean")


class Noise(bo.ForwardMethod):
    """Adds noise to the features in training."""

    def transform(self, name: str, features: Tensor, current: Any) -> Tensor:
        generator = self.generator(current, features.device)
        return features + torch.randn(features.shape, generator=generator)


class Decay(bo.EpochMethod):
    """Shrinks the encoders between epochs."""

    def run(self, epoch: int) -> float:
        with torch.no_grad():
            for params in self.monitor.parameters.values():
                for p in params:
                    p.mul_(0.5)
        return 0.5


def test_repr_shows_the_options_that_a_method_names():
    class Scaled(Noise):
        def __init__(
            self, monitor: bo.ModalityMonitor, *, scale: float = 0.1, unused: int = 0, **options: Any
        ):
            super().__init__(monitor, **options)
            self.scale = scale

    assert repr(Scaled(watch(small_model()), end=3)) == "Scaled(scale=0.1)"
    assert repr(Slower(end=3)) == "Slower(start=0, end=3)"
    assert repr(bo.OPM(watch(small_model()), seed=1)).endswith("end=None, unit='step', seed=1)")


def test_a_gradient_method_is_its_coefficients():
    model, optimizer = modulated(Slower())
    twin = small_model()
    train(model, optimizer, batches(model, 1))
    train(twin, sgd(groups_of(twin)), batches(twin, 1))
    start = small_model()
    for name, factor in (("audio", 0.5), ("visual", 1.0)):
        for p, q, s in zip(*(m.modalities[name].parameters() for m in (model, twin, start)), strict=True):
            torch.testing.assert_close((p - s).detach(), factor * (q - s).detach(), rtol=1e-4, atol=1e-6)


def test_every_name_that_a_method_counts_is_in_the_stats():
    model, optimizer = modulated(Slower())
    train(model, optimizer, batches(model, 3))
    assert optimizer.stats()["above"] > 0
    assert isinstance(optimizer.modulation, Slower)
    assert optimizer.modulation.stats()["above"] == optimizer.stats()["above"]
    assert optimizer.stats()["modulated"] == 3


@pytest.mark.parametrize("make", [Slower, bo.AGM])
@pytest.mark.parametrize("form", ["wrapper", "hooks"])
def test_its_state_is_in_the_optimizers_checkpoint(make: Any, form: str):
    def build() -> tuple[Any, Any, Any]:
        model = small_model()
        base = sgd(groups_of(model), momentum=0.9)
        if form == "wrapper":
            return model, bo.ModulatedOptimizer(base, watch(model), make(), seed=3), None
        return model, base, bo.attach(base, watch(model), make(), seed=3)

    model, optimizer, _ = build()
    train(model, optimizer, batches(model, 3))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    train(model, optimizer, batches(model, 3, first=3))
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    twin, again, handle = build()
    twin.load_state_dict(weights)
    again.load_state_dict(state)
    train(twin, again, batches(twin, 3, first=3))
    assert same_bits(model, twin)
    del handle


def test_removed_methods_act_no_more():
    model, optimizer = modulated(Slower())
    twin = small_model()
    with optimizer.modulation as method:  # type: ignore[union-attr]
        pass
    assert method.removed
    train(model, optimizer, batches(model, 2))
    train(twin, sgd(groups_of(twin)), batches(twin, 2))
    assert same_bits(model, twin)


def test_a_bad_number_of_coefficients_is_refused():
    class Wrong(bo.GradientScaling):
        def coefficients(self, step: bo.StepContext) -> Tensor:
            return torch.ones(3)

    model, optimizer = modulated(Wrong())
    with pytest.raises(ValueError, match=r"Wrong.coefficients should return one factor for each of"):
        train(model, optimizer, batches(model, 1))


def test_coefficients_that_are_not_finite_leave_the_base_alone():
    class Bad(bo.GradientScaling):
        def coefficients(self, step: bo.StepContext) -> Tensor:
            return torch.full_like(step.scores.mean_score, torch.nan)

    model, optimizer = modulated(Bad())
    twin = small_model()
    train(model, optimizer, batches(model, 2))
    train(twin, sgd(groups_of(twin)), batches(twin, 2))
    assert same_bits(model, twin)


def test_one_method_acts_in_one_optimizer():
    method = Slower()
    _, optimizer = modulated(method)
    with pytest.raises(
        ValueError, match=r"this Slower keeps a state, and acts in another optimizer already. Build one"
    ):
        modulated(method)
    optimizer.remove()
    modulated(method)


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", '[["AGM", 3]]', '[["AGM", {}]]', '[["AGM", {"total": 1, "steps": 2}]]']
)
def test_a_damaged_state_is_refused_and_changes_nothing(text: str):
    model, optimizer = modulated(bo.AGM())
    train(model, optimizer, batches(model, 2))
    agm = optimizer.modulation
    assert isinstance(agm, bo.AGM)
    before, weights = agm.state_dict(), copy.deepcopy(optimizer.state_dict())
    broken = optimizer.state_dict()
    for group in broken["param_groups"]:
        group["balanceopt_methods"] = text
        group["lr"] = 99.0
    with pytest.raises((ValueError, TypeError, KeyError)):
        optimizer.load_state_dict(broken)
    assert torch.equal(agm.state_dict()["total"], before["total"])
    assert optimizer.param_groups[0]["lr"] == weights["param_groups"][0]["lr"]


def test_another_methods_state_is_said_and_left():
    model, optimizer = modulated(bo.AGM())
    train(model, optimizer, batches(model, 2))
    _, other = modulated(Slower())
    with pytest.warns(
        UserWarning, match=r"holds the states of the methods \['AGM'\], this optimizer has \['Slower'\]"
    ):
        other.load_state_dict(optimizer.state_dict())


def test_a_forward_method_changes_features_in_training_alone():
    model = small_model()
    method = Noise(watch(model), start=1, seed=0)
    given = batches(model, 1)[0][0]
    clean = small_model()(*given)
    assert torch.equal(model(*given), clean)  # before its window
    assert not torch.equal(model(*given), clean)
    model.eval()
    assert torch.equal(model(*given), clean)
    model.train()
    with torch.no_grad():
        assert torch.equal(model(*given), clean)
    assert method.stats() == {"forwards": 2}
    method.remove()
    assert torch.equal(model(*given), clean)


def test_a_forward_method_resumes_bit_for_bit_and_is_the_same_when_run_again():
    model, twin = small_model(), small_model()
    method = Noise(watch(model), seed=5)
    given = batches(model, 1)[0][0]
    model(*given)
    state = method.state_dict()
    again = Noise(watch(twin), seed=9)
    again.load_state_dict(state)
    assert torch.equal(model(*given), twin(*given))

    def checkpointed(m: Any) -> Tensor:
        run = torch.utils.checkpoint.checkpoint
        encoded = [
            run(m.modalities[n], x, use_reentrant=False) for n, x in zip(m.modalities, given, strict=True)
        ]
        result: Tensor = m.head(torch.cat(encoded, 1))
        return result

    plain, rerun = small_model(), small_model()
    one, two = Noise(watch(plain), seed=1), Noise(watch(rerun), seed=1)
    plain.head(
        torch.cat([plain.modalities[n](x) for n, x in zip(plain.modalities, given, strict=True)], 1)
    ).sum().backward()
    checkpointed(rerun).sum().backward()
    for p, q in zip(plain.parameters(), rerun.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.equal(p.grad, q.grad)
    assert one.forwards == two.forwards == 1


def test_a_forward_method_that_nobody_holds_goes_with_its_hooks():
    model = small_model()
    monitor = watch(model)
    method = Noise(monitor, seed=0)
    gone = weakref.ref(method)
    del method
    gc.collect()
    assert gone() is None
    assert len(monitor.hooks.transforms) == 0


def test_an_epoch_method_acts_between_epochs_and_resumes():
    model = small_model()
    method = Decay(watch(model), start=1, end=1)
    assert [method.step() for _ in range(3)] == [None, 0.5, None]
    assert method.last_epoch == 3
    again = Decay(watch(small_model()), start=1)
    again.load_state_dict(method.state_dict())
    assert again.last_epoch == 3
    assert again.step() == 0.5
    with pytest.raises(ValueError, match="`last_epoch` should be a whole number"):
        again.load_state_dict({"last_epoch": -1})
    assert again.last_epoch == 4


@pytest.mark.parametrize("make", [Noise, Decay])
@pytest.mark.parametrize("wrong", [None, "model", bo.ModalityMonitor])
def test_what_is_no_monitor_is_refused(make: Any, wrong: Any):
    with pytest.raises(TypeError, match="`monitor` should be a ModalityMonitor"):
        make(wrong)
