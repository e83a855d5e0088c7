"""ModalityMonitor: uni-modal scores of any model, by hooks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
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
from balanceopt._removable import Removable
from balanceopt._torch import holds_compiled_code, is_compiled
from balanceopt.distributed import Group, check_group
from balanceopt.functional import LossFunction, as_loss
from balanceopt.modality import Encoders, modality_parameters, resolve_encoders, resolve_head, unwrap
from balanceopt.monitor._answers import Answers
from balanceopt.monitor._choice import choose_logits
from balanceopt.monitor._features import Features, Select
from balanceopt.monitor._forward import Traces
from balanceopt.monitor._hooks import Hooks
from balanceopt.monitor._labels import Labels, refuse_loss
from balanceopt.monitor._labels import LabelSource as LabelSource
from balanceopt.monitor._logits import UserScores
from balanceopt.monitor._module_hooks import Hook, remove_hooks
from balanceopt.monitor._refusals import refuse_model
from balanceopt.monitor._scorer import Scorer
from balanceopt.monitor._scores import ScoreBuffer
from balanceopt.monitor._silence import why_silent
from balanceopt.monitor._zero_out import Fill


class ModalityMonitor(Removable):
    r"""Watch a model in training by hooks: each modality's features and uni-modal logits, and the labels.

    For each training pass whose backward reaches the head, the monitor adds up, over samples,

    $$S^m = \sum_i \exp(-l^m_i / \tau)$$

    where \(l^m_i\) is the loss of sample i under the head's output for modality m alone. For cross-entropy
    \(\tau = 1\) and a score is the softmax probability of the true class. Neither the model nor the loop changes;
    nothing is recorded in eval mode or without gradients.

    Args:
        model: the whole model. May be wrapped in DistributedDataParallel or compiled (attach before the first call).
        encoders: each modality's encoder, a module of `model` or the module's dotted name.
        head: module from features to logits, or its name; a mapping from modality to one head each (sum or late
            fusion); the model itself if it returns the logits; None to watch features only. The logits' last dimension
            is the classes'; for convolutions dimension 1.
        loss: the loss that scores are made of (docs/tasks.md): the very module that the loop calls, whose calls then
            give the targets, or a function `(prediction, target) -> (B,)`; None for cross-entropy.
        scores: kind of uni-modal logits: `"split"` (a linear head over concatenated features, exact Eq. 8),
            `"per-head"`, `"zero-out"` (any fusion), a function from `{modality: features}` to logits, or `"auto"`
            for the first exact kind.
        labels: source of labels: `"observe"`, `"loss"` (a watched loss), `"model"` (the model's `labels=`),
            `"gradient"` (recovered at the logits, for cross-entropy and binary cross-entropy), `"auto"` for the first
            available of these.
        train_only: watch only passes in training mode; False for models fine-tuned in eval mode.
        group: process group over which scores are summed; None for the default group, False for no communication.
        select: by modality, a function from the encoder's output to the feature tensor `(B, ...)`.
        slices: each modality's columns of the head's input, if comparing values does not find the columns.
        fill: what zero-out puts in place of the other modalities' features: `"zero"`, `"mean"` (their mean over the
            batch), or `"auto"` for zero, and the mean under losses without a scale of their own (regression).
        ignore_index: label of samples that do not count, where `loss` does not say.
        strict: raise, not warn, where labels recovered from the gradient are doubtful.

    Attributes:
        model: the user's module, without wrappers.
        encoders: each modality's encoder, as a module.
        modalities: names of the modalities, in the order of all sums.
        head: module, modules by modality, the model itself, or None.
        group: process group over which scores are summed.
        loss: the loss that scores are made of, as given.
        hooks: registries of listeners: `hooks.transforms`, `.links`, `.outputs`, `.logits`, `.gradients`, `.starts`,
            `.targets`, `.before_step`, `.after_closure`, `.after_step`, with `add` and `drop`.
        features: choice of the feature tensor in an encoder's output: `features.of(modality, output)`.
        labels: source of labels: `labels.loss`, `labels.ignore_index`, `labels.recovers`.
        unimodal: kind of uni-modal logits: `unimodal.live`, `.columns`, `.layout()`; None for features only.

    Raises:
        ValueError: for encoders, a head, slices or options that do not fit the model; for a loss without scores.
        TypeError: if `model` is no module, or an option has the wrong type.
        NotImplementedError: for FullyShardedDataParallel (FSDP1), DataParallel and DeepSpeed models.

    Example:
        >>> model = nn.ModuleDict({m: nn.Linear(2, 3) for m in ("a", "b")})
        >>> with ModalityMonitor(model, {"a": "a", "b": "b"}) as monitor:
        ...     print(monitor.modalities)
        ('a', 'b')

    Reference:
        Peng et al., CVPR 2022, Eq. 8-9; Wei et al., TPAMI 2024, Eq. 6-7; losses other than cross-entropy: ours.
    """

    def __init__(
        self,
        model: nn.Module,
        encoders: Encoders,
        head: nn.Module | str | Mapping[str, nn.Module | str] | None = None,
        *,
        loss: nn.Module | LossFunction | None = None,
        scores: str | UserScores = "auto",
        labels: LabelSource = "auto",
        train_only: bool = True,
        group: Group = None,
        select: Select | None = None,
        slices: Mapping[str, slice] | None = None,
        fill: Literal["auto", "zero", "mean"] = "auto",
        ignore_index: int = -100,
        strict: bool = False,
    ) -> None:
        check_kind("`model`", model, nn.Module, "the model, a torch.nn.Module")
        refuse_model(model)
        check_choice("labels", labels, get_args(LabelSource))
        check_choice("fill", fill, ("auto", "zero", "mean"))
        check_flag("train_only", train_only)
        check_group(group)
        check_count("ignore_index", ignore_index, at_least=None)
        check_flag("strict", strict)
        self.model = unwrap(model)
        self._was_compiled = is_compiled(model)
        self.encoders = resolve_encoders(model, encoders)
        self.modalities = tuple(self.encoders)
        modality_parameters(model, self.encoders)  # raises for an encoder without parameters
        self._check_by_modality("select", select, "a function of the encoder's output", callable)
        self._check_by_modality(
            "slices", slices, "its columns of the head's input, such as slice(0, 16)", _is_columns
        )
        self.head = resolve_head(self.model, self.encoders, head)
        self.group = group
        self.loss = loss
        self._options: dict[str, Any] = {
            "scores": scores,
            "labels": labels,
            "train_only": train_only,
            "select": select or {},
            "slices": slices,
            "fill": fill,
            "ignore_index": ignore_index,
            "strict": strict,
        }
        self._build(**self._options)
        finalize(self, remove_hooks, self.hooks.handles).atexit = False
        try:
            self.hooks.watch()
            if isinstance(loss, nn.Module) and self.head is not None and self.labels.allows("loss"):
                self.watch_loss(loss)
        except BaseException:  # a module that refuses hooks, such as a scripted module, or an interrupt
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
        fill: str,
        ignore_index: int,
        strict: bool,
    ) -> None:
        """Build the monitor's parts without registering hooks."""
        form = as_loss(self.loss, ignore_index)
        self.labels = Labels(labels, ignore_index, form)
        self.features = Features(self.encoders, select, apart=self.head is not None)
        answers = Answers()
        filling: Fill = "mean" if fill == "mean" or (fill == "auto" and form.scale_free) else "zero"
        self.unimodal = choose_logits(scores, self.model, self.head, slices, self.features, answers, filling)
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
        """Record the targets of a batch for the latest training pass without observed ones, else for the next pass.

        Labels are copied, so a buffer may be reused. In eval mode they belong to the latest forward in eval mode, of
        which a `ProbeMonitor` tells what each encoder knows.

        Args:
            labels: targets as the loss takes them; for cross-entropy `(B,)` class indices or `(B, C)` probabilities.
            present: bool `(B,)` by modality, for batches in which some samples lack a modality.

        Raises:
            KeyError: if `present` names an unknown modality.
            TypeError: if `labels` are no numbers, or `present` is no mapping to flags.
            ValueError: if `labels` or `present` have a wrong shape or dtype.
        """
        values = to_tensor("labels", labels, "class indices (B,) or numbers (B, ...)")
        if values.dim() == 0 or values.is_complex():
            raise ValueError(
                "`labels` should be the targets of the loss: class indices (B,) or numbers (B, ...). "
                f"Found shape {tuple(values.shape)}, dtype {values.dtype}."
            )
        flags = (
            {}
            if present is None
            else flags_by_modality(present, self.modalities, len(values), positions=True)
        )
        if self.hooks.evaluates:  # of a validation pass, which only probes use
            self.hooks.tell_target("observe", values.detach().clone(), flags)
        else:
            self.labels.observe(self.hooks.latest, values.detach().clone(), flags)

    def _check_by_modality(
        self, option: str, given: object, what: str, fits: Callable[[object], bool]
    ) -> None:
        """Raise for an option that is no mapping from modality to `what`."""
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

    def watch_loss(self, module: nn.Module) -> Hook:
        """Read targets, and the `ignore_index`, from the calls `(prediction, target)` of a loss module.

        The monitor's `loss=`, if a module, is watched already.

        Args:
            module: loss module, such as the loop's `nn.CrossEntropyLoss` instance, of the kind of the monitor's loss.

        Returns:
            Hook with `.remove()`; `remove()` of the monitor removes it too.

        Raises:
            TypeError: if `module` is no module.
            ValueError: if `module` is another kind of loss than the monitor's.
        """
        check_kind("`module`", module, nn.Module, "the loss module that the loop calls")
        refuse_loss(module, self.labels.loss)
        return self.hooks.watch_loss(module)

    def reset(self) -> None:
        """Discard all scores that no step has used, for loops that call `model.zero_grad()`."""
        self._scorer.discard()
        self.labels.forget()

    def remove(self) -> None:
        """Remove every hook. May be called twice."""
        self.hooks.remove()
        self._scorer.clear()
        self.labels.forget()

    def stats(self) -> dict[str, Any]:
        """Return counts so far, of passes and of label sources, and the kind of uni-modal logits."""
        seen = self._scorer.seen.total
        sources = {name: seen[f"labels:{name}"] for name in get_args(LabelSource)[1:]}
        return {
            "scores": None if self.unimodal is None else self.unimodal.name,
            "passes": seen["passes"],
            "passes_without_scores": seen["unscored"],
            "labels": {name: count for name, count in sources.items() if count},
            "recovered_labels": self._scorer.targets.recovered(),
            "missing": {name: seen[f"missing:{name}"] for name in self.modalities},
        }

    # -- used by methods -------------------------------------------------------------------------------------------

    def scores(self, *, needs_entropy: bool = False, steps: bool = True) -> ScoreBuffer:
        """Create a buffer of scores for a new consumer; passes are scored while a buffer is alive.

        Args:
            needs_entropy: whether to sum the entropies of the features too.
            steps: whether the consumer takes the sums once an optimizer step, so that `reset()` discards the sums.
        """
        buffer = ScoreBuffer(self, self._scorer, needs_entropy=needs_entropy, steps=steps)
        self._scorer.buffers.add(buffer)
        return buffer

    def silence(self) -> str:
        """Describe for the user why no score may have come."""
        if not self.hooks.active:
            return "the monitor's hooks were removed"
        compiled = self._was_compiled or is_compiled(self.model) or holds_compiled_code()
        return why_silent(self._scorer.seen, compiled=compiled)

    @property
    def parameters(self) -> dict[str, list[nn.Parameter]]:
        """Current parameters of each modality (`fully_shard` and lazy modules replace parameters)."""
        return modality_parameters(self.model, self.encoders)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles (EMA, SWA) have no hooks, as after `remove()`, since hooks belong to the original.
        names = ("model", "encoders", "modalities", "head", "group", "loss", "_was_compiled", "_options")
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


def flags_by_modality(
    present: Mapping[str, Tensor], modalities: Collection[str], samples: int, *, positions: bool = False
) -> dict[str, Tensor]:
    """Check and copy the flags of the samples that have each modality.

    Args:
        present: bool `(B,)` by modality.
        modalities: names of all modalities.
        samples: number of samples B.
        positions: whether `samples` may count several positions of each sample.

    Raises:
        KeyError: for an unknown modality.
        TypeError, ValueError: if `present` is no mapping to flags `(B,)`.
    """
    check_kind("`present`", present, Mapping, "a mapping from modality to bool (B,)")
    unknown = present.keys() - set(modalities)
    if unknown:
        raise KeyError(f"`present` should be given by modality {modalities}. Found {names_of(unknown)}.")
    flags = {}
    for name, rows in present.items():
        values = to_tensor(f"present[{name!r}]", rows, "bool (B,), one flag for each sample")
        number = values.is_floating_point() or values.is_complex()
        flat = values.dim() == 1
        several = flat and positions and len(values) and samples % len(values) == 0
        fits = flat and (samples == len(values) or several)
        if number or not fits:
            raise ValueError(
                f"`present[{name!r}]` should be bool (B,), one flag for each of the {samples} samples. "
                f"Found shape {tuple(values.shape)}, dtype {values.dtype}."
            )
        flags[name] = values.detach().clone().bool()
    return flags


def require_scores(monitor: ModalityMonitor, who: str) -> None:
    """Raise if a method needs scores and the monitor has no head.

    Raises:
        ValueError: if `head` is None.
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
