"""Which training pass a call of a module belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakSet

import torch
from torch import nn

from balanceopt.monitor._labels import Labels
from balanceopt.monitor._pass import Pass
from balanceopt.monitor._scorer import Scorer
from balanceopt.monitor._supported import next_node, running_node


class Passes:
    """The passes under way.

    Attributes:
        latest: the latest forward in training.
        current: the one whose forward runs; None outside, and in forwards that are not of training.
        loose: the one whose parts a loop calls without calling the model.
    """

    latest: Pass | None
    current: Pass | None
    loose: Pass | None
    _running: bool
    _backward: Pass | None
    _alive: WeakSet[Pass]

    def __init__(self, labels: Labels, scorer: Scorer, *, train_only: bool, answers: int) -> None:
        """Begin passes with labels from `labels`, counted by `scorer`; `answers` heads complete one."""
        self._labels = labels
        self._scorer = scorer
        self.train_only = train_only
        self._answers = answers
        self.forget()

    def begin(self, model: nn.Module) -> Pass | None:
        """The model's forward begins."""
        self._drop_loose()
        self._running = True
        self.current = self._backward = None
        if self._is_training(model):
            self.current = self.latest = self._new()
        return self.current

    def end(self) -> Pass | None:
        """The model's forward ends."""
        current, self.current, self._running = self.current, None, False
        return current

    def of_encoder(self, name: str, encoder: nn.Module) -> Pass | None:
        """The pass that an encoder's call belongs to; a loop may call the parts and never the model."""
        if self._running:
            return self.current
        if not self._is_training(encoder):
            return None
        known = self.loose
        if known is None or known.gradients or known.calls[name] or known.answered >= self._answers > 0:
            self._drop_loose()
            self.loose = self._new()
            if self._answers == 0:
                self.latest = self.loose
        return self.loose

    def of_head(self) -> Pass | None:
        """The pass that a head's call belongs to."""
        if self.current is None and self.loose is not None:
            self.latest = self.loose
        return self.current or self.loose

    def backward_reached(self, current: Pass) -> None:
        """The gradient came to the pass's logits."""
        self._backward = current

    def recomputed(self) -> Pass | None:
        """The pass that activation checkpointing runs again.

        Several forwards may come before one backward, so it is not the one whose gradient came last. It is the one
        that made the node whose backward is running; a checkpoint inside a checkpoint makes new nodes, and belongs to
        the pass around it.
        """
        node = running_node()
        made = [current for current in self._alive if current.made(node)]
        if made:
            self._backward = max(made, key=lambda current: current.first_node)
        return self._backward

    def forget(self) -> None:
        """No pass is under way."""
        self.latest = self.current = self.loose = self._backward = None
        self._alive = WeakSet()
        self._running = False

    def _is_training(self, module: nn.Module) -> bool:
        return torch.is_grad_enabled() and (module.training or not self.train_only)

    def _new(self) -> Pass:
        current = Pass(scored=self._scorer.wanted, first_node=next_node())
        self._scorer.seen.note("forwards")
        for earlier in self._alive:
            if earlier.end_node is None:  # its forward broke off, or was one of parts
                earlier.end_node = current.first_node
        self._alive.add(current)
        self._labels.begin(current)
        return current

    def _drop_loose(self) -> None:
        """An encoder was called on the side: the labels observed before are not its own."""
        if self.loose is not None and self.loose.answered == 0:
            self._labels.take_back(self.loose)
        self.loose = None


def answers_of(head: nn.Module | Mapping[str, nn.Module] | None) -> int:
    """How many heads answer in one pass."""
    if head is None:
        return 0
    return len(head) if isinstance(head, Mapping) else 1
