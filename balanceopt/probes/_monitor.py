"""ProbeMonitor: what each encoder knows, by linear heads that are trained beside the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from balanceopt._method import ABSENT, Method
from balanceopt._options import check_count, check_entries, check_flag, check_kind, check_number
from balanceopt._torch import in_backward
from balanceopt._warnings import WarnOnce
from balanceopt.distributed import active_group, sum_over_ranks
from balanceopt.functional import AnswerKind, without_autocast
from balanceopt.monitor import ModalityMonitor, Pass, ScoreBuffer, detached_copy, require_scores
from balanceopt.probes._losses import LossSums, ProbeLosses, joint_sums_of, sums_of
from balanceopt.probes._probe import Probe
from balanceopt.probes._round import Round
from balanceopt.probes._rows import Batch, Rows, rows_of


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
        self._probes: dict[str, Probe] = {}
        self._warned = WarnOnce()
        self._results: Tensor | None = None
        # A buffer makes the monitor keep each pass open for targets, and determine them.
        self._buffer: ScoreBuffer | None = monitor.scores(steps=False)
        self._training = Batch()
        self._pass: Pass | None = None
        self._evaluated: Batch | None = None
        self._rounds = {"probe": Round(), "probe_train": Round()}
        self._losses = LossSums(monitor.modalities)
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
        return self._losses.take(self._device, self.monitor.group)

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
        self._training, self._pass = Batch(), None

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
            "losses": self._losses.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the state of a checkpoint. A load that fails changes nothing.

        Args:
            state: result of `state_dict()`.

        Raises:
            TypeError, KeyError, ValueError: if `state` is no state of probes on these modalities.
        """
        self.check_state(state)
        self._probes = {name: Probe.of_state(part, self._device) for name, part in state["probes"].items()}
        self.passes = int(state["passes"])
        self._losses.load_state_dict(state["losses"], self._device)
        # The passes before the load belong to the probes of before.
        self._training, self._pass, self._evaluated, self._results = Batch(), None, None, None
        self._rounds = {name: Round() for name in self._rounds}
        if self._buffer is not None:
            self._buffer.discard()

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise where `load_state_dict` would, before anything changes."""
        check_entries("the state of a ProbeMonitor", state, ("passes", "probes", "losses"))
        check_count("passes", state["passes"])
        self._losses.check_state(state["losses"])
        check_entries("the state's 'probes'", state["probes"], ())
        unknown = set(state["probes"]) - set(self.monitor.modalities)
        if unknown:
            raise KeyError(
                f"the state's probes should be of {self.monitor.modalities}. Found also {sorted(map(str, unknown))}."
            )
        for name, part in state["probes"].items():
            Probe.check(f"the state of the probe of {name!r}", part)

    def __getstate__(self) -> dict[str, Any]:
        # A copy is inert, because hooks exist on the original monitor's model only.
        state = {**super().__getstate__(), "removed": True}
        return {**state, "_training": Batch(), "_pass": None, "_evaluated": None, "_buffer": None}

    # -- hooks -----------------------------------------------------------------------------------------------------

    def _on_start(self, current: Pass | None) -> None:
        self._end_evaluation()
        if current is None:
            self._evaluated = Batch()
        else:
            self._begin_training(current)

    def _on_output(self, name: str, output: Any, current: Pass | None) -> None:
        if in_backward() or (current is not None and current.rehearsal):
            return
        hooks = self.monitor.hooks
        if current is None:
            if not hooks.evaluates or name in (self._evaluated or Batch()).features:
                self._end_evaluation()
            if not hooks.evaluates:
                return
            self._evaluated = self._evaluated or Batch()
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
        batch, self._training = self._training, Batch()
        if done is None or self._buffer is None:
            return
        self._buffer.take_local()
        batch.present = done.present
        with without_autocast(self._device.type):  # probes would be rounded
            rows = {} if done.target is None else self._rows(batch, done.target, done.samples)
            self._build(rows, self._outputs(done))
            predictions, losses = self._evaluate("probe_train", rows, batch, done.target)
            parts = {
                name: self._probes[name].gradient(rows[name], prediction, self.task)
                for name, prediction in predictions.items()
            }
            self._step(parts, losses)
        self.passes += bool(rows)

    def _step(self, parts: dict[str, tuple[Tensor, Tensor]], losses: Tensor | None) -> None:
        """Average the gradients, the features' statistics and the losses over ranks, and step."""
        ends = not self._rounds["probe"].is_empty
        if active_group(self.monitor.group) is None:
            for name, (gradient, moments) in parts.items():
                self._probes[name].step(gradient, moments, self.lr)
            if losses is not None:
                self._losses.add("train", losses)
            if ends:
                self._report(self._sums())
            return
        pieces = [x for name, probe in self._probes.items() for x in parts.get(name, probe.nothing())]
        pieces += [] if losses is None else [losses.flatten()]
        # Ranks may validate one by one: whoever ends a round gets the sums of all that end one now.
        sums = self._sums()
        pieces += [(x if ends else torch.zeros_like(x)).flatten().to(self._device) for x in sums.values()]
        total = sum_over_ranks(torch.cat(pieces), self.monitor.group).split([len(piece) for piece in pieces])
        for index, probe in enumerate(self._probes.values()):
            probe.step(total[2 * index], total[2 * index + 1], self.lr)
        if losses is not None:
            self._losses.add("train", total[2 * len(self._probes)].view_as(losses))
        if ends:
            self._report({name: x.view(2, -1) for name, x in zip(sums, total[-len(sums) :], strict=True)})

    def _sums(self) -> dict[str, Tensor]:
        return {name: round_.sums(self.monitor.modalities) for name, round_ in self._rounds.items()}

    def _build(self, rows: Mapping[str, Rows], outputs: int) -> None:
        """Build the probes of modalities that came for the first time, on all ranks together."""
        names = self.monitor.modalities
        if len(self._probes) == len(names):
            return
        widths = [rows[name].z.shape[1] if name in rows else 0 for name in names]
        if active_group(self.monitor.group) is not None:
            shared = torch.tensor([*widths, outputs], dtype=torch.int64, device=self._device)
            dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=active_group(self.monitor.group))
            *widths, outputs = shared.tolist()
        for name, width in zip(names, widths, strict=True):
            if width and name not in self._probes:
                self._probes[name] = Probe.new(width, outputs, self._device)
        self._probes = {name: self._probes[name] for name in names if name in self._probes}

    def _outputs(self, done: Pass) -> int:
        """Return the number of outputs of a probe."""
        if self.task != "classes":
            return 0 if done.target is None else done.target.reshape(len(done.target), -1).shape[1]
        if not done.shape:
            return 0
        return max(2, done.shape[1] if done.classes_first else done.shape[-1])

    @torch.no_grad()
    def _end_evaluation(self) -> None:
        """Evaluate the probes on the latest forward in eval mode, if its targets came."""
        batch, self._evaluated = self._evaluated, None
        target = None if batch is None else batch.target
        if batch is None or target is None or not self._probes:
            return
        with without_autocast(self._device.type):  # probes would be rounded
            rows = self._rows(batch, target, len(target))
            _, losses = self._evaluate("probe", rows, batch, target)
        if losses is not None:
            self._losses.add("val", losses)

    def _evaluate(
        self, quantity: str, rows: Mapping[str, Rows], batch: Batch, target: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Add a batch to a quantity's round; return the probes' predictions, and the losses' sums if they are kept."""
        predictions: dict[str, Tensor] = {}
        losses: dict[str | None, Tensor] = {}
        for name, part in rows.items():
            if name in self._probes:
                predictions[name] = self._probes[name].predict(part.z)
                self._rounds[quantity].add(name, predictions[name], part, self.task)
                if self.losses:
                    losses[name] = sums_of(predictions[name], part, self.task)
        if target is not None and batch.logits:
            ignored = self.monitor.labels.ignore_index
            losses[None] = joint_sums_of(batch.logits, target, self.task, ignored)
        return predictions, self._losses.columns(losses, self._device) if self.losses else None

    def _rows(self, batch: Batch, target: Tensor, samples: int | None) -> dict[str, Rows]:
        return rows_of(batch, target, samples, self.monitor, self._warned)

    @property
    def _device(self) -> torch.device:
        return next(self.monitor.model.parameters()).device

    def _report(self, sums: dict[str, Tensor]) -> None:
        self._rounds = {name: Round() for name in self._rounds}
        for quantity, (total, count) in sums.items():
            values = torch.where(count > 0, total / count, ABSENT)
            self.report(self.passes, quantity, self.monitor.modalities, values)
            if quantity == "probe":
                self._results = values
