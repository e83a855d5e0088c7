"""A training pass: what hooks and backward have shown of it, and which pass a call of a module belongs to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from balanceopt._torch import next_node, number_of_node, running_node, version_of
from balanceopt._undo import Undo
from balanceopt.monitor._module_hooks import FunctionalHooks
from balanceopt.monitor._scores import Scores

if TYPE_CHECKING:
    from balanceopt.monitor._scorer import Scorer

Edge = tuple[Any, int]
Observed = tuple[Tensor, dict[str, Tensor]]


@dataclass(eq=False)
class Pass:
    """One forward in training.

    Attributes:
        scored: uni-modal logits are made of it.
        rehearsal: a forward, not of training, that only shows the way from encoders to logits.
        undo: the way back from what scoring changes for a while.
        hooks: tell which hooks on modules are part of the model's function.
        replayed: the modules that scoring may run once more.
        versions: of their parameters, when the forward began.
        inputs: the model's `(args, kwargs)`, held until its forward ends; None where only its parts were called.
        calls: how often each modality's encoder ran.
        outputs: each modality's encoder outputs, one a call, clean (before any drop), copied; for zero-out only.
        features: each modality's clean feature tensor, batch first, from its last call; a copy.
        sent_features: the same as it went on into the fusion (after any drop).
        pending: copies of whole encoder outputs, while it is not known which of their tensors are the features.
        pending_sent: the same as they went on into the fusion, where that is something else.
        dropped: the modalities whose features something (OPM) changed on their way into the fusion.
        edges: by modality, the places in the graph of its encoder's output tensors, until their use is known.
        bases: the same of what those tensors are views of, each with its modality and tensor.
        roots: what to follow the graph back from: the logits, each head's by modality.
        samples: how many samples the batch has, by the head's output.
        rows: by modality, how many rows its features have.
        returned: by modality, how many rows the first tensor of its encoder's output has.
        head_inputs: what each head got, by modality; under None what the joint head got.
        head_outputs: each modality's own head's logits `(N, C)`, for per-head fusion.
        logits: the joint logits `(N, C)`, N rows.
        unimodal: each modality's logits `(N, C)` float32; None before the forward's end.
        entropies: each modality's feature entropy by sample `(B,)`, where a consumer asked for it.
        present: bool `(B,)` by modality, the samples that have it; all of them where not given.
        observed: what the user gave: labels, and `present`.
        labels: as given by the user, a loss module or the model's keyword; None to recover them.
        label_source: where `labels` come from.
        counts: a backward that goes to parameters has reached the logits.
        gradients: of the loss at the joint logits, one a backward.
        head_calls: how often heads ran.
        answering_call: which run of the joint head made `logits`.
        listening: for the gradient of how many logits hooks were put on; only that of the last one counts.
        vectors: each modality's clean features as the head gets them `(N, D_m)`, where that is known.
        ignore_index: of the loss module that gave the labels, where it has one.
        broke_off: its forward raised an exception.
        ended: nothing of its forward is awaited.
        closed: its scores were taken or discarded: labels that come now are for another pass.
        settled: its sums are made.
        sums: what it contributes, once made.
        first_node: number of the first autograd node that its forward may have made.
        end_node: number after the last one; None while the forward runs.
        notes: what other parts of the package remember of this pass (a drop mask).
    """

    scored: bool = True
    rehearsal: bool = False
    undo: Undo = field(default_factory=Undo)
    hooks: FunctionalHooks = field(default_factory=FunctionalHooks)
    replayed: list[nn.Module] = field(default_factory=list)
    versions: list[tuple[Tensor, int]] = field(default_factory=list)
    inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    calls: Counter[str] = field(default_factory=Counter)
    outputs: dict[str, list[Any]] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)
    sent_features: dict[str, Tensor] = field(default_factory=dict)
    pending: dict[str, Any] = field(default_factory=dict)
    pending_sent: dict[str, Any] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)
    edges: dict[str, dict[Edge, str]] = field(default_factory=dict)
    bases: dict[Edge, tuple[str, str]] = field(default_factory=dict)
    roots: dict[str | None, list[Edge]] = field(default_factory=dict)
    samples: int | None = None
    rows: dict[str, int] = field(default_factory=dict)
    returned: dict[str, int] = field(default_factory=dict)
    head_inputs: dict[str | None, Tensor] = field(default_factory=dict)
    head_outputs: dict[str, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None
    unimodal: dict[str, Tensor] | None = None
    entropies: dict[str, Tensor] = field(default_factory=dict)
    present: dict[str, Tensor] = field(default_factory=dict)
    observed: Observed | None = None
    labels: Tensor | None = None
    label_source: str = "gradient"
    counts: bool = False
    gradients: list[Tensor] = field(default_factory=list)
    head_calls: int = 0
    answering_call: int = 0
    listening: int = 0
    vectors: dict[str, Tensor] = field(default_factory=dict)
    ignore_index: int | None = None
    broke_off: bool = False
    ended: bool = False
    closed: bool = False
    settled: bool = False
    sums: Scores | None = None
    first_node: int = 0
    end_node: int | None = None
    notes: dict[Any, Any] = field(default_factory=dict)

    @property
    def written_parameters(self) -> set[int]:
        """Ids of the replayed modules' parameters that the forward has written to."""
        return {id(parameter) for parameter, version in self.versions if version_of(parameter) != version}

    @property
    def answered(self) -> int:
        """How many heads have answered."""
        return len(self.head_outputs) or int(self.logits is not None)

    def made(self, node: int) -> bool:
        """Whether its forward made the autograd node of this number."""
        return self.first_node <= node and (self.end_node is None or node < self.end_node)

    def end_forward(self) -> None:
        """Let go of what only the forward needed."""
        self.ended = True
        self.inputs = None
        self.replayed, self.versions = [], []
        self.outputs, self.features, self.sent_features, self.vectors = {}, {}, {}, {}
        self.pending, self.pending_sent = {}, {}
        self.edges, self.bases, self.roots = {}, {}, {}
        self.head_inputs, self.head_outputs = {}, {}


class Passes:
    """The passes under way.

    Attributes:
        latest: the latest forward in training.
        current: the one whose forward runs; None outside, and in forwards that are not of training.
        rehearsing: the model's forwards are rehearsals.
        loose: the one whose parts a loop calls without calling the model.
    """

    latest: Pass | None
    current: Pass | None
    loose: Pass | None
    _running: bool
    _backward: Pass | None
    _alive: WeakSet[Pass]

    def __init__(self, scorer: Scorer, *, train_only: bool, answers: int) -> None:
        """Begin passes that `scorer` counts; `answers` heads complete one."""
        self.rehearsing = False
        self._labels = scorer.labels
        self._scorer = scorer
        self.train_only = train_only
        self._answers = answers
        self.forget()

    def begin(self, model: nn.Module) -> Pass | None:
        """The model's forward begins."""
        self._drop_loose()
        self._running = True
        self.current = self._backward = None
        if self.rehearsing:
            scorer = self._scorer
            learns = scorer.unimodal is not None and not scorer.unimodal.knows_layout
            self.current = Pass(scored=learns, rehearsal=True, undo=scorer.undo, hooks=scorer.hooks)
        elif self._is_training(model):
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
        node = number_of_node(running_node())
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
        current = Pass(
            scored=self._scorer.wanted,
            undo=self._scorer.undo,
            hooks=self._scorer.hooks,
            first_node=next_node(),
        )
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
