"""ModalityMonitor: uni-modal scores of any model, by hooks alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Literal, get_args
from weakref import finalize

from torch import Tensor, nn

from balanceopt._options import (
    check_choice,
    check_count,
    check_flag,
    check_kind,
    is_whole,
    names_of,
    shown,
    to_tensor,
)
from balanceopt._torch import holds_compiled_code, is_compiled
from balanceopt.distributed import Group, check_group
from balanceopt.modality import Encoders, modality_parameters, resolve_encoders, resolve_head, unwrap
from balanceopt.monitor._answers import Answers
from balanceopt.monitor._choice import choose_logits
from balanceopt.monitor._features import Features, Select
from balanceopt.monitor._forward import Pass
from balanceopt.monitor._hooks import Hooks
from balanceopt.monitor._labels import Labels
from balanceopt.monitor._labels import LabelSource as LabelSource
from balanceopt.monitor._logits import UserScores
from balanceopt.monitor._module_hooks import Hook, remove_hooks
from balanceopt.monitor._scorer import Scorer
from balanceopt.monitor._scores import ScoreBuffer
from balanceopt.monitor._silence import why_silent
from balanceopt.monitor._supported import refuse_model
from balanceopt.monitor._traces import Traces


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
            late fusion); the model itself where its output is the logits; None to watch features only. Classes stand
            last in the logits; first after the batch for convolutions.
        scores: how uni-modal logits are made: `"split"` (a linear head over concatenated features, exact Eq. 8),
            `"per-head"`, `"zero-out"` (any fusion), a function from `{modality: features}` to logits, or `"auto"`:
            the first of them that is exact.
        labels: `"auto"` (observed, else from a watched loss, else from the model's `labels=`, else recovered from
            the gradient at the logits), one of `"observe"`, `"loss"`, `"model"`, `"gradient"`, or a loss module.
        train_only: watch only passes in training mode; False for models fine-tuned in eval mode.
        group: process group over which scores are summed; None for the default one, False for no communication.
        select: for an encoder whose output is not its feature tensor `(B, ...)`: a function that picks it.
        slices: each modality's columns of the head's input, where they can't be found by comparing numbers.
        ignore_index: label of samples that do not count.
        strict: raise, not warn, where labels recovered from the gradient are doubtful.

    Attributes:
        model: the user's own module, without wrappers.
        encoders: each modality's, as a module.
        modalities: names, in the order of all sums.
        head: module, modules by modality, the model itself, or None.
        group: process group over which scores are summed.
        hooks: who may listen: `hooks.transforms`, `.outputs`, `.logits`, `.gradients`, each with `add` and `drop`.
        features: which tensor of an encoder's output is its features: `features.of(modality, output)`.
        labels: where labels come from: `labels.ignore_index`, `labels.recovers`.
        unimodal: how uni-modal logits are made: `unimodal.live`, `.columns`, `.layout()`; None for features only.

    Raises:
        ValueError: for encoders, a head, slices or options that do not fit the model.
        TypeError: if `model` is no module, or an option of another kind.
        NotImplementedError: for FullyShardedDataParallel (FSDP1), DataParallel and DeepSpeed models.

    Example:
        >>> model = nn.ModuleDict({m: nn.Linear(2, 3) for m in ("a", "b")})
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
        ignore_index: int = -100,
        strict: bool = False,
    ) -> None:
        check_kind("`model`", model, nn.Module, "the model, a torch.nn.Module")
        refuse_model(model)
        if not isinstance(labels, nn.Module):
            check_choice("labels", labels, get_args(LabelSource), other=", or a loss module")
        check_flag("train_only", train_only)
        check_group(group)
        check_count("ignore_index", ignore_index, at_least=None)
        check_flag("strict", strict)
        self.model = unwrap(model)
        self._was_compiled = is_compiled(model)
        self.encoders = resolve_encoders(model, encoders)
        self.modalities = tuple(self.encoders)
        modality_parameters(model, self.encoders)  # an encoder without parameters of its own is refused now
        self._check_by_modality("select", select, "a function of the encoder's output", callable)
        self._check_by_modality(
            "slices", slices, "its columns of the head's input, such as slice(0, 16)", _is_columns
        )
        self.head = resolve_head(self.model, self.encoders, head)
        self.group = group
        self._options: dict[str, Any] = {
            "scores": scores,
            "labels": "loss" if isinstance(labels, nn.Module) else labels,
            "train_only": train_only,
            "select": select or {},
            "slices": slices,
            "ignore_index": ignore_index,
            "strict": strict,
        }
        self._build(**self._options)
        finalize(self, remove_hooks, self.hooks.handles).atexit = False
        try:
            self.hooks.watch()
            if isinstance(labels, nn.Module):
                self.watch_loss(labels)
        except BaseException:  # a module that takes no hooks, as a scripted one; an interrupt
            self.remove()
            raise

    def _build(
        self,
        *,
        scores: str | UserScores,
        labels: LabelSource,
        train_only: bool,
        select: Select,
        slices: Mapping[str, slice] | None,
        ignore_index: int,
        strict: bool,
    ) -> None:
        """Make the parts, which watch nothing yet."""
        self.labels = Labels(labels, ignore_index)
        self.features = Features(self.encoders, select, apart=self.head is not None)
        answers = Answers()
        self.unimodal = choose_logits(scores, self.model, self.head, slices, self.features, answers)
        self._scorer = Scorer(
            self.unimodal,
            self.features,
            self.labels,
            Traces(self.model, self.encoders, self.head),
            strict=strict,
        )
        self.hooks = Hooks(
            self.model,
            self.head,
            self._scorer,
            answers,
            train_only=train_only,
            group=self.group,
        )

    def observe(self, labels: Any, *, present: Mapping[str, Tensor] | None = None) -> None:
        """Give the labels of a batch to the latest training pass without any, else to the next one.

        They are copied: a buffer may be reused.

        Args:
            labels: `(B,)` class indices, or `(B, C)` class probabilities.
            present: bool `(B,)` by modality, for batches in which some samples lack a modality.

        Raises:
            KeyError: if `present` names an unknown modality.
            TypeError: if `labels` are no numbers, or `present` no mapping to flags.
            ValueError: if one has another shape or kind of numbers.
        """
        values = to_tensor("labels", labels, "class indices (B,) or class probabilities (B, C)")
        if values.dim() == 0 or values.is_complex():
            raise ValueError(
                "`labels` should be class indices (B,) or class probabilities (B, C). "
                f"Found shape {tuple(values.shape)}, dtype {values.dtype}."
            )
        flags = {} if present is None else self._flags(present, len(values))
        self.labels.observe(self.latest, values.detach().clone(), flags)

    def _flags(self, present: Mapping[str, Tensor], samples: int) -> dict[str, Tensor]:
        """Copies of the flags by modality, checked."""
        check_kind("`present`", present, Mapping, "a mapping from modality to bool (B,)")
        unknown = present.keys() - self.encoders.keys()
        if unknown:
            raise KeyError(
                f"`present` should be given by modality {self.modalities}. Found {names_of(unknown)}."
            )
        flags = {}
        for name, rows in present.items():
            values = to_tensor(f"present[{name!r}]", rows, "bool (B,), one flag for each sample")
            number = values.is_floating_point() or values.is_complex()
            fits = values.dim() == 1 and (
                samples == len(values) or (len(values) and samples % len(values) == 0)
            )
            if number or not fits:
                raise ValueError(
                    f"`present[{name!r}]` should be bool (B,), one flag for each of the {samples} samples. "
                    f"Found shape {tuple(values.shape)}, dtype {values.dtype}."
                )
            flags[name] = values.detach().clone().bool()
        return flags

    def _check_by_modality(
        self, option: str, given: object, what: str, fits: Callable[[object], bool]
    ) -> None:
        """Refuse an option that is no mapping from modality to `what`."""
        if given is None:
            return
        check_kind(f"`{option}`", given, Mapping, f"a mapping from modality to {what}")
        assert isinstance(given, Mapping)
        unknown = given.keys() - self.encoders.keys()
        if unknown:
            raise ValueError(
                f"`{option}` should be given for {self.modalities}. Found also {names_of(unknown)}."
            )
        for name, value in given.items():
            if not fits(value):
                raise TypeError(f"{option}[{name!r}] should be {what}. Found {shown(value)}.")

    def watch_loss(self, module: nn.Module, *, reduce: Literal["argmax"] | None = None) -> Hook:
        """Take the labels from the calls of a loss module `(logits, labels)`, and its `ignore_index`.

        Args:
            module: such as the loop's `nn.CrossEntropyLoss` instance.
            reduce: `"argmax"` to read soft targets as their most probable class.

        Returns:
            What takes it off again by `.remove()`, as `remove()` of the monitor does.

        Raises:
            TypeError: if `module` is no module.
            ValueError: if `reduce` is unknown.
        """
        check_kind("`module`", module, nn.Module, "the loss module that the loop calls")
        if reduce is not None:
            check_choice("reduce", reduce, ("argmax",), other=", or None")
        return self.hooks.watch_loss(module, reduce)

    def reset(self) -> None:
        """Forget every score that no step has used, as after `model.zero_grad()`."""
        self._scorer.discard()
        self.labels.forget()

    def remove(self) -> None:
        """Take every hook off. May be called twice."""
        self.hooks.remove()
        self._scorer.clear()
        self.labels.forget()

    def stats(self) -> dict[str, Any]:
        """What was seen so far: how scores are made, passes, and where their labels came from."""
        seen, recovery = self._scorer.seen.total, self._scorer.recovery
        sources = {name: seen[f"labels:{name}"] for name in get_args(LabelSource)[1:]}
        return {
            "scores": None if self.unimodal is None else self.unimodal.name,
            "passes": seen["passes"],
            "passes_without_scores": seen["unscored"],
            "labels": {name: count for name, count in sources.items() if count},
            "recovered_labels": {"rows": 0, "ambiguous": 0} if recovery is None else recovery.counts(),
            "missing": {name: seen[f"missing:{name}"] for name in self.modalities},
        }

    # -- what methods ask -------------------------------------------------------------------------------------------

    def scores(self, *, needs_entropy: bool = False, steps: bool = True) -> ScoreBuffer:
        """A new consumer's own sums of scores over passes, which are made as long as the buffer is held.

        Args:
            needs_entropy: sum the entropies of the features too.
            steps: the consumer takes the sums once an optimizer step; `reset()` discards them.
        """
        buffer = ScoreBuffer(self, self._scorer, needs_entropy=needs_entropy, steps=steps)
        self._scorer.buffers.add(buffer)
        return buffer

    def silence(self) -> str:
        """Why no score may have come, in words for the user."""
        if not self.hooks.active:
            return "the monitor's hooks were removed"
        compiled = self._was_compiled or is_compiled(self.model) or holds_compiled_code()
        return why_silent(self._scorer.seen, compiled=compiled)

    @property
    def latest(self) -> Pass | None:
        """The latest forward in training."""
        return self.hooks.passes.latest

    @property
    def parameters(self) -> dict[str, list[nn.Parameter]]:
        """Each modality's own parameters, as they are now (`fully_shard` and lazy modules replace them)."""
        return modality_parameters(self.model, self.encoders)

    def __enter__(self) -> ModalityMonitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles (EMA, SWA) are as after `remove()`: they watch nothing.
        names = ("model", "encoders", "modalities", "head", "group", "_was_compiled", "_options")
        return {name: self.__dict__[name] for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._build(**self._options)

    def __repr__(self) -> str:
        scores = "features only" if self.unimodal is None else self.unimodal.name
        return (
            f"ModalityMonitor(modalities={list(self.modalities)}, scores={scores!r}, "
            f"labels={self.labels.allowed!r})"
        )


def require_scores(monitor: ModalityMonitor, who: str) -> None:
    """Refuse to serve a method that needs scores when there is no head.

    Raises:
        ValueError: naming what is missing.
    """
    if monitor.unimodal is None:
        raise ValueError(
            f"{who} needs uni-modal scores. Build the monitor with `head=`: the module that makes the logits, a "
            "mapping from modality to its own head, or the model itself."
        )


def _is_columns(value: object) -> bool:
    whole = isinstance(value, slice) and all(
        bound is None or is_whole(bound) for bound in (value.start, value.stop)
    )
    return whole and value.step in (None, 1)  # type: ignore[attr-defined]
