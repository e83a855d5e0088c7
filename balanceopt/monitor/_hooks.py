"""Hooks on a model, its encoders and heads, which end with their owner and are no-ops in copies of a module."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from inspect import ismethod
from typing import Any, Generic, TypeVar
from weakref import WeakMethod

import torch
from torch import Tensor, nn

from balanceopt._sharding import is_sharded
from balanceopt._torch import in_backward, is_batched, next_node, number_of_node
from balanceopt._undo import Undo
from balanceopt.distributed import Group
from balanceopt.monitor._answers import Answers
from balanceopt.monitor._features import edge_of
from balanceopt.monitor._forward import Pass, Passes, answers_of
from balanceopt.monitor._labels import call_of_loss, labels_of_call
from balanceopt.monitor._module_hooks import Hook, outside_graphs, remove_hooks
from balanceopt.monitor._outputs import detached_copy, first_tensor, map_tensors, tensors_in
from balanceopt.monitor._per_head import refuse_widths
from balanceopt.monitor._refusals import refuse_join
from balanceopt.monitor._scorer import Scorer

Function = TypeVar("Function", bound=Callable[..., Any])


class Listeners(Generic[Function]):
    """Functions in order of registration; bound methods are held by weak reference."""

    def __init__(self) -> None:
        self._references: list[Callable[[], Function | None]] = []

    def add(self, function: Function) -> None:
        """Register `function`."""
        self._references.append(WeakMethod(function) if ismethod(function) else lambda: function)

    def drop(self, function: Function) -> None:
        """Unregister `function`."""
        self._references = [held for held in self._references if held() not in (None, function)]

    def __iter__(self) -> Iterator[Function]:
        return iter([function for held in self._references if (function := held()) is not None])

    def __len__(self) -> int:
        return sum(1 for _ in self)


Head = nn.Module | Mapping[str, nn.Module] | None
Transform = Callable[[str, Pass, Any], Any]
Tap = Callable[[str, Any, Pass | None], None]
LogitListener = Callable[[Pass, Tensor], None]
GradientListener = Callable[[Pass, Tensor], None]
StartListener = Callable[[Pass | None], None]
HeadListener = Callable[[str | None, nn.Module, Any], None]
TargetListener = Callable[[str, Tensor, Mapping[str, Tensor]], None]
StepListener = Callable[[torch.optim.Optimizer, bool], None]
StepEnd = Callable[[torch.optim.Optimizer], None]


class Hooks:
    """Hooks on a model, its encoders and heads, which assign calls to passes and notify listeners.

    Attributes:
        transforms: functions `(modality, pass, output)` that replace an encoder's output before the fusion.
        links: functions `(modality, pass, output)` that return the encoder's output with the same values, and change
            the gradient on its way back from the fusion; called before `transforms`.
        outputs: functions `(modality, output, pass)` called with every clean output of an encoder, attached to its
            graph, in every mode; `pass` is None outside training. Activation checkpointing calls `outputs`,
            `transforms` and `links` again, with the same pass, when an encoder is recomputed.
        logits: functions `(pass, logits)` called with the joint logits `(N, C)`.
        gradients: functions `(pass, gradient)` called with the gradient `(N, C)` at the joint logits of backwards that
            go to parameters.
        starts: functions `(pass)` called when the model's forward begins, before any encoder; `pass` is None in a
            forward that is evaluated (`evaluates`).
        heads: functions `(modality, head, output)` called with the output of each head in forwards that are evaluated;
            the modality is None for the joint head.
        targets: functions `(source, target, present)` called with the targets of forwards that are evaluated; the
            source is `"observe"`, `"loss"` or `"model"`.
        before_step: functions `(optimizer, has_closure)` called at the start of a modulated step, before any gradient
            is changed; `optimizer` is the base.
        after_closure: functions `(optimizer)` called after each evaluation of a modulated step's closure, before its
            gradients are changed.
        after_step: functions `(optimizer)` called at the end of a modulated step, when its update is scaled.
        diagnosing: whether a diagnosis runs the model, whose forwards are not evaluated.
        passes: passes in progress.
        answers: finds the logits in a head's output.
    """

    def __init__(
        self,
        model: nn.Module,
        head: Head,
        scorer: Scorer,
        answers: Answers,
        *,
        train_only: bool,
        group: Group,
    ) -> None:
        """Prepare hooks that give passes to `scorer`; none is registered yet."""
        self.model = model
        self.encoders = scorer.features.encoders
        self.head = head
        self.passes = Passes(scorer, train_only=train_only, answers=answers_of(head))
        self.transforms: Listeners[Transform] = Listeners()
        self.links: Listeners[Transform] = Listeners()
        self.outputs: Listeners[Tap] = Listeners()
        self.logits: Listeners[LogitListener] = Listeners()
        self.gradients: Listeners[GradientListener] = Listeners()
        self.starts: Listeners[StartListener] = Listeners()
        self.heads: Listeners[HeadListener] = Listeners()
        self.targets: Listeners[TargetListener] = Listeners()
        self.before_step: Listeners[StepListener] = Listeners()
        self.after_closure: Listeners[StepEnd] = Listeners()
        self.after_step: Listeners[StepEnd] = Listeners()
        self.diagnosing = False
        self.features = scorer.features
        self.answers = answers
        self.handles: list[Hook] = []
        self._labels = scorer.labels
        self._scorer = scorer
        self._group = group

    def watch(self) -> None:
        """Register the hooks."""
        self._hook(self.model, self._on_start).before()
        self._hook(self.model, self._on_end).after(always_call=True)
        for name, encoder in self.encoders.items():
            # Prepended, so that the hook sees the encoder's output before any other hook changes it.
            self._hook(encoder, self._on_encoder, name).after(prepend=True)
        if isinstance(self.head, Mapping):
            for name, head in self.head.items():
                self._hook(head, self._on_head, name).after()
        elif self.head is not None and self.head is not self.model:
            self._hook(self.head, self._on_head, None).after()

    def watch_loss(self, module: nn.Module) -> Hook:
        """Read targets from the calls of a loss module."""
        hook = self._hook(module, self._on_loss)
        hook.after()
        return hook

    @property
    def active(self) -> bool:
        """Whether the hooks are registered."""
        return bool(self.handles)

    @property
    def evaluates(self) -> bool:
        """Whether a forward now is evaluated, as in validation: in eval mode, by `train_only`, or without gradients."""
        training = self.model.training if self.passes.train_only else torch.is_grad_enabled()
        return not training and not self.diagnosing

    @property
    def latest(self) -> Pass | None:
        """Latest training pass."""
        return self.passes.latest

    def rehearse(self, run: Callable[[], Any]) -> Any:
        """Run a forward that counts as no pass, and return its result.

        While the layout from features to logits is unknown, gradients are enabled, so that the graph shows the layout.
        """
        unimodal, known = self._scorer.unimodal, self.features.paths
        shown = known.keys() >= self.encoders.keys() and (unimodal is None or unimodal.knows_layout)
        if shown or any(is_sharded(p) for p in self.model.parameters()):
            return run()
        undo = Undo()
        with undo, undo:
            undo.set(vars(self.passes), "rehearsing", True)
            with torch.enable_grad():
                return run()

    def tell_target(self, source: str, target: Tensor, present: Mapping[str, Tensor]) -> None:
        """Pass the target of a forward that is evaluated to the listeners."""
        for listener in self.targets:
            listener(source, target, present)

    def remove(self) -> None:
        """Remove every hook."""
        remove_hooks(self.handles)
        self.handles.clear()
        self.passes.forget()

    # -- hooks ---------------------------------------------------------------------------------------------------

    def _hook(self, module: nn.Module, method: Callable[..., Any], *args: Any) -> Hook:
        hook = Hook(module, method, *args)
        self.handles.append(hook)  # before registration, so that an interrupt leaves no unlisted hook
        return hook

    def _on_start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if in_backward():
            self._scorer.seen.note("reruns")
            return
        self._scorer.undo.restore()
        if self._scorer.buffers:
            refuse_join(self._group)
        current = self.passes.begin(module)
        if (current is not None and not current.rehearsal) or (current is None and self.evaluates):
            for start in self.starts:
                start(current)
        if current is None and self.targets and self.evaluates and self._labels.allows("model"):
            target = labels_of_call(args, kwargs, classes=self._scorer.loss.has_classes)
            if target is not None:
                self.tell_target("model", target, {})
        if current is not None:
            self._scorer.begin_forward(current)
            if current.scored and self._scorer.needs_outputs:
                current.inputs = map_tensors(Tensor.detach, (args, kwargs))
            self._labels.from_call(current, args, kwargs)

    def _on_encoder(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        again = in_backward()
        current = self.passes.recomputed() if again else self.passes.of_encoder(name, module)
        for tap in self.outputs:
            tap(name, output, current)
        if current is None:
            return None
        if not again:
            self._keep(name, current, output)
        linked = output
        for link in () if current.rehearsal else self.links:
            linked = link(name, current, linked)
        sent = linked
        for transform in () if current.rehearsal else self.transforms:
            sent = transform(name, current, sent)
        if sent is output:
            return None
        if sent is not linked and current.scored and not again:
            current.dropped.add(name)
            if name in current.features:
                current.sent_features[name] = detached_copy(self.features.of(name, sent))
            else:
                current.pending_sent[name] = map_tensors(detached_copy, sent)
        self._scorer.hooks.resent(module, sent)
        return sent

    def _on_head(
        self, name: str | None, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Record the output of the joint head (`name` None) or of a modality's head."""
        if in_backward():
            self._refuse_reentrant_head(output)
            return
        self._show_answer(name, module, output)
        current = self.passes.of_head()
        if current is None:
            return
        logits = self.answers.logits(module, output, current)
        if logits is not None:
            self._take_logits(name, current, module, logits, first_tensor((args, kwargs)))

    def _on_end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if in_backward():
            return
        current = self.passes.end()
        if self.head is self.model and output is not None:
            self._show_answer(None, module, output)
        if current is None:
            return
        current.broke_off = output is None and sys.exc_info()[0] is not None
        if current.broke_off:
            return
        if self.head is self.model:
            logits = self.answers.logits(module, output, current)
            if logits is not None:
                self._take_logits(None, current, module, logits)
        elif self.head is None and current.edges:
            current.roots[None] = [edge_of(x) for x in tensors_in(output) if x.requires_grad]
        current.end_node = next_node()
        self._end_forward(current)

    def _on_loss(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        if self.evaluates:
            _, target = call_of_loss(args, kwargs) if self.targets else (None, None)
            if target is not None:
                self.tell_target("loss", target.detach().clone(), {})
            return
        # A pass without gradients between a forward and its backward may call the loss too, but makes no graph.
        if any(term.requires_grad for term in tensors_in(output)):
            self._labels.from_loss(self.passes.of_loss, module, args, kwargs)

    @outside_graphs
    def _on_gradient(self, current: Pass, head: nn.Module, call: int, gradient: Tensor) -> None:
        if call != current.listening or not self.handles or is_batched(gradient):
            return
        self.passes.backward_reached(current)
        if not current.ended:  # a loop that calls only parts of the model shows no earlier end of the forward
            self._end_forward(current)
        if gradient.dim() > 2 and self._scorer.loss.has_classes:
            self.answers.learn(head, gradient.detach(), current)
        rows = self.answers.rows(head, gradient.detach())
        self._scorer.backward_reached(current, rows)
        for listener in self.gradients if current.counts else ():
            listener(current, rows)

    # -- steps of a pass -----------------------------------------------------------------------------------------

    def _show_answer(self, name: str | None, head: nn.Module, output: Any) -> None:
        """Pass a head's output to the listeners, in a forward that is evaluated."""
        for listener in self.heads if self.heads and self.evaluates else ():
            listener(name, head, output)

    def _keep(self, name: str, current: Pass, output: Any) -> None:
        """Record copies of an encoder's output, since the fusion may change the output in place (an in-place ReLU)."""
        current.calls[name] += 1
        self.features.note(name, current, output)
        if not current.scored:
            return
        current.dropped.discard(name)
        tensors = [output] if isinstance(output, Tensor) else self.features.candidates(name, output).values()
        current.returned[name] = next((x.shape[0] for x in tensors if x.dim()), 0)
        settled = self.features.settled(name, output)
        if self._scorer.needs_outputs or not settled:
            output = map_tensors(detached_copy, output)
            current.outputs.setdefault(name, []).append(output)
        if settled:
            features = self.features.of(name, output)
            features = features if self._scorer.needs_outputs else detached_copy(features)
            current.features[name] = current.sent_features[name] = features
        else:
            current.pending[name] = output
            current.pending_sent.pop(name, None)

    def _end_forward(self, current: Pass) -> None:
        """Learn the layout from encoders to logits that the pass shows, and score the pass."""
        if current.roots or current.pending:
            self.features.learn(current)
        self._scorer.end_forward(current)

    def _take_logits(
        self, name: str | None, current: Pass, head: nn.Module, logits: Tensor, x: Tensor | None = None
    ) -> None:
        """Record the joint logits, or add a modality's logits to the sum, and register a hook for the gradient."""
        if not current.rehearsal:
            self._scorer.seen.note("heads")
        current.head_calls += 1
        if name is None and current.listening and not logits.requires_grad:
            return  # a side call of the head, outside the loss
        current.head_inputs[name] = (
            torch.empty(0, 0, dtype=logits.dtype, device=logits.device) if x is None else x.detach()
        )
        if name is None or not current.head_outputs:
            self._listen(current, head, logits)
        own = self.answers.rows(head, detached_copy(logits))
        current.samples = logits.shape[0] if logits.dim() else None
        current.shape, current.classes_first = logits.shape, self.answers.classes_first(head, logits)
        if logits.requires_grad and current.edges:
            current.roots[name] = [edge_of(logits)]
        if name is None:
            current.logits, current.answering_call = own, current.head_calls
        else:
            current.head_outputs[name] = own
            refuse_widths(current.head_outputs)
            current.logits = torch.stack(list(current.head_outputs.values())).sum(0)
        for listener in self.logits:
            listener(current, current.logits)

    def _listen(self, current: Pass, head: nn.Module, logits: Tensor) -> None:
        """Register a hook that runs when backward reaches the logits."""
        if logits.requires_grad:
            current.listening += 1
            current.nodes.add(number_of_node(logits.grad_fn))
            logits.register_hook(partial(self._on_gradient, current, head, current.listening))

    def _refuse_reentrant_head(self, output: Any) -> None:
        """Raise if only the recomputation of a head, in backward, is part of a graph."""
        current = self.passes.recomputed()
        if current is not None and not current.listening and any(x.requires_grad for x in tensors_in(output)):
            raise NotImplementedError(
                "the head runs under reentrant activation checkpointing, which keeps its first run out of the graph. "
                "Pass use_reentrant=False to torch.utils.checkpoint.checkpoint."
            )
