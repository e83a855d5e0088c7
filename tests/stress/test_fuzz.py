"""Any order of what users and frameworks do: no exception that is not documented, every step accounted for."""

from __future__ import annotations

import copy
import io
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

import balanceopt as bo
from tests.everything import Everything, everything, hooks_on, momentum
from tests.models import CLASSES, INPUTS, Concat, Gated, Multimodal
from tests.training import same_bits

THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
IGNORED = -100

# All that may be said of what the machine does.
SAID = (
    "the gap between training and validation purity says nothing of these modalities",
    "no scores since the last step",
    "no scores in 10 training forwards in a row",
    "scores are not finite, all zero, or of fewer than two modalities",
    "gradients that are not finite were left",
    "no encoder's parameter in this optimizer has a gradient",
    "the optimizer state that was loaded has been trained, and balanceopt's step counter in it is 0",
    r"the encoder of '\w+' was not called in a forward in which features",
)

METHODS: dict[str, Any] = {
    "OGM": lambda: [bo.OGM(0.5, noise=False)],
    "OGM-GE": lambda: [bo.OGM(0.5)],
    "OGM update": lambda: [bo.OGM(0.5, noise=False, apply_to="update")],
    "AMSS": lambda: [bo.AMSS(scale="unbiased")],
    "window": lambda: [bo.OGM(0.5, start=1, end=3), bo.AMSS(start=2, end=4)],
    "both": lambda: [bo.OGM(0.5), bo.AMSS()],
}
BASES: dict[str, Any] = {
    "momentum": momentum,
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.005),
    "AdamW fused": lambda groups: torch.optim.AdamW(groups, lr=0.005, fused=True),
}


class Absent:
    """Encoders of inputs that are None are not called; the fusion gets a constant."""

    def encode(self: Any, *inputs: Tensor | None) -> list[Any]:
        size = next(len(x) for x in inputs if x is not None)
        pairs = zip(self.encoders.values(), inputs, strict=True)
        return [torch.full((size, 4), 0.5) if x is None else encoder(x) for encoder, x in pairs]


class OptionalConcat(Absent, Concat):
    pass


class OptionalGated(Absent, Gated):
    pass


FUSIONS: dict[str, Any] = {"split": OptionalConcat, "zero-out": OptionalGated}

sizes = st.integers(1, 5)
seeds = st.integers(0, 10**6)


class Training(RuleBasedStateMachine):
    """Keeps its own account of what must have happened, and compares."""

    @initialize(
        method=st.sampled_from(sorted(METHODS)),
        base=st.sampled_from(sorted(BASES)),
        fusion=st.sampled_from(sorted(FUSIONS)),
        modalities=st.integers(2, 3),
        attached=st.booleans(),
    )
    def start(self, method: str, base: str, fusion: str, modalities: int, attached: bool) -> None:
        self.chosen: dict[str, Any] = {"method": method, "base": base, "fusion": fusion, "attached": attached}
        self.modalities = modalities
        self.added = False  # whether the parameters held back were given to the optimizer
        self.all: Everything = self.build(self.new_model())
        self.begin()
        self.number = self.forwards = 0
        self.epoch: int | None = None

    def begin(self) -> None:
        """What objects just built have to show."""
        self.counts = {"modulated": 0, "unusable_scores": 0, "without_scores": 0, "outside_window": 0}
        self.silent = self.useless = 0
        self.dead = False  # whether the latest forward in training has no backward
        self.left = False  # whether it was before this modulation: no step of it closes that pass
        self.discard()
        self.hooks = hooks_on(self.all.model)

    def discard(self) -> None:
        """No pass is waiting for a step."""
        self.scored = self.unlabelled = False  # a step or zero_grad closed the pass
        self.present: set[int] = set()  # modalities of the passes since
        self.sums: tuple[Tensor, Tensor] | None = (torch.zeros(self.modalities), torch.zeros(self.modalities))

    def new_model(self) -> Multimodal:
        with torch.random.fork_rng([]):
            torch.manual_seed(3)
            return FUSIONS[self.chosen["fusion"]](self.modalities)

    def build(self, model: Multimodal) -> Everything:
        groups = bo.modality_groups(model, model.modalities)
        held_back = groups.pop() if not self.added else None
        assert held_back is None or held_back["modality"] is None
        chosen = METHODS[self.chosen["method"]]()
        made = everything(
            model, chosen, make=BASES[self.chosen["base"]], groups=groups, attached=self.chosen["attached"]
        )
        self.methods = chosen
        self.listen(made)
        return made

    def listen(self, to: Everything) -> None:
        self.heard: list[tuple[int, str, Tensor]] = []
        to.balanced.listeners[:] = [lambda n, quantity, _, x: self.heard.append((n, quantity, x.clone()))]

    @property
    def stats(self) -> dict[str, int]:
        return self.all.balanced.stats()

    # -- passes --------------------------------------------------------------------------------------------------

    def draw(self, seed: int, size: int) -> tuple[list[Any], Tensor]:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(CLASSES, (size,), generator=generator)
        inputs = [torch.randn(size, n, generator=generator) for n in INPUTS[: self.modalities]]
        inputs[0] = inputs[0] + 3 * F.one_hot(labels, INPUTS[0])
        return inputs, labels

    def backward(self, inputs: list[Any], labels: Tensor, *, say: str = "", times: int = 1) -> None:
        """A training pass; `say` when its labels are observed."""
        monitor = self.all.monitor
        with allowing():
            expected = self.expect(inputs, labels)
            if say == "early" and (
                self.unlabelled or self.dead or self.left
            ):  # they would be for the pass before
                say = ""
            if say == "early":
                monitor.observe(labels)
            loss = F.cross_entropy(self.all.model(*inputs), labels, reduction="sum")
            if say == "late":
                monitor.observe(labels)
            for time in range(times):
                loss.backward(retain_graph=time < times - 1)
            if say == "last":
                monitor.observe(labels)
        self.forwards += 1
        self.unlabelled, self.dead, self.left = not say, False, False
        if len(labels):
            self.scored = True
            self.present |= {m for m, x in enumerate(inputs) if x is not None}
            if expected is None or self.sums is None:
                self.sums = None
            else:
                self.sums = (self.sums[0] + expected[0], self.sums[1] + expected[1])

    @torch.no_grad()
    def expect(self, inputs: list[Any], labels: Tensor) -> tuple[Tensor, Tensor] | None:
        """The sums of Eq. 9 over the batch, written naively; None where they are not known here."""
        model = self.all.model
        known = all(bool(x.isfinite().all()) for x in inputs if x is not None)
        if not isinstance(model, Concat) or not known:
            return None
        valid = labels != IGNORED
        score, count = torch.zeros(self.modalities), torch.zeros(self.modalities)
        for m, (encoder, x) in enumerate(zip(model.encoders.values(), inputs, strict=True)):
            if x is not None:
                columns = model.head.weight[:, 4 * m : 4 * m + 4]
                logits = encoder(x) @ columns.T + model.head.bias / self.modalities  # Eq. 8
                score[m] = sum(p[y] for p, y in zip(logits.softmax(1)[valid], labels[valid], strict=True))
                count[m] = valid.sum()
        return score, count

    @rule(seed=seeds, size=sizes, say=st.sampled_from(["", "early", "late", "last"]))
    def pass_(self, seed: int, size: int, say: str) -> None:
        self.backward(*self.draw(seed, size), say=say)

    @rule(seed=seeds, size=sizes)
    def backward_twice(self, seed: int, size: int) -> None:
        self.backward(*self.draw(seed, size), times=2)

    @rule(seed=seeds, size=sizes, which=st.integers(0, 2))
    def missing_modality(self, seed: int, size: int, which: int) -> None:
        inputs, labels = self.draw(seed, size)
        inputs[which % self.modalities] = None
        self.backward(inputs, labels)

    @rule(seed=seeds, size=st.integers(2, 5))
    def ignored_labels(self, seed: int, size: int) -> None:
        inputs, labels = self.draw(seed, size)
        labels[::2] = IGNORED
        self.backward(inputs, labels)

    @rule(seed=seeds, say=st.sampled_from(["", "early"]))
    def empty_batch(self, seed: int, say: str) -> None:
        self.backward(*self.draw(seed, 0), say=say)

    @rule(seed=seeds, size=sizes, training=st.booleans(), grad=st.booleans())
    def pass_that_trains_nothing(self, seed: int, size: int, training: bool, grad: bool) -> None:
        inputs, _ = self.draw(seed, size)
        with allowing(), torch.set_grad_enabled(grad):
            self.all.model.train(training)(*inputs)
        self.all.model.train()
        self.forwards += training and grad
        self.dead |= training and grad

    @rule(seed=seeds, size=sizes)
    def forward_that_breaks_off(self, seed: int, size: int) -> None:
        inputs, _ = self.draw(seed, size)
        inputs[-1] = inputs[-1][:, :-1]
        with allowing(), pytest.raises(RuntimeError, match="mat1 and mat2"):
            self.all.model(*inputs)
        self.forwards += 1
        self.dead = True

    # -- steps ---------------------------------------------------------------------------------------------------

    @rule()
    def step(self) -> None:
        self.expect_step()
        grads = self.gradients()
        was_finite = all(bool(g.isfinite().all()) for g in grads)
        before = {p: p.grad.clone() for p in self.held() if p.grad is not None}
        first = len(self.heard)
        with allowing():
            if self.silent >= 10:
                with pytest.raises(RuntimeError, match=r"no scores in 1. steps in a row"):
                    self.all.optimizer.step()
            elif self.useless >= 10:
                self.useless = 0
                with pytest.raises(RuntimeError, match=r"10 steps in a row had scores that can't be used"):
                    self.all.optimizer.step()
            else:
                self.all.optimizer.step()
        assert {name: self.stats[name] for name in self.counts} == self.counts
        if was_finite:
            assert all(bool(p.isfinite().all()) for p in self.all.model.parameters())
            self.check_modulation(before, dict_of(self.heard[first:], self.number - 1))
        self.discard()

    def expect_step(self) -> None:
        """Account for the step to come."""
        grads = self.gradients()
        if not grads or not (self.scored or any(bool((g != 0).any()) for g in grads)):
            return
        if not any(m.is_open(self.number) for m in self.methods):
            kind = "outside_window"
        else:
            usable = len(self.present) > 1
            kind = ("modulated" if usable else "unusable_scores") if self.scored else "without_scores"
            self.silent = 0 if self.scored else self.silent + 1
            if self.scored:
                self.useless = 0 if usable else self.useless + 1
        self.counts[kind] += 1
        self.number += self.silent < 10 and self.useless < 10

    def check_modulation(self, before: dict[Tensor, Tensor], heard: dict[str, Tensor]) -> None:
        """Gradients are what the coefficients say, and these are of the passes since the last step."""
        if "score" not in heard:
            return
        if self.sums is not None:
            score, count = self.sums
            torch.testing.assert_close(heard["score"], torch.where(count > 0, score / count.clamp(min=1), 0))
        if self.chosen["method"] == "OGM":
            for k, encoder in zip(heard["coefficient"], self.all.model.modalities.values(), strict=True):
                for p in encoder.parameters():
                    if p in before and p.dim() > 1:
                        torch.testing.assert_close(p.grad, before[p] * k, rtol=0, atol=0)

    @rule(seed=seeds, size=sizes)
    def step_with_a_closure(self, seed: int, size: int) -> None:
        inputs, labels = self.draw(seed, size)

        def closure() -> Tensor:
            self.all.optimizer.zero_grad()
            loss = F.cross_entropy(self.all.model(*inputs), labels)
            loss.backward()
            return loss.detach()

        self.forwards += 1
        self.dead = self.left = False
        self.all.model.zero_grad(set_to_none=False)
        self.scored, self.present = True, set(range(self.modalities))
        if self.all_finite() and next(self.all.model.parameters()).grad is None:
            self.backward(inputs, labels)  # gradients, for the account
        self.expect_step()
        with allowing():
            assert torch.isfinite(self.all.optimizer.step(closure))  # type: ignore[arg-type]
        self.discard()

    @rule(how=st.sampled_from(["optimizer", "keep zeros", "model"]))
    def zero_grad(self, how: str) -> None:
        if how == "model":
            self.all.model.zero_grad()
            self.all.monitor.reset()
        else:
            self.all.optimizer.zero_grad(set_to_none=how == "optimizer")
        self.discard()

    @rule(seed=seeds, size=sizes, where=st.integers(0, 2), value=st.sampled_from(["nan", "inf"]))
    def bad_batch(self, seed: int, size: int, where: int, value: str) -> None:
        """Its step is the base optimizer's, which breaks the weights: then the last checkpoint is loaded."""
        self.zero_grad("optimizer")
        state, number = copy.deepcopy(self.all.state()), self.number
        forwards = self.forwards
        inputs, labels = self.draw(seed, size)
        inputs[where % self.modalities][0] = float(value)
        self.backward(inputs, labels)
        before = self.stats
        with allowing():
            self.all.optimizer.step()
        self.settle_bad_step(before)
        with allowing():
            self.all.load(state)
        self.number, self.forwards, self.silent, self.useless = number, forwards, 0, 0
        self.zero_grad("model")  # of parameters too that the optimizer will get later

    def settle_bad_step(self, before: dict[str, int]) -> None:
        """Counted in one way: its good rows have scores, unless no pass has shown the way to the head yet."""
        assert sum(self.stats[name] - before[name] for name in self.counts) == 1
        self.counts = {name: self.stats[name] for name in self.counts}

    @rule(seed=seeds, size=sizes)
    def step_that_the_scaler_skips(self, seed: int, size: int) -> None:
        if self.chosen["attached"] and self.chosen["base"] == "AdamW fused":
            return  # it steps by itself: docs/integrations.md
        self.zero_grad("optimizer")
        inputs, labels = self.draw(seed, size)
        scaler = torch.amp.GradScaler("cpu")
        with allowing():
            scaler.scale(F.cross_entropy(self.all.model(*inputs), labels) * float("inf")).backward()
            scaler.step(self.all.optimizer)
            scaler.update()
        self.forwards += 1
        self.dead = self.left = False
        self.zero_grad("optimizer")
        self.all.model.zero_grad()  # a head that the optimizer does not hold yet would keep its infinite gradient

    @rule(epoch=st.integers(0, 5))
    def set_epoch(self, epoch: int) -> None:
        self.all.balanced.set_epoch(epoch)
        self.epoch = epoch

    @rule()
    def relearn(self) -> None:
        with allowing():
            self.all.scheduler.step()

    # -- objects come and go -------------------------------------------------------------------------------------

    @rule(seed=seeds)
    def save_and_load(self, seed: int) -> None:
        self.zero_grad("optimizer")
        file = io.BytesIO()
        torch.save(self.all.state(), file)
        file.seek(0)
        old, self.all = self.all, self.build(self.new_model())
        with allowing():
            self.all.load(torch.load(file, weights_only=True))
        self.begin()
        self.go_on_alike(old, seed)

    @rule(seed=seeds)
    def train_a_copy_of_the_model(self, seed: int) -> None:
        """It is a plain model: nobody hears of it."""
        inputs, labels = self.draw(seed, 4)
        twin = copy.deepcopy(self.all.model)
        F.cross_entropy(twin(*inputs), labels, reduction="sum").backward()

    def go_on_alike(self, old: Everything, seed: int) -> None:
        """The new objects' next step is the old ones' bit for bit."""
        inputs, labels = self.draw(seed, 4)
        old.optimizer.zero_grad()
        silent, self.silent = self.silent, 0
        with allowing():
            F.cross_entropy(old.model(*inputs), labels, reduction="sum").backward()
            old.optimizer.step()
        self.silent = silent
        self.backward(inputs, labels)
        self.step()
        assert same_bits(self.all.model, old.model)
        assert torch.equal(self.all.modulator.q, old.modulator.q)
        old.remove()
        assert hooks_on(old.model) == 0

    @precondition(lambda self: not self.added)
    @rule()
    def add_param_group(self) -> None:
        rest = bo.modality_groups(self.all.model, self.all.model.modalities)[-1]
        self.all.optimizer.add_param_group(rest)
        self.added = True

    @precondition(lambda self: self.chosen["attached"])
    @rule(keep_state=st.booleans())
    def remove_and_attach(self, keep_state: bool) -> None:
        self.all.handle.remove(keep_state=keep_state)
        assert "zero_grad" not in vars(self.all.optimizer)
        self.all.handle = bo.attach(self.all.optimizer, self.all.monitor, self.methods, seed=7)
        self.listen(self.all)
        open_, dead = self.unlabelled or self.left, self.dead
        self.begin()
        self.dead, self.left = dead, open_  # the monitor stayed
        if not keep_state:
            self.number, self.epoch = 0, None

    @rule()
    def remove_all_and_build(self) -> None:
        model = self.all.model
        self.all.remove()
        assert hooks_on(model) == 0
        self.all = self.build(model)
        model.zero_grad()
        self.begin()
        self.number = self.forwards = 0
        self.epoch = None

    # -- what holds after all of them ----------------------------------------------------------------------------

    def held(self) -> list[Tensor]:
        return [p for group in self.all.optimizer.param_groups for p in group["params"]]

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.held() if p.grad is not None]

    def all_finite(self) -> bool:
        return all(bool(p.isfinite().all()) for p in self.all.model.parameters())

    @invariant()
    def account(self) -> None:
        if not hasattr(self, "all"):
            return
        assert {name: self.stats[name] for name in self.counts} == self.counts
        assert self.all.optimizer.param_groups[0]["balanceopt_step"] == self.number
        assert self.all.modulator.stats()["forwards"] == self.forwards
        assert self.all_finite()
        assert hooks_on(self.all.model) <= self.hooks
        assert self.all.model.training


@contextmanager
def allowing() -> Iterator[None]:
    """Let pass what is documented to be said, and nothing else."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield
    for warning in seen:
        said = str(warning.message)
        hint = issubclass(warning.category, bo.OptimizerHintWarning)
        assert hint or any(re.match(one, said) for one in SAID), said


def dict_of(heard: list[tuple[int, str, Tensor]], number: int) -> dict[str, Tensor]:
    return {quantity: x for n, quantity, x in heard if n == number}


TestTraining = Training.TestCase
TestTraining.settings = settings(
    max_examples=300 if THOROUGH else 15,
    stateful_step_count=60 if THOROUGH else 30,
    deadline=None,
    derandomize=not THOROUGH,
    suppress_health_check=[HealthCheck.too_slow],
)
