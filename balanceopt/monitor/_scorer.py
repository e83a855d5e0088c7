"""Scoring of training passes, once each for all consumers."""

from __future__ import annotations

from weakref import WeakSet

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from balanceopt._pooling import as_real, samples_in
from balanceopt._torch import parameters_of, version_of
from balanceopt._undo import Undo
from balanceopt._warnings import warn_user
from balanceopt.functional import KeptPredictions, feature_entropy
from balanceopt.monitor._answers import in_output_shape
from balanceopt.monitor._features import Features
from balanceopt.monitor._forward import Pass, Traces
from balanceopt.monitor._labels import Labels
from balanceopt.monitor._logits import UnimodalLogits
from balanceopt.monitor._module_hooks import FunctionalHooks
from balanceopt.monitor._scores import Kept, ScoreBuffer, Sums
from balanceopt.monitor._silence import Seen
from balanceopt.monitor._targets import pass_targets

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
        loss: the loss that scores are made of.
        targets: the targets of passes.
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
        """Prepare scoring of `unimodal` logits by the loss of `labels`; `strict` raises where labels are doubtful."""
        self.modalities = tuple(features.encoders)
        self.unimodal = unimodal
        self.features = features
        self.labels = labels
        self.loss = labels.loss
        self.targets = pass_targets(labels, strict=strict)
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

    def settled(self, done: Pass) -> Sums | Kept | None:
        """Return what a pass adds to the scores, computed once for all consumers; None for no logits or targets."""
        done.closed = True
        if not done.settled:
            done.settled = True
            done.sums = self._settle(done)
            if done.sums is None:
                self.seen.note("unscored")
            else:
                self.seen.note(f"labels:{done.label_source}")
                self.seen.note_score()
            done.unimodal, done.logits = None, None
            done.gradients.clear()
        return done.sums

    def nothing(self, outputs: int, device: torch.device) -> Sums | Kept:
        """Return what a rank without a pass, whose head has so many `outputs`, adds to the scores of the others."""
        nobody = torch.zeros(len(self.modalities), 0, dtype=torch.float32, device=device)
        logits = nobody.unsqueeze(2).expand(-1, -1, outputs)
        target = logits[0, :, 0].long() if self.loss.has_classes else logits[0]
        return self._sums(logits, target, logits[0], nobody.bool(), nobody)

    @torch.no_grad()
    def _settle(self, done: Pass) -> Sums | Kept | None:
        if not done.unimodal or done.logits is None:
            return None
        target = done.target = self.targets.of(done)
        if target is None:
            return None
        _refuse_partial(done)
        rows, absent = len(done.logits), torch.zeros_like(done.logits, dtype=torch.float32)
        samples = done.samples if done.samples and rows % done.samples == 0 else max(rows, 1)
        logits = torch.stack([done.unimodal.get(name, absent) for name in self.modalities])
        everyone = torch.ones(samples if rows else 0, dtype=torch.bool, device=logits.device)
        present = [
            _by_sample(done.present.get(name, everyone), everyone) if name in done.unimodal else ~everyone
            for name in self.modalities
        ]
        valid = target != self.labels.ignore_index if self.loss.has_classes and target.dim() == 1 else None
        entropy = [
            _by_sample(_entropies(name, done), everyone, valid)
            if name in done.entropies
            else torch.zeros_like(everyone, dtype=torch.float32)
            for name in self.modalities
        ]
        if self.loss.rowwise:
            logits, target, joint = (_of_samples(x, len(everyone)) for x in (logits, target, done.logits))
        else:
            logits, joint = in_output_shape(logits, done), in_output_shape(done.logits, done)
        outputs_last = not self.loss.rowwise and not done.classes_first and joint.dim() > 2
        return self._sums(
            logits, target, joint, torch.stack(present), torch.stack(entropy), outputs_last=outputs_last
        )

    def _sums(
        self,
        logits: Tensor,
        target: Tensor,
        joint: Tensor,
        present: Tensor,
        entropy: Tensor,
        *,
        outputs_last: bool = False,
    ) -> Sums | Kept:
        """Return what samples add to the scores.

        Args:
            logits: uni-modal logits `(M, B, C, ...)`.
            target: the loss's target.
            joint: joint logits `(B, C, ...)`.
            present: bool `(M, B)`, the samples that count for each modality.
            entropy: feature entropies `(M, B)`.
            outputs_last: whether the logits' outputs C are in the last dimension, after positions.
        """
        loss = self.loss
        if loss.scale_free:
            are_parts = self.unimodal is not None and self.unimodal.are_parts
            kept = KeptPredictions.of(
                logits, target, joint.float() if are_parts else None, present, outputs_last=outputs_last
            )
            # A centre all the same, since a rank without samples knows no target and sums the centre over ranks too.
            return Kept(kept if loss.centred(target) else kept.without_centring(), (entropy,), loss)
        measured = loss.measure(logits, target, present)
        parts = torch.stack(
            [torch.exp(-measured.values), torch.ones_like(measured.values), measured.values, entropy]
        )
        score, count, total, entropies = torch.where(measured.valid & present, parts, 0).sum(-1)
        return Sums(score, count, total, entropies, measured.parts, loss)

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


def _refuse_partial(done: Pass) -> None:
    """Raise if an encoder's number of rows fits neither the batch nor the samples that have its modality."""
    for name, rows in done.rows.items():
        if name in done.present or (done.samples and rows % done.samples):
            flags = done.present.get(name)
            samples_in(
                name, torch.empty(rows, dtype=torch.float32, device="meta"), done.samples, flags, frames=True
            )


def _of_samples(rows: Tensor, samples: int) -> Tensor:
    """Reshape rows `(..., N, C)` or `(N,)` to `(..., B, C)` or `(B,)`, with the positions of a sample, if any, last."""
    if rows.dim() == 1:
        return rows if len(rows) == samples else rows.view(samples, -1)
    if rows.shape[-2] == samples:
        return rows
    positions: Tensor = rows.unflatten(-2, (samples, -1))
    return positions.movedim(-1, -2)


def _entropies(name: str, done: Pass) -> Tensor:
    """Return a modality's feature entropies for all samples, 0 for samples on which its encoder did not run."""
    values, present = done.entropies[name], done.present.get(name)
    if present is None or done.samples is None or len(values) >= done.samples:
        return values
    # Not by the mask as index, which would synchronise.
    return values.new_zeros(done.samples).masked_scatter(present.to(values.device), values)


def _by_sample(values: Tensor, samples: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return one value for each of the `samples` `(B,)`, from values of samples or of their positions.

    Flags hold for a sample if they hold for all of its positions; numbers are averaged over its `valid` positions.

    Raises:
        ValueError: for a number of values that is no multiple of the number of samples.
    """
    values = values.to(samples.device)
    if len(values) == len(samples):
        return values
    if not len(samples) or len(values) % len(samples):
        raise ValueError(
            f"`present` should have one entry for each of the {len(samples)} samples. Found {len(values)}."
        )
    by_position = values.view(len(samples), -1)
    if values.dtype == torch.bool:
        return by_position.all(1)
    if valid is None or valid.numel() != values.numel():
        return by_position.mean(1)
    counted = valid.view_as(by_position)
    return torch.where(counted, by_position, 0).sum(1) / counted.sum(1).clamp(min=1)
