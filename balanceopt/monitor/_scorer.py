"""From a forward in training to its scores: each pass is scored once, for all who collect."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakSet

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from balanceopt._pooling import as_real, samples_in
from balanceopt._torch import parameters_of, version_of
from balanceopt._undo import Undo
from balanceopt._warnings import warn_user
from balanceopt.functional import INVALID, Targets, as_targets, feature_entropy, row_scores
from balanceopt.monitor._agreement import Agreement
from balanceopt.monitor._features import Features
from balanceopt.monitor._forward import Pass
from balanceopt.monitor._labels import CHANGED_AFTER, Labels, Recovery, two_classes
from balanceopt.monitor._logits import UnimodalLogits
from balanceopt.monitor._module_hooks import FunctionalHooks
from balanceopt.monitor._scores import ScoreBuffer, Scores
from balanceopt.monitor._silence import Seen
from balanceopt.monitor._traces import Traces

# Training forwards without a call of an encoder before the user is told.
_UNCALLED = 10


class Scorer:
    """Score passes, each once, and hand the sums to the buffers.

    Attributes:
        unimodal: how uni-modal logits are made; None for features only.
        classes: C, once a pass was seen.
        seen: how often what happened.
        undo: the way back from what scoring changes for a while; empty but after two interrupts.
        hooks: tell which hooks on modules are part of the model's function.
        recovery: reads labels from gradients; None where that is not wanted.
        buffers: one for each consumer.
    """

    def __init__(
        self,
        unimodal: UnimodalLogits | None,
        features: Features,
        labels: Labels,
        traces: Traces,
        *,
        strict: bool,
    ) -> None:
        """Score by `unimodal` logits and `labels`; `strict` raises where labels are doubtful."""
        self.modalities = tuple(features.encoders)
        self.unimodal = unimodal
        self.features = features
        self.labels = labels
        self.recovery = Recovery(strict=strict) if labels.recovers else None
        self._agreement = Agreement(recovers=labels.recovers)
        self._traces = traces
        self.classes: int | None = None
        self.seen = Seen()
        self.undo = Undo()
        self.hooks = FunctionalHooks()
        self.buffers: WeakSet[ScoreBuffer] = WeakSet()

    @property
    def wanted(self) -> bool:
        """Whether uni-modal logits of the next pass are: somebody collects scores, or it can still show the layout."""
        return self.unimodal is not None and (bool(self.buffers) or not self.unimodal.knows_layout)

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
                (parameter, version_of(parameter))
                for module in current.replayed
                for parameter in parameters_of(module)
                if not is_lazy(parameter)
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
                if any(buffer.needs_entropy for buffer in self.buffers):
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
            if self.buffers and not current.rehearsal:
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
            current.closed = not self.buffers  # nobody waits for its labels
            for buffer in self.buffers:
                buffer.add(current)
        current.gradients.append(gradient)

    def settled(self, done: Pass) -> Scores | None:
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
        ignore = self.labels.ignore_index if done.ignore_index is None else done.ignore_index
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
        for buffer in self.buffers:
            if buffer.steps:
                buffer.discard()

    def clear(self) -> None:
        """Forget all scores, and leave nothing on the model."""
        self.undo.restore()
        self.hooks.remove()
        for buffer in self.buffers:
            buffer.discard()


@torch.no_grad()
def settle(
    done: Pass,
    modalities: Sequence[str],
    ignore_index: int,
    recovery: Recovery | None,
    agreement: Agreement,
) -> Scores | None:
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
            f"Found shape {tuple(labels.shape)}. Likely causes: labels of another batch, or {CHANGED_AFTER}."
        )
    return as_targets(per_row, classes, ignore_index)


def _sums(done: Pass, targets: Targets, modalities: Sequence[str]) -> Scores:
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
    score, log_likelihood = row_scores(logits, targets)
    parts = torch.stack([score, torch.ones_like(score), -log_likelihood, entropy])
    sums = torch.where(valid, parts, 0).sum(-1)
    return Scores(sums[0], sums[1], sums[2], sums[3], targets.class_counts())


def _refuse_partial(done: Pass) -> None:
    """Raise where an encoder ran on other samples than those that are known to have its modality."""
    for name, rows in done.rows.items():
        if name in done.present or (done.samples and rows % done.samples):
            flags = done.present.get(name)
            samples_in(
                name, torch.empty(rows, dtype=torch.float32, device="meta"), done.samples, flags, frames=True
            )


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
