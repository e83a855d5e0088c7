"""Encoders' features as uni-modal losses and votes need them: clean, and in training attached to their graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from balanceopt._torch import holds_compiled_code, in_backward
from balanceopt.monitor import COMPILED, CallWatch, ModalityMonitor, Pass


class LiveFeatures:
    """Clean features by modality, of the latest forward with gradients, without them, and in eval mode."""

    def __init__(self, monitor: ModalityMonitor, *, trains: bool = True) -> None:
        """Start without features; `on_output`, and for evaluations `on_start`, are to be hooks of `monitor`.

        Args:
            monitor: monitor on the encoders.
            trains: whether features of training passes are recorded, for a loss of them.
        """
        self.monitor = monitor
        self.watch: CallWatch | None = None
        self._trains = trains
        self.forget()

    def of_latest(self) -> tuple[dict[str, Tensor], dict[str, Tensor], int | None]:
        """Return features by modality, bool `(B,)` flags of samples with each modality, where given, and B, if known.

        Raises:
            RuntimeError: if there was no forward, or the features carry no gradient to a trained encoder.
        """
        outputs = self._with if torch.is_grad_enabled() else self._without
        features = {name: held() for name, held in outputs.items()}
        if not features:
            raise RuntimeError(
                "no features came by: call the model on a batch before the objective, with the monitor's hooks on."
                + (" Where the model was called: " + COMPILED if holds_compiled_code() else "")
            )
        for name, z in features.items():
            encoder = self.monitor.encoders[name]
            trained = any(p.requires_grad for p in encoder.parameters())
            if torch.is_grad_enabled() and trained and not z.requires_grad:
                raise RuntimeError(
                    f"the features of {name!r} carry no gradient to their encoder, as under reentrant activation "
                    "checkpointing. Use checkpoint(..., use_reentrant=False), or UnimodalObjective(inject=True)."
                )
        if self._pass is None or not torch.is_grad_enabled():
            return features, {}, None
        return features, dict(self._pass.present), self._pass.samples

    def of_evaluation(self) -> dict[str, Tensor]:
        """Return detached features by modality of the latest forward, if that was one in eval mode.

        Raises:
            RuntimeError: if it was none.
        """
        features = {name: held().detach() for name, held in self._evaluated.items()}
        if not features:
            raise RuntimeError(
                "predict() needs the features of the forward that made the logits: call the model in eval mode "
                "(model.eval(), torch.no_grad()) just before, with the monitor's hooks on."
                + (" Where the model was called: " + COMPILED if holds_compiled_code() else "")
            )
        return features

    @property
    def current(self) -> Pass | None:
        """Training pass of the latest features; None where these are of an evaluation."""
        return self._pass

    def forget(self) -> None:
        """Release all features."""
        self._with: dict[str, Callable[[], Tensor]] = {}
        self._without: dict[str, Callable[[], Tensor]] = {}
        self._evaluated: dict[str, Callable[[], Tensor]] = {}
        self._whole = False
        self._pass: Pass | None = None

    def on_start(self, current: Pass | None) -> None:
        """Release the features of the evaluated forward before, of which the next one may lack a modality."""
        self._evaluated, self._whole = {}, True

    def on_output(self, name: str, output: Any, current: Pass | None) -> None:
        """Record the features of an encoder's output."""
        if in_backward() or (current is not None and not self._trains):
            return
        # A copy, because modules after the encoder may change the output in place.
        held = self.monitor.features.held(name, output, Tensor.clone)
        if current is None and self.monitor.hooks.evaluates:
            if name in self._evaluated and not self._whole:  # the encoders alone are called, again
                self._evaluated = {}
            self._evaluated[name] = held
        if current is None and not torch.is_grad_enabled():
            if name in self._without:
                self._without = {}
            self._without[name] = held
            return
        if current is not self._pass or (current is None and name in self._with):
            self._with, self._pass = {}, current
        self._with[name] = held
