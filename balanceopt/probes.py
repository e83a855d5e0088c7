"""ProbeMonitor: what each encoder knows, by linear heads that are trained beside the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from balanceopt._deferred import on_host
from balanceopt._method import ABSENT, Method
from balanceopt._options import check_count, check_entries, check_flag, check_kind, check_number, shown
from balanceopt._torch import in_backward
from balanceopt._warnings import WarnOnce
from balanceopt.distributed import active_group, sum_over_ranks
from balanceopt.functional import AnswerKind, wide, without_autocast
from balanceopt.monitor import (
    ModalityMonitor,
    Pass,
    ScoreBuffer,
    detached_copy,
    require_scores,
    two_classes,
)

# Adam's constants, as in its paper.
_DECAYS = (0.9, 0.999)
_EPSILON = 1e-8
# Least weight of a batch in the running statistics of the features.
_MOMENTUM = 0.05
# Samples of which a mean average precision is made.
_RANKED = 10_000
# Order of trust in the sources of targets in validation.
_SOURCES = ("observe", "loss", "model")


class ProbeLosses(NamedTuple):
    """Mean losses of the probes in the monitor's order, and last the joint loss, each `(M + 1,)` float64.

    NaN where there was no sample, infinite where a prediction was not finite.

    Attributes:
        train: mean over the training samples, each in the pass that brought it, before the probes' step.
        val: mean over the samples of validation.
    """

    train: Tensor
    val: Tensor


class ProbeMonitor(Method):
    r"""Tell what each encoder knows now: a linear probe on its features, trained beside the model.

    $$\min_{W^m, b^m} \; L(W^m \hat z^m + b^m, y), \qquad \hat z^m = (z^m - \mu^m) / \sigma^m$$

    with each encoder's clean, detached features z (before any drop), standardised by running statistics, and the
    monitor's loss: cross-entropy, binary cross-entropy for several labels, squared error for numbers. No gradient
    reaches the model, and no random number is drawn: the model trains bit for bit as without probes.

    Each training pass trains the probes by one step of Adam when the next pass begins. In eval mode (validation) they
    are only evaluated: accuracy, mean average precision for several labels, R2 for numbers. The first training pass
    after a round of validation reports the round to a `Recorder` as `probe`, and the mean over the training batches
    since the last round, each before its step, as `probe_train`.

    Targets are those of the monitor in training. In eval mode they come from `monitor.observe`, from the watched loss,
    or from the model's `labels=`. Over ranks the gradients are averaged and the rounds summed, in one collective for
    each training pass; a round that is read before the next training pass is this rank's. Keep a reference to the
    probes: garbage collection removes their hooks.

    Args:
        monitor: a `ModalityMonitor`, which methods may share.
        lr: learning rate of the probes, which is divided by the square root of the features' width.
        losses: sum the losses too, for `take_losses`, on all ranks alike.

    Attributes:
        passes: number of training passes that the probes have learned from.

    Raises:
        TypeError: if `monitor` is no `ModalityMonitor`.
        ValueError: if `lr` is not a positive number, or `losses` no flag; for a monitor without a head, or whose loss
            is a function.

    Example:
        >>> import balanceopt as bo
        >>> model = torch.nn.ModuleDict({m: torch.nn.Linear(2, 3) for m in ("a", "b")})
        >>> monitor = bo.ModalityMonitor(model, {"a": "a", "b": "b"}, head={"a": "a", "b": "b"})
        >>> with ProbeMonitor(monitor) as probes:
        ...     probes.results()
        {}

    Reference:
        Alain and Bengio, Understanding intermediate layers using linear classifier probes, 2016; docs/watching.md.
    """

    def __init__(self, monitor: ModalityMonitor, *, lr: float = 0.02, losses: bool = False) -> None:
        check_kind("`monitor`", monitor, ModalityMonitor, "a ModalityMonitor")
        check_number("lr", lr, above=0)
        check_flag("losses", losses)
        require_scores(monitor, "ProbeMonitor")
        if not monitor.labels.loss.rowwise:
            raise ValueError(
                "a probe needs to know the task, which a loss function of yours does not tell. Build the monitor with "
                "a module of torch.nn as `loss=`: CrossEntropyLoss, BCEWithLogitsLoss, MSELoss, L1Loss."
            )
        super().__init__()
        self.monitor = monitor
        self.lr = lr
        self.losses = losses
        self.passes = 0
        self.task: AnswerKind = monitor.labels.loss.answers
        self._probes: dict[str, _Probe] = {}
        self._warned = WarnOnce()
        self._results: Tensor | None = None
        # A buffer makes the monitor keep each pass open for targets, and determine them.
        self._buffer: ScoreBuffer | None = monitor.scores(steps=False)
        self._training = _Batch()
        self._pass: Pass | None = None
        self._evaluated: _Batch | None = None
        self._rounds = {"probe": _Round(), "probe_train": _Round()}
        # Sums of losses and numbers of samples: in training over all ranks, in validation this rank's.
        nothing = torch.zeros(2, len(monitor.modalities) + 1, dtype=torch.float32, device="cpu")
        self._losses = {"train": nothing, "val": nothing}
        monitor.hooks.starts.add(self._on_start)
        monitor.hooks.outputs.add(self._on_output)
        monitor.hooks.gradients.add(self._on_gradient)
        monitor.hooks.heads.add(self._on_head)
        monitor.hooks.targets.add(self._on_target)

    def results(self) -> dict[str, float]:
        """Return each modality's result in the latest round of validation; empty before the first round."""
        self.flush()
        if self._results is None:
            return {}
        numbers = zip(self.monitor.modalities, self._results.tolist(), strict=True)
        return {name: value for name, value in numbers if value != ABSENT}

    @torch.no_grad()
    def take_losses(self) -> ProbeLosses:
        """Return the probes' and the joint mean losses since the previous call, and start anew.

        To be called between epochs. On several ranks it is a collective, and the means are over all ranks' samples. The
        joint loss is that of the model's own predictions. All losses are of the kind that the probes minimise, without
        the weights and the smoothing of a loss module.

        Raises:
            RuntimeError: for probes that were not built with `losses=True`.
        """
        if not self.losses:
            raise RuntimeError(
                "these probes sum no losses: build them with ProbeMonitor(monitor, losses=True)."
            )
        self._end_evaluation()
        self._learn()
        device = next(self.monitor.model.parameters()).device
        held, self._losses = self._losses, {name: torch.zeros_like(x) for name, x in self._losses.items()}
        sums = held["train"], sum_over_ranks(held["val"].to(device), self.monitor.group)
        return ProbeLosses(*((total / count).cpu().double() for total, count in sums))

    def flush(self) -> None:
        """End a round of validation, and report this rank's results."""
        self._end_evaluation()
        if not self._rounds["probe"].is_empty:
            self._report(self._sums())

    def remove(self) -> None:
        """Remove the hooks; results stay. A second call is a no-op."""
        super().remove()
        hooks = self.monitor.hooks
        hooks.starts.drop(self._on_start)
        hooks.outputs.drop(self._on_output)
        hooks.gradients.drop(self._on_gradient)
        hooks.heads.drop(self._on_head)
        hooks.targets.drop(self._on_target)
        if self._buffer is not None:
            self._buffer.remove()
        self._training, self._pass = _Batch(), None

    # -- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state for an exact resume, of plain numbers and tensors.

        On several ranks it lacks the latest training pass, which the ranks have not shared yet, unless `take_losses`
        came after the pass.
        """
        if active_group(self.monitor.group) is None:
            self._learn()
        return {
            "passes": self.passes,
            "probes": {name: probe.state_dict() for name, probe in self._probes.items()},
            "losses": {name: sums.clone() for name, sums in self._losses.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the state of a checkpoint. A load that fails changes nothing.

        Args:
            state: result of `state_dict()`.

        Raises:
            TypeError, KeyError, ValueError: if `state` is no state of probes on these modalities.
        """
        self.check_state(state)
        device = next(self.monitor.model.parameters()).device
        self._probes = {name: _Probe.of_state(part, device) for name, part in state["probes"].items()}
        self.passes = int(state["passes"])
        self._losses = {
            name: state["losses"][name].detach().to(device, torch.float32).clone() for name in self._losses
        }
        # The passes before the load belong to the probes of before.
        self._training, self._pass, self._evaluated, self._results = _Batch(), None, None, None
        self._rounds = {name: _Round() for name in self._rounds}
        if self._buffer is not None:
            self._buffer.discard()

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise where `load_state_dict` would, before anything changes."""
        check_entries("the state of a ProbeMonitor", state, ("passes", "probes", "losses"))
        check_count("passes", state["passes"])
        check_entries("the state's 'losses'", state["losses"], tuple(self._losses))
        for name, sums in self._losses.items():
            value = state["losses"][name]
            check_kind(f"the state's {name!r} losses", value, Tensor, "a tensor")
            if value.shape != sums.shape or not value.is_floating_point():
                raise ValueError(
                    f"the state's {name!r} losses should be floating, of shape {tuple(sums.shape)}. Found "
                    f"{shown(value)}."
                )
        check_entries("the state's 'probes'", state["probes"], ())
        unknown = set(state["probes"]) - set(self.monitor.modalities)
        if unknown:
            raise KeyError(
                f"the state's probes should be of {self.monitor.modalities}. Found also {sorted(map(str, unknown))}."
            )
        for name, part in state["probes"].items():
            _Probe.check(f"the state of the probe of {name!r}", part)

    def __getstate__(self) -> dict[str, Any]:
        # A copy is inert, because hooks exist on the original monitor's model only.
        state = {**super().__getstate__(), "removed": True}
        return {**state, "_training": _Batch(), "_pass": None, "_evaluated": None, "_buffer": None}

    # -- hooks -----------------------------------------------------------------------------------------------------

    def _on_start(self, current: Pass | None) -> None:
        self._end_evaluation()
        if current is None:
            self._evaluated = _Batch()
        else:
            self._begin_training(current)

    def _on_output(self, name: str, output: Any, current: Pass | None) -> None:
        if in_backward() or (current is not None and current.rehearsal):
            return
        hooks = self.monitor.hooks
        if current is None:
            if not hooks.evaluates or name in (self._evaluated or _Batch()).features:
                self._end_evaluation()
            if not hooks.evaluates:
                return
            self._evaluated = self._evaluated or _Batch()
            into = self._evaluated
        else:
            if current is not self._pass:  # a loop that calls the encoders without calling the model
                self._end_evaluation()
                self._begin_training(current)
            into = self._training
        into.features[name] = self.monitor.features.held(name, output)

    def _on_gradient(self, current: Pass, gradient: Tensor) -> None:
        # In backward, because the pass releases its logits once it is scored.
        if self.losses and current is self._pass and current.logits is not None:
            self._training.logits = {None: current.logits}

    def _on_head(self, name: str | None, head: torch.nn.Module, output: Any) -> None:
        if not self.losses or self._evaluated is None or not self._probes:
            return
        answers = self.monitor.hooks.answers
        logits = answers.logits(head, output)
        if logits is not None:
            self._evaluated.logits[name] = answers.rows(head, detached_copy(logits))

    def _on_target(self, source: str, target: Tensor, present: Mapping[str, Tensor]) -> None:
        if self._evaluated is not None:
            self._evaluated.targets[source] = target
            self._evaluated.present.update(present)

    # -- learning and evaluation -----------------------------------------------------------------------------------

    def _begin_training(self, current: Pass) -> None:
        self._learn()
        self._pass = current

    @torch.no_grad()
    def _learn(self) -> None:
        """Take a step of the probes on the latest training pass; on several ranks a collective."""
        done, self._pass = self._pass, None
        batch, self._training = self._training, _Batch()
        if done is None or self._buffer is None:
            return
        self._buffer.take_local()
        batch.present = done.present
        with without_autocast(next(self.monitor.model.parameters()).device.type):  # probes would be rounded
            rows = {} if done.target is None else self._rows(batch, done.target, done.samples)
            self._build(rows, self._outputs(done))
            parts: dict[str, tuple[Tensor, Tensor]] = {}
            losses: dict[str | None, Tensor] = {}
            for name, (z, y, weight) in rows.items():
                prediction = self._probes[name].predict(z)
                parts[name] = self._probes[name].gradient(z, y, weight, prediction, self.task)
                self._rounds["probe_train"].add(name, prediction, y, weight, self.task)
                if self.losses:
                    losses[name] = self._loss_sums(prediction, y, weight)
            if done.target is not None and batch.logits:
                losses[None] = self._joint_sums(batch.logits, done.target)
            self._step(parts, self._by_head(losses) if self.losses else None)
        self.passes += bool(rows)

    def _step(self, parts: dict[str, tuple[Tensor, Tensor]], losses: Tensor | None) -> None:
        """Average the gradients, the features' statistics and the losses over ranks, and step."""
        ends = not self._rounds["probe"].is_empty
        if active_group(self.monitor.group) is None:
            for name, (gradient, moments) in parts.items():
                self._probes[name].step(gradient, moments, self.lr)
            if losses is not None:
                self._add_losses("train", losses)
            if ends:
                self._report(self._sums())
            return
        device = next(self.monitor.model.parameters()).device
        pieces = [x for name, probe in self._probes.items() for x in parts.get(name, probe.nothing())]
        pieces += [] if losses is None else [losses.flatten()]
        # Ranks may validate one by one: whoever ends a round gets the sums of all that end one now.
        sums = self._sums()
        pieces += [(x if ends else torch.zeros_like(x)).flatten().to(device) for x in sums.values()]
        total = sum_over_ranks(torch.cat(pieces), self.monitor.group).split([len(piece) for piece in pieces])
        for index, probe in enumerate(self._probes.values()):
            probe.step(total[2 * index], total[2 * index + 1], self.lr)
        if losses is not None:
            self._add_losses("train", total[2 * len(self._probes)].view_as(losses))
        if ends:
            self._report({name: x.view(2, -1) for name, x in zip(sums, total[-len(sums) :], strict=True)})

    def _sums(self) -> dict[str, Tensor]:
        return {name: round_.sums(self.monitor.modalities) for name, round_ in self._rounds.items()}

    def _build(self, rows: Mapping[str, tuple[Tensor, Tensor, Tensor]], outputs: int) -> None:
        """Build the probes of modalities that came for the first time, on all ranks together."""
        names = self.monitor.modalities
        if len(self._probes) == len(names):
            return
        widths = [rows[name][0].shape[1] if name in rows else 0 for name in names]
        device = next(self.monitor.model.parameters()).device
        if active_group(self.monitor.group) is not None:
            shared = torch.tensor([*widths, outputs], dtype=torch.int64, device=device)
            dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=active_group(self.monitor.group))
            *widths, outputs = shared.tolist()
        for name, width in zip(names, widths, strict=True):
            if width and name not in self._probes:
                self._probes[name] = _Probe.new(width, outputs, device)
        self._probes = {name: self._probes[name] for name in names if name in self._probes}

    def _outputs(self, done: Pass) -> int:
        """Return the number of outputs of a probe."""
        if self.task != "classes":
            return 0 if done.target is None else done.target.reshape(len(done.target), -1).shape[1]
        if not done.shape:
            return 0
        return max(2, done.shape[1] if done.classes_first else done.shape[-1])

    def _rows(
        self, batch: _Batch, target: Tensor, samples: int | None
    ) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Return, by modality, features `(B, D)`, targets, and weights `(B,)` that are 0 for rows that don't count."""
        y = self._by_sample(target)
        result = {}
        for name, held in batch.features.items():
            z = wide(self.monitor.features.pooled(name, held(), samples))
            here, labels = batch.present.get(name), y.to(z.device)
            if here is not None and len(here) == len(labels) != len(z) and _may_number(here, len(z)):
                # The encoder ran on the samples with the modality. Sorted, as a mask as index would be read.
                first = (~here.to(z.device)).to(torch.uint8).argsort(stable=True)[: len(z)]
                labels, here = labels[first], None
            if len(labels) != len(z):
                self._warned(
                    "rows",
                    f"probes need one target for each sample: {len(z)} samples of {name!r} have {len(labels)} targets "
                    "(pixels, tokens). They are not probed.",
                )
                continue
            labels, counts = self._valid(labels, z.dtype)
            counts = counts & torch.isfinite(z).all(1)
            if here is not None:
                counts = counts & here.to(z.device)
            result[name] = torch.nan_to_num(z), labels, counts.to(z.dtype)
        return result

    def _by_sample(self, target: Tensor) -> Tensor:
        """Return a target as class indices `(B,)`, or as numbers `(B, O)`."""
        if self.task == "classes" and target.is_floating_point() and target.numel() == len(target):
            target = target.flatten().round().long()  # of a single logit
        numbers = target.is_floating_point() or self.task != "classes"
        return target.reshape(len(target), -1) if numbers else target.reshape(-1)

    def _valid(self, y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return targets with a valid number in every place, and bool `(B,)`, the rows whose target is valid."""
        if y.dim() == 2:
            return torch.nan_to_num(y.to(dtype)), torch.isfinite(y).all(1)
        y = y.long()  # before the comparison, in which -100 would be 156 among 8-bit labels
        valid = y != self.monitor.labels.ignore_index
        return torch.where(valid, y, 0), valid

    def _joint_sums(self, by_head: Mapping[str | None, Tensor], target: Tensor) -> Tensor:
        """Return the sum of the losses of the joint logits, and their number; 0 for a target of other rows."""
        logits = wide(torch.stack(list(by_head.values())).sum(0))
        logits = two_classes(logits) if self.task == "classes" else logits
        y = self._by_sample(target).to(logits.device)
        if y.shape not in (logits.shape, logits.shape[:1]):
            return torch.zeros(2, dtype=torch.float32, device=logits.device)
        y, valid = self._valid(y, logits.dtype)
        return self._loss_sums(logits, y, valid.to(logits.dtype))

    def _loss_sums(self, prediction: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """Return the sum of the losses of predictions `(B, O)`, infinite for what is not finite, and their number."""
        if self.task == "classes":
            loss = F.cross_entropy(prediction, y, reduction="none")
        elif self.task == "labels":
            loss = F.binary_cross_entropy_with_logits(prediction, y, reduction="none").mean(1)
        else:
            loss = (prediction - y).square().mean(1)
        loss = torch.where(weight > 0, loss.nan_to_num(nan=torch.inf, posinf=torch.inf), 0)
        return torch.stack([loss.sum(), weight.sum()]).float()

    def _by_head(self, sums: Mapping[str | None, Tensor]) -> Tensor:
        """Return `(2, M + 1)`: sums of losses and numbers of samples of all probes, and last of the joint logits."""
        device = next(self.monitor.model.parameters()).device
        nothing = torch.zeros(2, dtype=torch.float32, device=device)
        names = (*self.monitor.modalities, None)
        return torch.stack([sums.get(name, nothing).to(device) for name in names], 1)

    def _add_losses(self, split: str, sums: Tensor) -> None:
        """Add sums `(2, M + 1)` to those of a split."""
        # Not in place, because sums made in inference mode can't be changed outside.
        self._losses[split] = self._losses[split].to(sums.device) + sums

    @torch.no_grad()
    def _end_evaluation(self) -> None:
        """Evaluate the probes on the latest forward in eval mode, if its targets came."""
        batch, self._evaluated = self._evaluated, None
        target = (
            None if batch is None else next((batch.targets[s] for s in _SOURCES if s in batch.targets), None)
        )
        if batch is None or target is None or not self._probes:
            return
        losses: dict[str | None, Tensor] = {}
        with without_autocast(next(self.monitor.model.parameters()).device.type):  # probes would be rounded
            for name, (z, y, weight) in self._rows(batch, target, len(target)).items():
                if name in self._probes:
                    prediction = self._probes[name].predict(z)
                    self._rounds["probe"].add(name, prediction, y, weight, self.task)
                    if self.losses:
                        losses[name] = self._loss_sums(prediction, y, weight)
            if batch.logits:
                losses[None] = self._joint_sums(batch.logits, target)
        if self.losses:
            self._add_losses("val", self._by_head(losses))

    def _report(self, sums: dict[str, Tensor]) -> None:
        self._rounds = {name: _Round() for name in self._rounds}
        for quantity, (total, count) in sums.items():
            values = torch.where(count > 0, total / count, ABSENT)
            self.report(self.passes, quantity, self.monitor.modalities, values)
            if quantity == "probe":
                self._results = values


@dataclass
class _Batch:
    """A batch on its way through the model.

    Attributes:
        features: by modality, a function that returns the detached features.
        logits: logits `(N, C)` of each modality's head, or under None the joint ones.
        targets: targets by source, in eval mode.
        present: bool `(B,)` by modality, samples that have the modality.
    """

    features: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    logits: dict[str | None, Tensor] = field(default_factory=dict)
    targets: dict[str, Tensor] = field(default_factory=dict)
    present: dict[str, Tensor] = field(default_factory=dict)


class _Probe:
    """A linear head on standardised features, with Adam's moments.

    Attributes:
        weight: `(O, D + 1)`, the last column the bias.
        first: Adam's first moment.
        second: Adam's second moment.
        mean: `(D,)` running mean of the features.
        variance: `(D,)` running variance of the features.
        steps: number of steps.
    """

    _TENSORS = ("weight", "first", "second", "mean", "variance")

    def __init__(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        self.weight, self.first, self.second, self.mean, self.variance = (tensors[n] for n in self._TENSORS)
        self.steps = steps

    @classmethod
    def new(cls, width: int, outputs: int, device: torch.device) -> _Probe:
        """Build a probe of zeros, from which the convex problem is solved as well as from any other start."""
        zeros = partial(torch.zeros, dtype=torch.float32, device=device)
        matrices = {name: zeros(outputs, width + 1) for name in cls._TENSORS[:3]}
        return cls({**matrices, "mean": zeros(width), "variance": zeros(width) + 1}, 0)

    def predict(self, z: Tensor) -> Tensor:
        """Return the outputs `(B, O)` of features `(B, D)`."""
        return F.linear(
            self._standardised(z), self.weight[:, :-1].to(z.dtype), self.weight[:, -1].to(z.dtype)
        )

    def gradient(
        self, z: Tensor, y: Tensor, weight: Tensor, prediction: Tensor, task: AnswerKind
    ) -> tuple[Tensor, Tensor]:
        """Return the gradient, and the features' moments with the number of samples: sums over the samples, flat."""
        if task == "classes":
            # Not F.one_hot, which reads the labels.
            hot = torch.zeros_like(prediction)
            target = y if y.dim() == 2 else hot.scatter_(1, y.unsqueeze(1), 1.0)
            residual = prediction.softmax(1) - target
        else:
            residual = (prediction.sigmoid() if task == "labels" else prediction) - y
        share = weight.unsqueeze(1)
        x = torch.cat([self._standardised(z), torch.ones_like(z[:, :1])], 1)
        gradient = ((residual * share).T @ x).flatten()
        moments = torch.cat([(z * share).sum(0), (z.square() * share).sum(0), weight.sum().view(1)])
        return gradient.float(), moments.float()

    def nothing(self) -> tuple[Tensor, Tensor]:
        """Return the gradient and the moments of a batch without the modality."""
        return torch.zeros_like(self.weight).flatten(), self.mean.new_zeros(2 * len(self.mean) + 1)

    def step(self, gradient: Tensor, moments: Tensor, lr: float) -> None:
        """Take a step of Adam and update the running statistics, which stay as they are for no samples."""
        self.steps += 1
        count = moments[-1].clamp(min=1)
        mean, square = (moments[:-1] / count).chunk(2)
        share = (moments[-1] > 0).float()
        share_of_batch = share * max(_MOMENTUM, 1 / self.steps)
        self.mean.lerp_(mean, share_of_batch)
        self.variance.lerp_((square - mean.square()).clamp(min=0), share_of_batch)
        g = gradient.view_as(self.weight) / count
        for moment, value, decay in ((self.first, g, _DECAYS[0]), (self.second, g.square(), _DECAYS[1])):
            moment.lerp_(value, share * (1 - decay))
        first, second = (
            moment / (1 - decay**self.steps)
            for moment, decay in zip((self.first, self.second), _DECAYS, strict=True)
        )
        self.weight.sub_(share * lr / len(self.mean) ** 0.5 * first / (second.sqrt() + _EPSILON))

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the tensors, and the number of steps."""
        return {"steps": self.steps, **{name: getattr(self, name).clone() for name in self._TENSORS}}

    @classmethod
    def of_state(cls, state: Mapping[str, Any], device: torch.device) -> _Probe:
        """Build a probe from a state."""
        tensors = {name: state[name].detach().to(device, torch.float32).clone() for name in cls._TENSORS}
        return cls(tensors, int(state["steps"]))

    @classmethod
    def check(cls, role: str, state: Any) -> None:
        """Raise for a state of another form."""
        check_entries(role, state, ("steps", *cls._TENSORS))
        check_count("steps", state["steps"])
        for name in cls._TENSORS:
            check_kind(f"{role}, {name!r},", state[name], Tensor, "a tensor")
        shape = state["weight"].shape
        wanted = [shape] * 3 + [shape[1:] and (shape[1] - 1,)] * 2
        shapes = [tuple(state[name].shape) for name in cls._TENSORS]
        if len(shape) != 2 or shapes != [tuple(s) for s in wanted]:
            raise ValueError(f"{role} should hold a weight (O, D + 1) and statistics (D,). Found {shapes}.")

    def _standardised(self, z: Tensor) -> Tensor:
        deviation = self.variance.sqrt()
        # Features that do not vary stay out.
        scale = torch.where(deviation > 1e-6, 1 / deviation.clamp(min=1e-6), 0)
        return (z - self.mean.to(z)) * scale.to(z)


class _Round:
    """Results of a round of validation, as sums that do not wait for the device."""

    def __init__(self) -> None:
        self._sums: dict[str, list[Tensor]] = {}
        self._kept: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
        self._count: dict[str, int] = {}
        self._task: AnswerKind = "classes"

    @property
    def is_empty(self) -> bool:
        """Whether no batch came."""
        return not self._count

    def add(self, name: str, prediction: Tensor, y: Tensor, weight: Tensor, task: AnswerKind) -> None:
        """Add a batch of one modality: outputs and targets `(B, O)`, or class indices `(B,)`, and weights `(B,)`."""
        if task == "labels" and y.shape[1] == 1:
            task, prediction, y = "classes", torch.cat([-prediction, prediction], 1), (y[:, 0] > 0.5).long()
        self._task = task
        seen = self._count.get(name, 0)
        self._count[name] = seen + len(prediction)
        if task == "classes":
            right = prediction.argmax(1) == (y if y.dim() == 1 else y.argmax(1))
            sums = [(right * weight).sum(), weight.sum()]
        elif task == "labels":
            if seen < _RANKED:
                self._kept.setdefault(name, []).append((prediction, y, weight))
            sums = [weight.sum()]
        else:
            w = weight.unsqueeze(1)
            sums = [
                ((y - prediction).square() * w).sum(0),
                (y * w).sum(0),
                (y.square() * w).sum(0),
                weight.sum(),
            ]
        earlier = self._sums.get(name)
        self._sums[name] = sums if earlier is None else [a + b for a, b in zip(earlier, sums, strict=True)]

    def sums(self, names: tuple[str, ...]) -> Tensor:
        """Return `(2, M)`: results times numbers of samples, and numbers of samples, which add over ranks."""
        nothing = torch.zeros(2, dtype=torch.float32, device="cpu")
        pairs = [self._pair(name) if name in self._sums else nothing for name in names]
        device = next(
            (pair.device for name, pair in zip(names, pairs, strict=True) if name in self._sums), None
        )
        return torch.stack([pair.to(device or "cpu") for pair in pairs], 1)

    def _pair(self, name: str) -> Tensor:
        sums = self._sums[name]
        if self._task == "classes":
            return torch.stack(sums).float()
        count = sums[-1]
        if self._task == "labels":
            result = mean_average_precision(
                *(torch.cat(parts) for parts in zip(*self._kept[name], strict=True))
            )
        else:
            error, total, square, _ = sums
            variance = square - total.square() / count
            result = torch.where(variance > 0, 1 - error / variance, torch.nan).nanmean()
        usable = torch.isfinite(result)
        return torch.stack([torch.where(usable, result * count, 0), torch.where(usable, count, 0)]).float()


def mean_average_precision(score: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Compute the mean over labels of the average precision, 0-d; labels without a positive sample do not count.

    Args:
        score: `(B, O)`, higher for likelier labels.
        y: `(B, O)` of 0 and 1.
        weight: `(B,)`, 0 for samples that do not count.
    """
    score = torch.where(weight.unsqueeze(1) > 0, score, -torch.inf)
    positive = (y > 0.5) & (weight.unsqueeze(1) > 0)
    ranked = positive.gather(0, score.argsort(dim=0, descending=True, stable=True)).to(score.dtype)
    places = torch.arange(1, len(score) + 1, dtype=score.dtype, device=score.device).unsqueeze(1)
    precision = ranked.cumsum(0) / places
    result: Tensor = torch.where(
        ranked.sum(0) > 0, (precision * ranked).sum(0) / ranked.sum(0), torch.nan
    ).nanmean()
    return result


def _may_number(flags: Tensor, count: int) -> bool:
    """Tell whether as many flags are set as `count`, as far as the host can read them."""
    host_value = on_host(flags)
    return host_value is None or int(host_value.sum()) == count
