"""ModalityMonitor: uni-modal scores of any model, by hooks alone."""

from __future__ import annotations

import warnings
from collections import Counter, deque
from collections.abc import Callable, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Literal, get_args
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from balanceopt._deferred import DeferredCounts
from balanceopt.distributed import Group
from balanceopt.functional import feature_entropy
from balanceopt.modality import Encoders, find_module, modality_parameters, resolve_encoders, unwrap
from balanceopt.monitor._accumulator import Accumulator
from balanceopt.monitor._early import can_score_early, early_sums
from balanceopt.monitor._labels import labels_of_call, labels_of_loss
from balanceopt.monitor._layout import lay_out, layout_of
from balanceopt.monitor._matching import Projection
from balanceopt.monitor._outputs import features_of, logits_of, map_tensors
from balanceopt.monitor._pass import Pass
from balanceopt.monitor._settle import settle
from balanceopt.monitor._sums import ModalitySums
from balanceopt.monitor._supported import in_backward, next_node, refuse_model, running_node
from balanceopt.monitor._unimodal import PerHead, SplitHead, UnimodalLogits, UserScores, choose_scores

LabelSource = Literal["auto", "observe", "loss", "model", "gradient"]
Select = Mapping[str, Callable[[Any], Tensor]]
Transform = Callable[[str, Pass, Any], Any]
Tap = Callable[[str, Any, Pass | None], None]
GradientListener = Callable[[Pass, Tensor], None]

# Under plain cross-entropy no row has two negative gradients; this many may come from rounding.
_AMBIGUOUS_PART = 0.01
_FEWEST_CLASSES_FOR_LINE = 4
# Forwards before one backward whose heads only reentrant activation checkpointing will make part of a graph.
_UNHEARD = 32


class ModalityMonitor:
    r"""Watch a model in training: each modality's features, uni-modal logits and the labels, by hooks alone.

    For each training pass whose backward reaches the head it adds up, over samples,

    $$S^m = \sum_i \text{softmax}(\text{logits}^m_i)_{y_i}$$

    where \(\text{logits}^m\) is what the head would answer to modality m alone. Neither the model nor the loop
    changes; nothing is recorded in eval mode or without gradients.

    Args:
        model: the whole model. May be wrapped in DistributedDataParallel or compiled (attach before the first call).
        encoders: each modality's encoder, a module of `model` or its dotted name.
        head: what turns features into logits: a module or its name; a mapping from modality to its own head (sum or
            late fusion); the model itself where its output is the logits; None to watch features only.
        scores: how uni-modal logits are made: `"split"` (a linear head over concatenated features, exact Eq. 8),
            `"per-head"`, `"zero-out"` (any fusion), a function from `{modality: features}` to logits, or `"auto"`:
            the first of them that is exact.
        labels: `"auto"` (observed, else from a watched loss, else from the model's `labels=`, else recovered from
            the gradient at the logits), one of `"observe"`, `"loss"`, `"model"`, `"gradient"`, or a loss module.
        train_only: watch only passes in training mode; False for models fine-tuned in eval mode.
        group: process group over which scores are summed; None for the default one, False for no communication.
        select: for an encoder whose output is not its feature tensor `(B, ...)`: a function that picks it.
        slices: each modality's columns of the head's input, where they can't be found by comparing numbers.
        every: with `"zero-out"`, score only every n-th optimizer step; the last scores hold in between.
        ignore_index: label of samples that do not count.
        strict: raise, not warn, where labels recovered from the gradient are doubtful.

    Raises:
        ValueError: for encoders, a head, slices or options that do not fit the model.
        NotImplementedError: for FullyShardedDataParallel (FSDP1), DataParallel and DeepSpeed models.

    Example:
        >>> model = torch.nn.ModuleDict({m: torch.nn.Linear(2, 3) for m in ("a", "b")})
        >>> with ModalityMonitor(model, {"a": "a", "b": "b"}) as monitor:
        ...     print(monitor.modalities)
        ('a', 'b')

    Reference:
        Peng et al., CVPR 2022, Eq. 8-9; Wei et al., TPAMI 2024, Eq. 6-7.
    """

    def __init__(
        self,
        model: nn.Module,
        encoders: Encoders,
        head: nn.Module | str | Mapping[str, nn.Module | str] | None = None,
        *,
        scores: str | UserScores = "auto",
        labels: LabelSource | nn.Module = "auto",
        train_only: bool = True,
        group: Group = None,
        select: Select | None = None,
        slices: Mapping[str, slice] | None = None,
        every: int = 1,
        ignore_index: int = -100,
        strict: bool = False,
    ) -> None:
        refuse_model(model)
        if every < 1:
            raise ValueError(f"`every` should be at least 1. Found every = {every}.")
        if not isinstance(labels, nn.Module) and labels not in get_args(LabelSource):
            raise ValueError(
                f"`labels` should be one of {get_args(LabelSource)} or a loss module. Found {labels!r}."
            )
        self.model = unwrap(model)
        self.encoders = resolve_encoders(model, encoders)
        self.modalities = tuple(self.encoders)
        modality_parameters(model, self.encoders)  # an encoder without parameters of its own is refused now
        unknown = (select or {}).keys() - self.encoders.keys()
        if unknown:
            raise ValueError(f"`select` should be given for {self.modalities}. Found also {sorted(unknown)}.")
        self.head = self._resolve_head(head)
        self.train_only = train_only
        self.group = group
        self.every = every
        self.ignore_index = ignore_index
        self.strict = strict
        self._labels: str = "loss" if isinstance(labels, nn.Module) else labels
        self._select = dict(select or {})
        self._unimodal: UnimodalLogits | None = choose_scores(
            scores, self.model, self.encoders, self.head, slices
        )
        self._accumulators: list[Accumulator] = []
        self._transforms: list[Transform] = []
        self._taps: list[Tap] = []
        self._gradient_listeners: list[GradientListener] = []
        self._seen: Counter[str] = Counter()
        self._recovered = DeferredCounts(("rows", "ambiguous"), self._judge_recovery)
        self._warned = False
        self._classes: int | None = None
        self._clear()
        self._handles = self._register()
        if isinstance(labels, nn.Module):
            self.watch_loss(labels)

    # -- what the user calls -------------------------------------------------------------------------------------

    def observe(self, labels: Any, *, present: Mapping[str, Tensor] | None = None) -> None:
        """Give the labels of a batch: the latest training pass without any, else the next one.

        Args:
            labels: `(B,)` class indices, or `(B, C)` class probabilities.
            present: bool `(B,)` by modality, for batches in which some samples lack a modality.

        Raises:
            KeyError: if `present` names an unknown modality.
        """
        unknown = (present or {}).keys() - self.encoders.keys()
        if unknown:
            raise KeyError(f"`present` should be given by modality {self.modalities}. Found {sorted(unknown)}.")
        given = (torch.as_tensor(labels).detach(), dict(present or {}))
        waiting = self._latest
        if waiting is not None and not waiting.closed and waiting.label_source != "observe":
            self._give(waiting, *given)
        else:
            self._next = given

    def watch_loss(self, module: nn.Module, *, reduce: Literal["argmax"] | None = None) -> RemovableHandle:
        """Take the labels from the calls of a loss module `(logits, labels)`, and its `ignore_index`.

        Args:
            module: such as the loop's `nn.CrossEntropyLoss` instance.
            reduce: `"argmax"` to read soft targets as their most probable class.

        Returns:
            A handle with `.remove()`; `remove()` of the monitor takes it off too.
        """
        handle = module.register_forward_hook(partial(self._on_loss, reduce), with_kwargs=True)
        self._handles.append(handle)
        return handle

    def reset(self) -> None:
        """Forget every score that no step has used, as after `model.zero_grad()`."""
        for accumulator in self._accumulators:
            if accumulator.steps:  # the others use the scores of gradients that are gone
                accumulator.discard()
        self._next = None

    def remove(self) -> None:
        """Take every hook off. May be called twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._clear()
        for accumulator in self._accumulators:
            accumulator.discard()

    def stats(self) -> dict[str, Any]:
        """What was seen so far: how scores are made, passes, and where their labels came from."""
        sources = {name: self._seen[f"labels:{name}"] for name in get_args(LabelSource)[1:]}
        return {
            "scores": None if self._unimodal is None else self._unimodal.name,
            "passes": self._seen["passes"],
            "passes_without_scores": self._seen["unscored"],
            "labels": {name: count for name, count in sources.items() if count},
            "recovered_labels": self._recovered.read(),
            "missing": {name: self._seen[f"missing:{name}"] for name in self.modalities},
        }

    def __enter__(self) -> ModalityMonitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        scores = "features only" if self._unimodal is None else self._unimodal.name
        return f"ModalityMonitor(modalities={list(self.modalities)}, scores={scores!r}, labels={self._labels!r})"

    # -- what the rest of the package calls ----------------------------------------------------------------------

    def accumulator(self, *, needs_entropy: bool = False, steps: bool = True) -> Accumulator:
        """A new consumer's own view of the passes; `steps` where it takes them once an optimizer step."""
        accumulator = Accumulator(self._settled, self._on_take, needs_entropy=needs_entropy, steps=steps)
        self._accumulators.append(accumulator)
        return accumulator

    def drop_accumulator(self, accumulator: Accumulator) -> None:
        """Stop filling a consumer's view."""
        self._accumulators = [a for a in self._accumulators if a is not accumulator]

    def add_transform(self, transform: Transform) -> None:
        """Let `transform(modality, pass, output)` change encoders' outputs on their way into the fusion.

        It is called again with the same pass when activation checkpointing runs an encoder a second time.
        """
        self._transforms.append(transform)

    def drop_transform(self, transform: Transform) -> None:
        """Stop calling `transform`."""
        self._transforms = [t for t in self._transforms if t != transform]

    def add_tap(self, tap: Tap) -> None:
        """Show `tap(modality, output, pass)` every clean output of an encoder, attached to its graph.

        It is called in every mode; `pass` is None outside training. It is called again, with the same pass, when
        activation checkpointing runs an encoder a second time.
        """
        self._taps.append(tap)

    def drop_tap(self, tap: Tap) -> None:
        """Stop calling `tap`."""
        self._taps = [t for t in self._taps if t != tap]

    def add_gradient_listener(self, listener: GradientListener) -> None:
        """Tell `listener(pass, gradient)` the gradient `(N, C)` at the joint logits, before it goes on to the head."""
        self._gradient_listeners.append(listener)

    def drop_gradient_listener(self, listener: GradientListener) -> None:
        """Stop telling `listener`."""
        self._gradient_listeners = [g for g in self._gradient_listeners if g != listener]

    @property
    def latest(self) -> Pass | None:
        """The latest forward in training."""
        return self._latest

    def features(self, name: str, output: Any) -> Tensor:
        """The feature tensor of an encoder's output, attached to its graph.

        Raises:
            TypeError: if the output holds no tensor.
        """
        select = self._select.get(name)
        features = features_of(output) if select is None else select(output)
        if not isinstance(features, Tensor):
            raise TypeError(
                f"the encoder of {name!r} should return a tensor, or something that holds one. Found "
                f"{type(output).__name__}; pass `select={{{name!r}: function}}` to pick its features."
            )
        return features

    def projection(self, name: str) -> Projection | None:
        """How the encoder's features become what the head gets, once a pass has shown it."""
        found: Projection | None = getattr(self._chosen(), "projections", {}).get(name)
        return found

    def live_logits(self, name: str, features: Tensor) -> Tensor:
        """The shared head's uni-modal logits `(B, C)` of clean features, attached to the graphs of both.

        Raises:
            ValueError: if the uni-modal logits are neither "split" nor "per-head".
            RuntimeError: if no pass has shown how the features become the head's input.
        """
        chosen = self._chosen()
        if not isinstance(chosen, (SplitHead, PerHead)):
            found = "no head" if self._unimodal is None else repr(self._unimodal.name)
            raise ValueError(
                "the shared head's own answer to one modality needs a linear head on concatenated features "
                f"(scores='split') or a head for each modality ('per-head'). Found {found}."
            )
        return chosen.live(name, features)

    def _chosen(self) -> UnimodalLogits | None:
        return getattr(self._unimodal, "chosen", self._unimodal)

    def expect_scores(self, who: str) -> None:
        """Refuse to serve a method that needs scores when there is no head.

        Raises:
            ValueError: naming what is missing.
        """
        if self._unimodal is None:
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
        chosen = getattr(self._unimodal, "chosen", self._unimodal)
        return dict(chosen.columns) if isinstance(chosen, SplitHead) else {}

    @property
    def active(self) -> bool:
        """Whether its hooks are on."""
        return bool(self._handles)

    @property
    def window(self) -> int:
        """How many steps' passes were begun: the phase of `every`."""
        return self._window

    @window.setter
    def window(self, window: int) -> None:
        self._window, self._fresh = window, True

    @property
    def layout(self) -> dict[str, Any]:
        """What passes have shown of the way from encoders to head, as plain numbers; may be set after a resume."""
        return layout_of(self._unimodal)

    @layout.setter
    def layout(self, layout: dict[str, Any]) -> None:
        lay_out(self._unimodal, layout)

    @property
    def can_score_early(self) -> bool:
        """Whether `early_sums` is to be had: for split and per-head once a pass has shown the way to the head."""
        return can_score_early(self._chosen(), self.modalities)

    def early_sums(self, current: Pass) -> ModalitySums | None:
        """The sums of a pass whose encoders have run, before its fusion does; None without labels."""
        return early_sums(self._chosen(), current, self.modalities, self.ignore_index)

    @property
    def num_classes(self) -> int | None:
        """C, once a pass was seen."""
        return self._classes

    def empty_sums(self, device: torch.device) -> ModalitySums:
        """Sums over no sample, of the shape that other ranks have."""
        head = unwrap(self.head) if isinstance(self.head, nn.Module) else None
        outputs = self._classes or getattr(head, "out_features", None) or 1
        return ModalitySums.zeros(len(self.modalities), max(outputs, 2), device)

    def silence(self) -> str:
        """Why no score may have come, in words for the user."""
        if not self.active:
            return "the monitor's hooks were removed"
        reasons = []
        if any("_compiled_call_impl" in m.__dict__ and m._compiled_call_impl for m in self.model.modules()):
            reasons.append(
                "the model was compiled: build the monitor before the first call of the compiled model, or call "
                "torch._dynamo.reset()"
            )
        if self._seen["forwards"] and not self._seen["heads"]:
            reasons.append("the head's hook did not fire: the head was replaced, or only its weights are used")
        elif not self._seen["forwards"]:
            reasons.append("no forward of the model in training mode was seen (fine-tuning in eval mode: train_only=False)")
        elif not self._seen["passes"]:
            reasons.append("no backward reached the head's output (frozen model, or no loss on it)")
        elif self._seen["unscored"]:
            reasons.append("no labels or no features came with the pass: call monitor.observe(labels)")
        reasons.append(
            "otherwise: model compiled before the monitor was built, wrong or replaced head, head used functionally, "
            "frozen model"
        )
        return "; ".join(reasons)

    # -- hooks ---------------------------------------------------------------------------------------------------

    def _register(self) -> list[RemovableHandle]:
        handles = [
            self.model.register_forward_pre_hook(self._on_start, with_kwargs=True),
            self.model.register_forward_hook(self._on_end, with_kwargs=True),
        ]
        for name, encoder in self.encoders.items():
            # The first hook of an encoder: what it sees is what the encoder made, before any other hook changes it.
            handles.append(encoder.register_forward_hook(partial(self._on_encoder, name), prepend=True))
        if isinstance(self.head, Mapping):
            for name, head in self.head.items():
                handles.append(head.register_forward_hook(partial(self._on_own_head, name), with_kwargs=True))
        elif self.head is not None and self.head is not self.model:
            handles.append(self.head.register_forward_hook(self._on_head, with_kwargs=True))
        return handles

    @torch.compiler.disable
    def _on_start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if in_backward():
            return
        self._parts_only = None
        self._running = True
        self._current = self._backward = None
        if torch.is_grad_enabled() and (module.training or not self.train_only):
            self._current = self._new_pass()
            self._current.inputs = (args, kwargs)
            if self._current.labels is None and self._labels in ("auto", "model"):
                self._give(self._current, labels_of_call(args, kwargs), source="model")

    @torch.compiler.disable
    def _on_encoder(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        again = in_backward()
        current = self._recomputed() if again else self._pass_of(name, module)
        for tap in self._taps:
            tap(name, output, current)
        if current is None:
            return None
        if not again:
            self._capture(name, current, output)
        sent = output
        for transform in self._transforms:
            sent = transform(name, current, sent)
        if not again and sent is not output:
            current.sent_features[name] = self.features(name, sent).detach()
        return None if sent is output else sent

    @torch.compiler.disable
    def _on_own_head(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        logits = logits_of(output)
        if logits is None:
            return
        if in_backward():
            self._listen_again(logits)
            return
        current = self._current or self._parts_only
        if current is None:
            return
        self._seen["heads"] += 1
        current.head_inputs[name] = _first_tensor(args, kwargs)
        if not current.head_outputs:
            self._listen(current, logits)
        current.head_outputs[name] = logits.detach()
        current.logits = _rows(sum(current.head_outputs.values(), torch.zeros_like(logits.detach())))
        if current is self._parts_only and len(current.head_outputs) == len(self.modalities):
            self._end_forward(current)

    @torch.compiler.disable
    def _on_head(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        logits = logits_of(output)
        if logits is None:
            return
        if in_backward():
            self._listen_again(logits)
            return
        current = self._current or self._parts_only
        if current is None:
            return
        self._seen["heads"] += 1
        current.head_inputs[None] = _first_tensor(args, kwargs)
        current.logits = _rows(logits.detach())
        self._listen(current, logits)
        if current is self._parts_only:
            self._end_forward(current)

    @torch.compiler.disable
    def _on_end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if in_backward():
            return
        current, self._current, self._running = self._current, None, False
        if current is None:
            return
        logits = logits_of(output)
        if logits is not None and self.head is self.model:
            self._seen["heads"] += 1
            current.logits = _rows(logits.detach())
            self._listen(current, logits)
        self._end_forward(current)

    def _on_loss(
        self, reduce: str | None, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        current = self._latest
        # A pass in eval mode between a forward and its backward calls the loss too: its result has no graph.
        trained = isinstance(output, Tensor) and output.requires_grad
        if current is None or current.closed or not trained or self._labels not in ("auto", "loss"):
            return
        if current.label_source in ("gradient", "model"):
            labels = labels_of_loss(args, kwargs, reduce)
            self._give(current, labels, source="loss")
            current.ignore_index = getattr(module, "ignore_index", None)

    @torch.compiler.disable
    def _on_gradient(self, current: Pass, gradient: Tensor) -> None:
        self._backward = current
        if current.unimodal is None:  # the loop called parts of the model, and not all of them
            self._end_forward(current)
        if not current.gradients:
            self._seen["passes"] += 1
            for accumulator in self._accumulators:
                accumulator.add(current)
        current.gradients.append(_rows(gradient.detach()))
        for listener in self._gradient_listeners:
            listener(current, current.gradients[-1])

    # -- steps of a pass -----------------------------------------------------------------------------------------

    def _pass_of(self, name: str, module: nn.Module) -> Pass | None:
        """The pass that an encoder's call belongs to; a loop may call the parts and never the model."""
        if self._running:
            return self._current
        if not (torch.is_grad_enabled() and (module.training or not self.train_only)):
            return None
        known = self._parts_only
        if known is None or known.unimodal is not None or name in known.outputs:
            self._parts_only = self._new_pass()
        return self._parts_only

    def _new_pass(self) -> Pass:
        current = Pass(held_back=self._is_held_back(), first_node=next_node())
        self._seen["forwards"] += 1
        if self._latest is not None and self._latest.end_node is None:  # its forward broke off
            self._latest.end_node = current.first_node
        self._latest = current
        self._passes.add(current)
        if self._next is not None:
            self._give(current, *self._next)
            self._next = None
        return current

    def _is_held_back(self) -> bool:
        if self._fresh:
            self._window += 1
            self._fresh = False
        return self.every > 1 and (self._window - 1) % self.every != 0

    def _give(
        self,
        current: Pass,
        labels: Tensor | None,
        present: dict[str, Tensor] | None = None,
        *,
        source: str = "observe",
    ) -> None:
        if labels is None or (source == "observe" and self._labels not in ("auto", "observe")):
            return
        current.labels, current.label_source = labels, source
        current.present.update(present or {})

    def _capture(self, name: str, current: Pass, output: Any) -> None:
        features = self.features(name, output).detach()
        current.outputs.setdefault(name, []).append(map_tensors(Tensor.detach, output))
        current.features[name] = current.sent_features[name] = features

    def _listen(self, current: Pass, logits: Tensor) -> None:
        """Note when backward reaches the logits."""
        if current.has_hook:
            return
        if logits.requires_grad:
            current.has_hook = True
            logits.register_hook(partial(self._on_gradient, current))
        elif current not in self._unheard:
            self._unheard.append(current)

    def _listen_again(self, logits: Tensor) -> None:
        """Under reentrant activation checkpointing only the second run of a head is part of a graph."""
        current = self._recomputed()
        if current is not None and current in self._unheard and logits.requires_grad:
            self._unheard.remove(current)
            self._listen(current, logits)

    def _recomputed(self) -> Pass | None:
        """The pass that activation checkpointing runs again.

        Several forwards may come before one backward, so it is not the one whose gradient came last. It is the one
        that made the node whose backward is running; a checkpoint inside a checkpoint makes new nodes, and belongs to
        the pass around it.
        """
        node = running_node()
        made = [current for current in self._passes if current.made(node)]
        if made:
            self._backward = max(made, key=lambda current: current.first_node)
        return self._backward

    def _end_forward(self, current: Pass) -> None:
        """Make the uni-modal logits while the features are at hand, then let the features go."""
        current.end_node = next_node()
        for name in self.modalities:
            self._seen[f"missing:{name}"] += name not in current.features
        if current.logits is not None and self._unimodal is not None:
            self._classes = current.logits.shape[-1]
            current.unimodal = {}
            if not current.held_back and current.logits.shape[0] > 0:
                current.unimodal = current.early or self._unimodal(current)
                if any(accumulator.needs_entropy for accumulator in self._accumulators):
                    with torch.no_grad():
                        current.entropies = {
                            name: feature_entropy(current.vectors.get(name, z))
                            for name, z in current.features.items()
                        }
        current.end_forward()

    def _settled(self, done: Pass) -> ModalitySums | None:
        """The pass's sums, made once for all consumers."""
        if not done.settled:
            done.closed = done.settled = True
            if done.labels is None and self._labels not in ("auto", "gradient"):
                done.gradients.clear()
            ignore = self.ignore_index if done.ignore_index is None else done.ignore_index
            result = settle(done, self.modalities, ignore)
            if result is not None:
                done.sums = result.sums
                self._seen[f"labels:{done.label_source}"] += 1
                if result.ambiguous is not None:
                    self._recovered.add(torch.tensor(result.rows), result.ambiguous)
            elif not done.held_back:
                self._seen["unscored"] += 1
            done.unimodal, done.logits = None, None
            done.gradients.clear()
        return done.sums

    def _on_take(self, accumulator: Accumulator) -> None:
        """Notice that a step ended, for `every`: by those who step, or where nobody does by anyone."""
        if accumulator.steps or not any(a.steps for a in self._accumulators):
            self._fresh = True

    def _judge_recovery(self, counts: dict[str, int]) -> None:
        if counts["ambiguous"] <= _AMBIGUOUS_PART * counts["rows"]:
            return
        message = (
            f"{counts['ambiguous']} of {counts['rows']} rows have several negative gradients at the logits: soft "
            "targets, label smoothing or an auxiliary loss on the logits. Labels recovered from them may be wrong: "
            "pass labels via monitor.observe(labels) or monitor.watch_loss(loss)."
        )
        if self.strict or (self._classes or 2) < _FEWEST_CLASSES_FOR_LINE:
            raise RuntimeError(message)
        if not self._warned:
            self._warned = True
            warnings.warn(message, stacklevel=2)

    def _resolve_head(
        self, head: nn.Module | str | Mapping[str, nn.Module | str] | None
    ) -> nn.Module | dict[str, nn.Module] | None:
        if head is None:
            return None
        if isinstance(head, Mapping):
            if head.keys() != self.encoders.keys():
                raise ValueError(
                    f"`head` should have one head for each of {sorted(self.encoders)}. Found {sorted(head)}."
                )
            return {name: find_module(self.model, head[name], f"head[{name!r}]") for name in self.encoders}
        if isinstance(head, nn.Module) and unwrap(head) is self.model:
            return self.model
        return find_module(self.model, head, "`head`")

    def _clear(self) -> None:
        """No pass under way."""
        self._current: Pass | None = None
        self._parts_only: Pass | None = None
        self._latest: Pass | None = None
        self._backward: Pass | None = None
        self._passes: WeakSet[Pass] = WeakSet()
        self._unheard: deque[Pass] = deque(maxlen=_UNHEARD)
        self._next: tuple[Tensor, dict[str, Tensor]] | None = None
        self._running = False
        self._fresh = True
        self._window = 0

    def __getstate__(self) -> dict[str, Any]:
        # Passes hold tensors of a graph, which can neither be copied nor pickled.
        transient = dict.fromkeys(("_current", "_parts_only", "_latest", "_backward"))
        # Who listens from outside (a scheduler with its loaders) is no part of the model.
        outside: dict[str, list[Any]] = {"_taps": [], "_gradient_listeners": []}
        kept = {name: value for name, value in self.__dict__.items() if name not in ("_passes", "_unheard")}
        return {**kept, **transient, **outside, "_running": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _passes=WeakSet(), _unheard=deque(maxlen=_UNHEARD))


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value.detach()
    return torch.empty(0, 0)


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(-1)
