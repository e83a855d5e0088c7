"""From a forward in training to its scores: how they are made, who collects them, and why there may be none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from balanceopt._pooling import as_real, samples_in
from balanceopt._undo import Undo
from balanceopt._warnings import warn_user
from balanceopt.functional import feature_entropy
from balanceopt.functional._labels import INVALID
from balanceopt.functional._targets import Targets, as_targets
from balanceopt.monitor._agreement import Agreement
from balanceopt.monitor._features import Features
from balanceopt.monitor._forward import Pass
from balanceopt.monitor._labels import Recovery, two_classes
from balanceopt.monitor._logits import UnimodalLogits
from balanceopt.monitor._module_hooks import FunctionalHooks
from balanceopt.monitor._sums import ModalitySums
from balanceopt.monitor._traces import Traces

# Training forwards without a call of an encoder before the user is told.
_UNCALLED = 10

if TYPE_CHECKING:
    from balanceopt.monitor._monitor import ModalityMonitor


class Accumulator:
    """Passes that backward has reached since the consumer last took them.

    Several consumers of one monitor have one each, so that none takes the other's scores; each pass is scored once.
    """

    def __init__(
        self,
        monitor: ModalityMonitor,
        scorer: Scorer,
        *,
        needs_entropy: bool,
        steps: bool,
    ) -> None:
        """Sum what `scorer` makes of the passes of `monitor`; options as in `ModalityMonitor.accumulator`."""
        self.needs_entropy = needs_entropy
        self.steps = steps
        self._monitor = monitor  # a consumer keeps it alive
        self._scorer = scorer
        self._sums: ModalitySums | None = None
        self._latest: Pass | None = None

    def add(self, done: Pass) -> None:
        """Note a pass. It is scored when the next one comes or the sums are taken: labels may still arrive."""
        self._fold()
        self._latest = done

    def take(self) -> ModalitySums | None:
        """The sums over the passes since the last take or discard, and start anew; None where no pass had any."""
        self._fold()
        sums, self._sums = self._sums, None
        return sums

    def peek(self) -> ModalitySums | None:
        """The sums that the next take would give, as far as they are of passes since the last one; they stay."""
        self._fold()
        return self._sums

    def discard(self) -> None:
        """Forget what was not taken."""
        if self._latest is not None:
            self._latest.closed = True
        if self._latest is not None or self._sums is not None:
            self._scorer.seen.note("thrown")
        self._sums, self._latest = None, None

    def remove(self) -> None:
        """Take no pass any more. May be called twice."""
        self.discard()
        self._scorer.accumulators.discard(self)

    def _fold(self) -> None:
        done, self._latest = self._latest, None
        if done is None:
            return
        sums = self._scorer.settled(done)
        if sums is not None:
            self._sums = sums if self._sums is None else self._sums + sums

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy is of the monitor's copy, and empty: a pass holds a graph, which can't be copied.
        return _accumulator_of, (self._monitor, self.needs_entropy, self.steps)


def _accumulator_of(monitor: ModalityMonitor, needs_entropy: bool, steps: bool) -> Accumulator:
    return monitor.accumulator(needs_entropy=needs_entropy, steps=steps)


class Scorer:
    """Score passes, each once, and hand the sums to the accumulators.

    Attributes:
        unimodal: how uni-modal logits are made; None for features only.
        classes: C, once a pass was seen.
        seen: how often what happened.
        undo: the way back from what scoring changes for a while; empty but after two interrupts.
        hooks: tell which hooks on modules are part of the model's function.
        recovery: reads labels from gradients; None where that is not wanted.
        accumulators: one for each consumer.
    """

    def __init__(
        self,
        modalities: Sequence[str],
        unimodal: UnimodalLogits | None,
        *,
        ignore_index: int,
        strict: bool,
        recovers: bool,
        traces: Traces,
        features: Features,
    ) -> None:
        """Score by `unimodal`; `recovers` allows labels read from gradients."""
        self.modalities = tuple(modalities)
        self.unimodal = unimodal
        self.features = features
        self.ignore_index = ignore_index
        self.recovery = Recovery(strict=strict) if recovers else None
        self._agreement = Agreement(recovers=recovers)
        self._traces = traces
        self.classes: int | None = None
        self.seen = Seen()
        self.undo = Undo()
        self.hooks = FunctionalHooks()
        self.accumulators: WeakSet[Accumulator] = WeakSet()

    @property
    def wanted(self) -> bool:
        """Whether uni-modal logits of the next pass are: somebody collects scores, or it can still show the layout."""
        return self.unimodal is not None and (bool(self.accumulators) or not self.unimodal.knows_layout)

    @property
    def needs_outputs(self) -> bool:
        """Whether passes must keep the encoders' whole outputs and the model's inputs."""
        return self.unimodal is not None and self.unimodal.needs_outputs

    def begin_forward(self, current: Pass) -> None:
        """Look at what scoring this pass may run once more, before the forward does."""
        if current.scored and self.unimodal is not None:
            current.replayed = self.unimodal.replayed()
            self.hooks.probe(current.replayed)
            current.versions = [
                (parameter, parameter._version)
                for module in current.replayed
                for parameter in module._parameters.values()
                if parameter is not None and not is_lazy(parameter)
            ]

    def end_forward(self, current: Pass) -> None:
        """Make the uni-modal logits while the features are at hand, then let the features go."""
        for name in () if current.rehearsal else self.modalities:
            if not current.calls[name]:
                self.seen.note(f"missing:{name}")
                if (
                    current.calls
                    and self.seen.total[f"missing:{name}"] == self.seen.total["forwards"] == _UNCALLED
                ):
                    warn_user(
                        f"the encoder of {name!r} was not called in {_UNCALLED} training forwards: its modality is not "
                        "balanced. Give the module that the model calls."
                    )
        if current.logits is not None and self.unimodal is not None:
            self.classes = current.logits.shape[-1]
            current.unimodal = {}
            if current.scored and current.logits.shape[0] == 0:
                self.unimodal.join(current)
            elif current.scored:
                logits = self._unimodal(self.unimodal, current)
                self.features.count_rows(current, current.samples or 0)
                current.unimodal = {name: value.detach() for name, value in logits.items()}
                if any(accumulator.needs_entropy for accumulator in self.accumulators):
                    with torch.no_grad():
                        current.entropies = {
                            name: feature_entropy(as_real(self.features.vectors(name, current)))
                            for name in current.calls
                        }
        current.end_forward()

    def _unimodal(self, unimodal: UnimodalLogits, current: Pass) -> dict[str, Tensor]:
        """The uni-modal logits of a pass; none where they can't be had and only the layout is of interest."""
        try:
            return unimodal(current)
        except RuntimeError:
            if self.accumulators and not current.rehearsal:
                raise
            return {}

    def backward_reached(self, current: Pass, gradient: Tensor) -> None:
        """Take the gradient `(N, C)` at the joint logits; the first one makes the pass count.

        Not where it goes to no parameter: an attack, a saliency map. Scores of gradients that were cleared past the
        optimizer's wrapper go with them.
        """
        if not current.counts:
            if self._traces.gone():
                self.discard()
            if not self._traces.left():
                self.seen.note("to inputs")
                return
            current.counts = True
            self.seen.note("passes")
            current.closed = not self.accumulators  # nobody waits for its labels
            for accumulator in self.accumulators:
                accumulator.add(current)
        current.gradients.append(gradient)

    def settled(self, done: Pass) -> ModalitySums | None:
        """The pass's sums, made once for all consumers."""
        done.closed = True
        self._settle(done)
        done.unimodal, done.logits = None, None
        done.gradients.clear()
        return done.sums

    def _settle(self, done: Pass) -> None:
        if done.settled:
            return
        done.settled = True
        self._refuse_misfit(done)
        ignore = self.ignore_index if done.ignore_index is None else done.ignore_index
        done.sums = settle(done, self.modalities, ignore, self.recovery, self._agreement)
        if done.sums is not None:
            self.seen.note(f"labels:{done.label_source}")
            self.seen.note_score()
        else:
            self.seen.note("unscored")

    def _refuse_misfit(self, done: Pass) -> None:
        """Read labels from the gradient where what the model was given as `labels=` is not the loss's class indices."""
        if done.label_source != "model" or done.labels is None or done.logits is None:
            return
        misfit = self._agreement.refuted or done.labels.numel() != done.logits.shape[0]
        if misfit and self.recovery is not None:
            done.labels, done.label_source = None, "gradient"

    def discard(self) -> None:
        """Forget the scores of gradients that are gone, which no step will use."""
        for accumulator in self.accumulators:
            if accumulator.steps:
                accumulator.discard()

    def clear(self) -> None:
        """Forget all scores, and leave nothing on the model."""
        self.undo.restore()
        self.hooks.remove()
        for accumulator in self.accumulators:
            accumulator.discard()


@torch.no_grad()
def settle(
    done: Pass,
    modalities: Sequence[str],
    ignore_index: int,
    recovery: Recovery | None,
    agreement: Agreement,
) -> ModalitySums | None:
    """The sums of a pass that backward has reached; None where it has no uni-modal logits or no labels.

    Raises:
        ValueError: if the labels given don't fit the logits.
        RuntimeError: if the gradients contradict them, or those read from gradients are too doubtful.
    """
    if not done.unimodal or done.logits is None:
        return None
    targets = None
    if done.labels is not None:
        targets = _given(done, ignore_index, agreement)
        agreement.compare(done.label_source, targets, done.gradients, done.logits, done.labels.shape)
        if done.label_source == "model" and agreement.refuted:
            targets, done.label_source = None, "gradient"
    if targets is not None:
        return _sums(done, targets, modalities)
    if done.gradients and recovery is not None:
        labels = recovery.labels(done.gradients, done.logits)
        return _sums(done, as_targets(labels, max(done.logits.shape[-1], 2), INVALID), modalities)
    return None


def _given(done: Pass, ignore_index: int, agreement: Agreement) -> Targets:
    assert done.labels is not None and done.logits is not None
    rows, classes = done.logits.shape
    labels = done.labels.to(done.logits.device)
    if classes == 1:
        labels, classes = agreement.binary(labels, ignore_index), 2
    soft = labels.is_floating_point() and labels.dim() > 1
    per_row = labels.flatten(0, -2) if soft else labels.flatten()
    if per_row.shape[0] != rows:
        raise ValueError(
            f"labels from {done.label_source} should have one entry for each of the {rows} rows of the logits. "
            f"Found shape {tuple(labels.shape)}."
        )
    return as_targets(per_row, classes, ignore_index)


def _sums(done: Pass, targets: Targets, modalities: Sequence[str]) -> ModalitySums:
    """Scores, cross-entropies, entropies and counts of every modality, in batched operations."""
    assert done.unimodal is not None
    absent = torch.zeros_like(next(iter(done.unimodal.values())))
    logits = two_classes(torch.stack([done.unimodal.get(name, absent) for name in modalities]))
    rows = logits.shape[1]
    everyone, nothing = torch.ones_like(targets.valid), logits.new_zeros(rows)
    present = [
        _by_row(done.present.get(name, everyone), rows, logits) if name in done.unimodal else ~everyone
        for name in modalities
    ]
    _refuse_partial(done)
    valid = targets.valid & torch.stack(present)
    entropy = torch.stack(
        [
            _by_row(_by_sample(name, done), rows, logits) if name in done.entropies else nothing
            for name in modalities
        ]
    )
    log_p = logits.log_softmax(-1)
    log_score = targets.pick(log_p)
    score = targets.pick(log_p.exp()) if targets.index is None else log_score.exp()
    parts = torch.stack([score, torch.ones_like(score), -log_score, entropy])
    sums = torch.where(valid, parts, 0).sum(-1)
    return ModalitySums(sums[0], sums[1], sums[2], sums[3], targets.class_counts())


def _refuse_partial(done: Pass) -> None:
    """Raise where an encoder ran on other samples than those that are known to have its modality."""
    for name, rows in done.rows.items():
        if name in done.present or (done.samples and rows % done.samples):
            flags = done.present.get(name)
            samples_in(name, torch.empty(rows, device="meta"), done.samples, flags, frames=True)


def _by_sample(name: str, done: Pass) -> Tensor:
    """A modality's feature entropies, spread over all samples where its encoder ran on those that have it."""
    values, present = done.entropies[name], done.present.get(name)
    if present is None or done.samples is None or len(values) >= done.samples:
        return values
    spread = values.new_zeros(done.samples)
    spread[present.to(values.device)] = values
    return spread


def _by_row(per_sample: Tensor, rows: int, like: Tensor) -> Tensor:
    """A value for each sample spread over that sample's rows (several where logits have positions)."""
    per_sample = per_sample.to(like.device)
    if per_sample.shape[0] == rows:
        return per_sample
    if per_sample.shape[0] == 0 or rows % per_sample.shape[0]:
        raise ValueError(
            f"`present` should have one entry for each sample, a divisor of the {rows} rows. "
            f"Found {per_sample.shape[0]}."
        )
    return per_sample.repeat_interleave(rows // per_sample.shape[0])


class Seen:
    """How often what happened: in all, and since the last score."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.total: Counter[str] = Counter()
        self.recent: Counter[str] = Counter()

    def note(self, what: str) -> None:
        """Something happened."""
        self.total[what] += 1
        self.recent[what] += 1

    def note_score(self) -> None:
        """A pass was scored: what was wrong before is over."""
        self.recent.clear()


def why_silent(seen: Seen, *, compiled: bool) -> str:
    """Why no score may have come since the last one, in words for the user."""
    recent = seen.recent
    reasons = []
    if compiled and not recent["heads"]:
        reasons.append(
            "the model was compiled: build the monitor before the first call of the compiled model, or call "
            "torch._dynamo.reset()"
        )
    reasons += _uncalled(recent)
    if recent["forwards"] and not recent["heads"]:
        reasons.append("the head's hook did not fire: the head was replaced, or only its weights are used")
    elif not recent["forwards"] and recent["reruns"]:
        reasons.append(
            "the whole model is inside reentrant activation checkpointing, whose first run has no gradients: use "
            "checkpoint(..., use_reentrant=False)"
        )
    elif not recent["forwards"]:
        reasons.append(
            "no forward of the model in training mode was seen (fine-tuning in eval mode: train_only=False; "
            "torch.func transforms are not watched: call loss.backward())"
        )
    elif recent["thrown"]:
        reasons.append(
            "zero_grad (or monitor.reset) came between backward and step, and the scores went with the gradients: call "
            "it before backward"
        )
    elif not recent["passes"] and recent["to inputs"]:
        reasons.append(
            "backward reached the head's output and no parameter (torch.autograd.grad to the inputs, frozen parameters)"
        )
    elif not recent["passes"]:
        reasons.append("no backward reached the head's output (frozen model, or no loss on it)")
    elif recent["unscored"]:
        reasons.append("no labels or no features came with the pass: call monitor.observe(labels)")
    reasons.append(
        ("otherwise: " if reasons else "")
        + "model compiled before the monitor was built, wrong or replaced head, head used functionally, frozen model"
    )
    return "; ".join(reasons)


def _uncalled(recent: Counter[str]) -> list[str]:
    missing = [
        w.split(":", 1)[1] for w, n in recent.items() if w.startswith("missing:") and n >= recent["forwards"]
    ]
    return [
        f"the encoder of {name!r} was never called: give the module that the model calls" for name in missing
    ]


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile was used on the model or on a part of it."""
    return any(
        "_orig_mod" in module._modules or vars(module).get("_compiled_call_impl") is not None
        for module in model.modules()
    )
