"""State of a training pass, and assignment of module calls and backwards to passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from balanceopt._sharding import is_sharded
from balanceopt._torch import backward_number, next_node, number_of_node, running_node, version_of, will_run
from balanceopt._undo import Undo
from balanceopt.monitor._module_hooks import FunctionalHooks
from balanceopt.monitor._scores import Kept, Sums

if TYPE_CHECKING:
    from balanceopt.monitor._scorer import Scorer

Edge = tuple[Any, int]
Head = nn.Module | Mapping[str, nn.Module] | None
Observed = tuple[Tensor, dict[str, Tensor]]


@dataclass(eq=False)
class Pass:
    """One forward in training.

    Attributes:
        scored: whether uni-modal logits are made of the pass.
        rehearsal: whether the forward is no training pass and only shows the layout from encoders to logits.
        undo: restores what scoring changes temporarily.
        hooks: tells which hooks on modules are part of the model's function.
        replayed: modules that scoring may run again.
        versions: parameters of `replayed`, each with its version at the start of the forward.
        inputs: the model's `(args, kwargs)` until its forward ends; None where only parts of the model were called.
        calls: number of calls of each modality's encoder.
        outputs: each modality's encoder outputs, one for each call, clean (before any drop), copied; for zero-out only.
        features: each modality's clean feature tensor, batch first, from its encoder's last call; a copy.
        sent_features: each modality's feature tensor as it entered the fusion (after any drop).
        pending: copies of whole encoder outputs, until the feature tensor in each is determined.
        pending_sent: the pending outputs as they entered the fusion, where these differ from the clean outputs.
        dropped: modalities whose features a transform (OPM) changed before the fusion.
        edges: by modality, the graph edges of its encoder's output tensors, until the feature tensor is determined.
        bases: graph edges of the bases of output tensors that are views, each with its modality and path.
        roots: graph edges of the logits, by modality for a head each; the graph is followed back from these.
        samples: number of samples in the batch, by the head's output.
        rows: by modality, the number of rows of its features.
        returned: by modality, the number of rows of the first tensor in its encoder's output.
        head_inputs: input of each head by modality; of the joint head under None.
        head_outputs: logits `(N, C)` of each modality's head, for per-head fusion.
        logits: joint logits `(N, C)`, N rows.
        shape: shape of the joint logits as the head returned them.
        classes_first: whether classes are dimension 1 there, before positions.
        unimodal: each modality's logits `(N, C)` float32; None before the forward's end.
        entropies: each modality's feature entropy by sample `(B,)`, where a consumer asked for it.
        present: bool `(B,)` by modality, the samples that have the modality; without an entry all samples.
        observed: labels and `present` as given by the user.
        labels: labels from the user, a loss module or the model's keyword; None to recover labels from the gradient.
        label_source: source of `labels`.
        counts: whether a backward that goes to parameters has reached the logits.
        gradients: gradients of the loss at the joint logits, one for each backward.
        head_calls: number of calls of heads.
        answering_call: number of the head call that made `logits`.
        listening: number of logits tensors with a gradient hook; only the last tensor's gradient counts.
        nodes: numbers of the autograd nodes of the heads' outputs.
        vectors: each modality's clean features `(N, D_m)` as the head gets them, where the projection is known.
        ignore_index: ignored label of the loss module that gave the labels; None if it has none.
        broke_off: whether the forward raised an exception.
        ended: whether the forward has ended and is scored.
        closed: whether the scores were taken or discarded; later labels belong to another pass.
        settled: whether `sums` are final.
        sums: what the pass adds to the scores; None before `settled`, or if the pass has none.
        target: target of each row of the logits; None before `settled`, or if the pass has none.
        first_node: number of the first autograd node that the forward may have made.
        end_node: number after the last such node; None while the forward runs.
        notes: state that other parts of the package attach to the pass (a drop mask).
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
    shape: torch.Size = field(default_factory=torch.Size)
    classes_first: bool = False
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
    nodes: set[int] = field(default_factory=set)
    vectors: dict[str, Tensor] = field(default_factory=dict)
    ignore_index: int | None = None
    broke_off: bool = False
    ended: bool = False
    closed: bool = False
    settled: bool = False
    sums: Sums | Kept | None = None
    target: Tensor | None = None
    first_node: int = 0
    end_node: int | None = None
    notes: dict[Any, Any] = field(default_factory=dict)

    @property
    def written_parameters(self) -> set[int]:
        """Ids of the replayed modules' parameters that the forward has changed in place."""
        return {id(parameter) for parameter, version in self.versions if version_of(parameter) != version}

    @property
    def answered(self) -> int:
        """Number of heads that have returned logits."""
        return len(self.head_outputs) or int(self.logits is not None)

    def made(self, node: int) -> bool:
        """Tell whether the pass's forward made the autograd node of this number."""
        return self.first_node <= node and (self.end_node is None or node < self.end_node)

    def end_forward(self) -> None:
        """Release the state that only the forward needs."""
        self.ended = True
        self.inputs = None
        self.replayed, self.versions = [], []
        self.outputs, self.features, self.sent_features, self.vectors = {}, {}, {}, {}
        self.pending, self.pending_sent = {}, {}
        self.edges, self.bases, self.roots = {}, {}, {}
        self.head_inputs, self.head_outputs = {}, {}


class Passes:
    """Passes in progress, and the pass that each module call belongs to.

    Attributes:
        latest: latest training pass.
        current: pass whose forward runs; None outside a forward, and in forwards that are not training passes.
        rehearsing: whether the model's forwards are rehearsals.
        loose: pass of a loop that calls encoders and heads without calling the model.
    """

    latest: Pass | None
    current: Pass | None
    loose: Pass | None
    _running: bool
    _backward: Pass | None
    _alive: WeakSet[Pass]

    def __init__(self, scorer: Scorer, *, train_only: bool, answers: int) -> None:
        """Start without a pass; `scorer` counts passes, and `answers` heads complete a pass."""
        self.rehearsing = False
        self._labels = scorer.labels
        self._scorer = scorer
        self.train_only = train_only
        self._answers = answers
        self.forget()

    def begin(self, model: nn.Module) -> Pass | None:
        """Start a pass at the model's forward; return None if the forward is neither training nor a rehearsal."""
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
        """End the running pass's forward, and return the pass."""
        current, self.current, self._running = self.current, None, False
        return current

    def of_encoder(self, name: str, encoder: nn.Module) -> Pass | None:
        """Return the pass that an encoder's call belongs to, also in a loop that never calls the model."""
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
        """Return the pass that a head's call belongs to."""
        if self.current is None and self.loose is not None:
            self.latest = self.loose
        return self.current or self.loose

    def of_loss(self, prediction: Tensor) -> Pass | None:
        """Return the pass whose logits a loss's prediction is made of; None for another head's prediction."""
        passes = {node: current for current in self._alive if not current.closed for node in current.nodes}
        waiting, seen = [prediction.grad_fn], set()
        oldest = min(passes, default=0)
        while passes and waiting:
            node = waiting.pop()
            number = number_of_node(node)
            if number in passes:
                return passes[number]
            if node is not None and node not in seen and number > oldest:
                seen.add(node)
                waiting.extend(following for following, _ in node.next_functions)
        # Without a node of its logits, as of a loss within the model, a pass can't be told from others.
        return None if self.latest is None or self.latest.nodes else self.latest

    def backward_reached(self, current: Pass) -> None:
        """Record that backward has reached the pass's logits."""
        self._backward = current

    def recomputed(self) -> Pass | None:
        """Return the pass that activation checkpointing recomputes.

        This is the pass that made the node whose backward runs: with several forwards before one backward, the pass
        whose logits backward reached last may be another. A nested checkpoint belongs to the outer pass.
        """
        node = number_of_node(running_node())
        made = [current for current in self._alive if current.made(node)]
        if made:
            self._backward = max(made, key=lambda current: current.first_node)
        return self._backward

    def forget(self) -> None:
        """Forget every pass in progress."""
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
            if earlier.end_node is None:  # its forward raised, or never called the model
                earlier.end_node = current.first_node
        self._alive.add(current)
        self._labels.begin(current)
        return current

    def _drop_loose(self) -> None:
        """Drop a loose pass; if no head was called, its observed labels go to the next pass."""
        if self.loose is not None and self.loose.answered == 0:
            self._labels.take_back(self.loose)
        self.loose = None


def answers_of(head: Head) -> int:
    """Return the number of heads that complete a pass."""
    if head is None:
        return 0
    return len(head) if isinstance(head, Mapping) else 1


class Traces:
    """Ask autograd, at the gradient of the logits, whether the running backward reaches parameters."""

    def __init__(self, model: nn.Module, encoders: Mapping[str, nn.Module], head: Head) -> None:
        """Prepare to search the parameters, the likeliest first: of heads, encoders, then the rest of the model."""
        self._model = model
        heads = head.values() if isinstance(head, Mapping) else [head]
        self._parts = [*(h for h in heads if h is not None), *encoders.values(), model]
        self._latest: ref[nn.Parameter] | None = None
        self._backward = -1

    def gone(self) -> bool:
        """Tell whether gradients of an earlier backward have been set to None since, as zero_grad does."""
        parameter = None if self._latest is None else self._latest()
        return parameter is not None and parameter.grad is None and self._backward != backward_number()

    def left(self) -> bool:
        """Tell whether the running backward reaches a parameter, unlike an attack's, which goes to inputs only.

        `torch.autograd.grad` to parameters counts, since the loop may set `.grad` itself.
        """
        latest = None if self._latest is None else self._latest()
        self._latest, self._backward = None, backward_number()
        trainable = False
        for parameter in self._likely(latest):
            if not parameter.requires_grad or nn.parameter.is_lazy(parameter):
                continue
            if is_sharded(parameter):  # the graph's leaves are other tensors (FSDP2)
                return True
            trainable = True
            reached = _reached(parameter)
            if reached is not False:
                self._latest = ref(parameter) if reached else None
                return True
        # Other tensors may replace the parameters in the graph, as under torch.func.functional_call.
        return trainable and not self._in_graph()

    def _likely(self, latest: nn.Parameter | None) -> Iterator[nn.Parameter]:
        if latest is not None:
            yield latest
        for module in self._parts:
            yield from module.parameters()

    def _in_graph(self) -> bool:
        """Tell whether any of the model's parameters is in the graph of the logits."""
        params = {id(p) for p in self._model.parameters()}
        nodes: list[Any] = [running_node()]
        seen = set(nodes)
        while nodes:
            node = nodes.pop()
            if id(getattr(node, "variable", None)) in params:
                return True
            new = {before for before, _ in getattr(node, "next_functions", ()) if before is not None} - seen
            seen |= new
            nodes += new
        return False


def _reached(parameter: nn.Parameter) -> bool | None:
    """Tell whether the running backward adds to a parameter's `.grad`; None under `torch.autograd.grad`."""
    node = get_gradient_edge(parameter).node
    try:
        return will_run(node)
    except RuntimeError:  # the leaf is an input of torch.autograd.grad
        return None
