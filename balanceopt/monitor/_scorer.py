"""Scoring of training passes, once each for all consumers."""

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
from balanceopt.monitor._features import Features
from balanceopt.monitor._forward import Pass, Traces
from balanceopt.monitor._labels import Labels
from balanceopt.monitor._logits import UnimodalLogits
from balanceopt.monitor._module_hooks import FunctionalHooks
from balanceopt.monitor._recovery import CHANGED_AFTER, Agreement, Recovery, two_classes
from balanceopt.monitor._scores import ScoreBuffer, Scores
from balanceopt.monitor._silence import Seen

# Training forwards without a call of an encoder before the user is told.
_UNCALLED = 10


class Scorer:
    """Score each pass once, and give passes to the buffers.

    Attributes:
        unimodal: kind of uni-modal logits; None for features only.
        classes: number of classes C; None before the first pass.
        seen: counts of events.
        undo: restores what scoring changes temporarily; empty between passes, except after two interrupts.
        hooks: tells which hooks on modules are part of the model's function.
        recovery: recovers labels from gradients; None if the user's `labels` excludes recovery.
        buffers: score buffers, one for each consumer.
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
        """Prepare scoring by `unimodal` logits and `labels`; `strict` raises where labels are doubtful."""
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
        """Whether the next pass needs uni-modal logits, for a consumer's scores or to learn the layout."""
        return self.unimodal is not None and (bool(self.buffers) or not self.unimodal.knows_layout)

    @property
    def needs_outputs(self) -> bool:
        """Whether passes must keep the encoders' whole outputs and the model's inputs."""
        return self.unimodal is not None and self.unimodal.needs_outputs

    def begin_forward(self, current: Pass) -> None:
        """Probe the hooks and record the parameter versions of the modules that scoring may run again."""
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
        """Compute the uni-modal logits at the end of the forward, then release the features."""
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
        """Return the uni-modal logits of a pass; an error gives none if no consumer needs the logits."""
        try:
            return unimodal(current)
        except RuntimeError:
            if self.buffers and not current.rehearsal:
                raise
            return {}

    def backward_reached(self, current: Pass, gradient: Tensor) -> None:
        """Record the gradient `(N, C)` at the joint logits; the first gradient makes the pass count.

        A backward that goes to no parameter (an attack, a saliency map) does not count. Scores of gradients that were
        cleared without the optimizer's wrapper are discarded.
        """
        if not current.counts:
            if self._traces.gone():
                self.discard()
            if not self._traces.left():
                self.seen.note("to inputs")
                return
            current.counts = True
            self.seen.note("passes")
            current.closed = not self.buffers  # without a consumer no labels are needed
            for buffer in self.buffers:
                buffer.add(current)
        current.gradients.append(gradient)

    def settled(self, done: Pass) -> Scores | None:
        """Return the pass's scores, computed once for all consumers."""
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
        """Read labels from the gradient if the model's `labels=` are not the class indices of the loss."""
        if done.label_source != "model" or done.labels is None or done.logits is None:
            return
        misfit = self._agreement.refuted or done.labels.numel() != done.logits.shape[0]
        if misfit and self.recovery is not None:
            done.labels, done.label_source = None, "gradient"

    def discard(self) -> None:
        """Discard the scores of cleared gradients, which no step will use."""
        for buffer in self.buffers:
            if buffer.steps:
                buffer.discard()

    def clear(self) -> None:
        """Discard all scores, restore the model and remove the probes."""
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
    """Return the scores of a pass that backward has reached; None for a pass without uni-modal logits or labels.

    Raises:
        ValueError: if given labels don't fit the logits.
        RuntimeError: if the gradients contradict given labels, or recovered labels are too doubtful.
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
    """Compute scores, cross-entropies, entropies and counts of all modalities in batched operations."""
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
    """Raise if an encoder's number of rows fits neither the batch nor the samples that have its modality."""
    for name, rows in done.rows.items():
        if name in done.present or (done.samples and rows % done.samples):
            flags = done.present.get(name)
            samples_in(
                name, torch.empty(rows, dtype=torch.float32, device="meta"), done.samples, flags, frames=True
            )


def _by_sample(name: str, done: Pass) -> Tensor:
    """Return a modality's feature entropies for all samples, 0 for samples on which its encoder did not run."""
    values, present = done.entropies[name], done.present.get(name)
    if present is None or done.samples is None or len(values) >= done.samples:
        return values
    spread = values.new_zeros(done.samples)
    spread[present.to(values.device)] = values
    return spread


def _by_row(per_sample: Tensor, rows: int, like: Tensor) -> Tensor:
    """Repeat each sample's value for the sample's rows (several where logits have positions)."""
    per_sample = per_sample.to(like.device)
    if per_sample.shape[0] == rows:
        return per_sample
    if per_sample.shape[0] == 0 or rows % per_sample.shape[0]:
        raise ValueError(
            f"`present` should have one entry for each sample, a divisor of the {rows} rows. "
            f"Found {per_sample.shape[0]}."
        )
    return per_sample.repeat_interleave(rows // per_sample.shape[0])
