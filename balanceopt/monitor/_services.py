"""What the rest of the package asks of a monitor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from balanceopt.distributed import Group
from balanceopt.modality import modality_parameters, unwrap
from balanceopt.monitor._accumulator import Accumulator
from balanceopt.monitor._capture import Capture, GradientListener, Head, Tap, Transform
from balanceopt.monitor._hooks import Listeners
from balanceopt.monitor._layout import lay_out, layout_of
from balanceopt.monitor._matching import Projection
from balanceopt.monitor._pass import Pass
from balanceopt.monitor._per_head import PerHead
from balanceopt.monitor._scorer import Scorer
from balanceopt.monitor._seen import is_compiled, why_silent
from balanceopt.monitor._split import SplitHead
from balanceopt.monitor._sums import ModalitySums
from balanceopt.monitor._unimodal import UnimodalLogits


class Services:
    """The side of `ModalityMonitor` that methods use: passes, their sums, features on their way.

    Attributes:
        model: the user's own module, without wrappers.
        encoders: each modality's, as a module.
        modalities: names, in the order of all sums.
        head: module, modules by modality, the model itself, or None.
        group: process group over which scores are summed.
    """

    model: nn.Module
    encoders: dict[str, nn.Module]
    modalities: tuple[str, ...]
    head: Head
    group: Group
    _was_compiled: bool
    _capture: Capture
    _scorer: Scorer

    def accumulator(self, *, needs_entropy: bool = False, steps: bool = True) -> Accumulator:
        """A new consumer's own sums over passes, which are made as long as it is alive and not removed.

        Args:
            needs_entropy: sum the entropies of the features too.
            steps: the consumer takes the sums once an optimizer step; `reset()` discards them.
        """
        return self._scorer.accumulator(needs_entropy=needs_entropy, steps=steps)

    @property
    def transforms(self) -> Listeners[Transform]:
        """Functions `(modality, pass, output)` that change encoders' outputs on their way into the fusion.

        They are called again with the same pass when activation checkpointing runs an encoder a second time.
        """
        return self._capture.transforms

    @property
    def taps(self) -> Listeners[Tap]:
        """Functions `(modality, output, pass)` that see every clean output of an encoder, attached to its graph.

        They are called in every mode; `pass` is None outside training. They are called again, with the same pass, when
        activation checkpointing runs an encoder a second time.
        """
        return self._capture.taps

    @property
    def gradient_listeners(self) -> Listeners[GradientListener]:
        """Functions `(pass, gradient)` that see the gradient `(N, C)` at the joint logits."""
        return self._capture.gradient_listeners

    @property
    def latest(self) -> Pass | None:
        """The latest forward in training."""
        return self._capture.passes.latest

    def features(self, name: str, output: Any) -> Tensor:
        """The feature tensor of an encoder's output, attached to its graph.

        Raises:
            TypeError: if the output holds no tensor.
        """
        return self._capture.features(name, output)

    def projection(self, name: str) -> Projection | None:
        """How the encoder's features become what the head gets, once a pass has shown it."""
        found: Projection | None = getattr(self._chosen, "projections", {}).get(name)
        return found

    def live_logits(self, name: str, features: Tensor) -> Tensor:
        """The shared head's uni-modal logits `(B, C)` of clean features, attached to the graphs of both.

        Raises:
            ValueError: if the uni-modal logits are neither "split" nor "per-head".
            RuntimeError: if no pass has shown how the features become the head's input.
        """
        chosen = self._chosen
        if not isinstance(chosen, (SplitHead, PerHead)):
            found = "no head" if chosen is None else repr(chosen.name)
            raise ValueError(
                "the shared head's own answer to one modality needs a linear head on concatenated features "
                f"(scores='split') or a head for each modality ('per-head'). Found {found}."
            )
        return chosen.live(name, features)

    def expect_scores(self, who: str) -> None:
        """Refuse to serve a method that needs scores when there is no head.

        Raises:
            ValueError: naming what is missing.
        """
        if self._scorer.unimodal is None:
            raise ValueError(
                f"{who} needs uni-modal scores. Build the monitor with `head=`: the module that makes the logits, a "
                "mapping from modality to its own head, or the model itself."
            )

    @property
    def parameters(self) -> dict[str, list[nn.Parameter]]:
        """Each modality's own parameters, as they are now (`fully_shard` and lazy modules replace them)."""
        return modality_parameters(self.model, self.encoders)

    @property
    def head_columns(self) -> dict[str, slice]:
        """Each modality's columns of a linear head's weight, once a pass showed them; empty for other heads."""
        chosen = self._chosen
        return dict(chosen.columns) if isinstance(chosen, SplitHead) else {}

    @property
    def active(self) -> bool:
        """Whether its hooks are on."""
        return bool(self._capture.hooks)

    @property
    def train_only(self) -> bool:
        """Whether only passes in training mode are watched."""
        return self._capture.passes.train_only

    @property
    def ignore_index(self) -> int:
        """Label of samples that do not count."""
        return self._scorer.ignore_index

    @property
    def recovers_labels(self) -> bool:
        """Whether labels may be read from the gradient at the joint logits."""
        return self._scorer.recovery is not None

    @property
    def layout(self) -> dict[str, Any]:
        """What passes have shown of the way from encoders to head, as plain numbers; may be set after a resume."""
        return layout_of(self._scorer.unimodal)

    @layout.setter
    def layout(self, layout: dict[str, Any]) -> None:
        lay_out(self._scorer.unimodal, layout)

    @property
    def num_classes(self) -> int | None:
        """C, once a pass was seen."""
        return self._scorer.classes

    def empty_sums(self, device: torch.device) -> ModalitySums:
        """Sums over no sample, of the shape that other ranks have."""
        head = unwrap(self.head) if isinstance(self.head, nn.Module) else None
        outputs = self._scorer.classes or getattr(head, "out_features", None) or 1
        return ModalitySums.zeros(len(self.modalities), max(outputs, 2), device)

    def silence(self) -> str:
        """Why no score may have come, in words for the user."""
        if not self.active:
            return "the monitor's hooks were removed"
        return why_silent(self._scorer.seen, compiled=self._was_compiled or is_compiled(self.model))

    @property
    def _chosen(self) -> UnimodalLogits | None:
        unimodal = self._scorer.unimodal
        chosen: UnimodalLogits | None = getattr(unimodal, "chosen", unimodal)
        return chosen
