"""From a forward in training to its scores: how they are made, who takes them."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakSet

import torch
from torch import Tensor

from balanceopt.functional import feature_entropy
from balanceopt.monitor._accumulator import Accumulator
from balanceopt.monitor._pass import Pass
from balanceopt.monitor._recovery import Recovery
from balanceopt.monitor._seen import Seen
from balanceopt.monitor._settle import settle
from balanceopt.monitor._sums import ModalitySums
from balanceopt.monitor._unimodal import UnimodalLogits


class Scorer:
    """Score passes, each once, and hand the sums to the accumulators.

    Attributes:
        unimodal: how uni-modal logits are made; None for features only.
        classes: C, once a pass was seen.
        seen: how often what happened.
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
    ) -> None:
        """Score by `unimodal`; `recovers` allows labels read from gradients."""
        self.modalities = tuple(modalities)
        self.unimodal = unimodal
        self.ignore_index = ignore_index
        self.recovery = Recovery(strict=strict) if recovers else None
        self.classes: int | None = None
        self.seen = Seen()
        self.accumulators: WeakSet[Accumulator] = WeakSet()

    @property
    def wanted(self) -> bool:
        """Whether uni-modal logits of the next pass are: somebody collects scores, or it can still show the layout."""
        return self.unimodal is not None and (bool(self.accumulators) or not self.unimodal.knows_layout)

    @property
    def needs_outputs(self) -> bool:
        """Whether passes must keep the encoders' whole outputs and the model's inputs."""
        return self.unimodal is not None and self.unimodal.needs_outputs

    def accumulator(self, *, needs_entropy: bool, steps: bool) -> Accumulator:
        """A new consumer's view of the passes."""
        leave = self.accumulators.discard
        accumulator = Accumulator(self.settled, leave, needs_entropy=needs_entropy, steps=steps)
        self.accumulators.add(accumulator)
        return accumulator

    def end_forward(self, current: Pass) -> None:
        """Make the uni-modal logits while the features are at hand, then let the features go."""
        for name in self.modalities:
            if not current.calls[name]:
                self.seen.note(f"missing:{name}")
        if current.logits is not None and self.unimodal is not None:
            self.classes = current.logits.shape[-1]
            current.unimodal = {}
            if current.scored and current.logits.shape[0] == 0:
                self.unimodal.join(current)
            elif current.scored:
                logits = self.unimodal(current)
                current.unimodal = {name: value.detach() for name, value in logits.items()}
                if any(accumulator.needs_entropy for accumulator in self.accumulators):
                    with torch.no_grad():
                        current.entropies = {
                            name: feature_entropy(current.vectors.get(name, z))
                            for name, z in current.features.items()
                        }
        current.end_forward()

    def backward_reached(self, current: Pass, gradient: Tensor) -> None:
        """Take the gradient `(N, C)` at the joint logits; the first one makes the pass count."""
        if not current.gradients:
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
        done.sums = settle(done, self.modalities, ignore, self.recovery)
        if done.sums is not None:
            self.seen.note(f"labels:{done.label_source}")
            self.seen.note_score()
        else:
            self.seen.note("unscored")

    def _refuse_misfit(self, done: Pass) -> None:
        """What the model was given as `labels=` may be no class indices: then read them from the gradient."""
        rows = None if done.logits is None else done.logits.shape[0]
        misfit = done.label_source == "model" and done.labels is not None and done.labels.numel() != rows
        if misfit and self.recovery is not None:
            done.labels, done.label_source = None, "gradient"

    def clear(self) -> None:
        """Forget all scores."""
        for accumulator in self.accumulators:
            accumulator.discard()
