"""Scheduler that diagnoses every few epochs and re-initialises overfitted encoders in part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import torch

from balanceopt._options import (
    check_choice,
    check_count,
    check_entries,
    check_kind,
)
from balanceopt._pooling import Pool
from balanceopt._warnings import warn_user
from balanceopt.monitor import ModalityMonitor
from balanceopt.relearn._base import EpochMethod
from balanceopt.relearn._classes import Classes
from balanceopt.relearn._diagnosis import Diagnosis, Gap, Normalize, diagnose_samples, options
from balanceopt.relearn._features import (
    Features,
    Forward,
    Source,
    check_loader,
    collect_samples,
    is_given,
)
from balanceopt.relearn._initial import InitialWeights, OptimizerState, reinitialise

# Attributes of a Diagnosis that listeners get, because each has a value for every modality.
_RECORDED = ("train_purity", "val_purity", "gap", "strength")


class ReLearnScheduler(EpochMethod):
    r"""Diagnosing & Re-learning, stepped once an epoch like a learning-rate scheduler.

    Every `every`-th `step()` clusters the encoders' features of the training and validation samples. The gap between
    the purities measures how far an encoder has overfitted, and sets its re-initialisation strength:

    $$\theta^m \leftarrow (1 - \alpha^m) \theta^m + \alpha^m \theta^m_{\text{init}}, \qquad
    \alpha^m = \tanh(\lambda |P_D^m - P_V^m|)$$

    Accuracy drops at once and recovers some epochs later, so with `epochs` set no diagnosis falls in the last `every`.

    Any number of modalities and any fusion; only trainable parameters that belong to one encoder alone change, in
    place. After an exception in `step()` nothing has changed.

    Args:
        optimizer: the model's optimizer, wrapped or not.
        monitor: a `ModalityMonitor` on the model; `head=None` is enough.
        train_loader: batches `(*inputs, labels)`, or mappings with "labels" or "label"; None for both loaders where
            features are given to each `step`.
        val_loader: batches of held-out samples, none of them trained on, in the same form.
        every: interval between diagnoses in epochs (calls of `step`), >= 1.
        epochs: number of epochs of the run; no diagnosis comes where fewer than `every` are left. None, with a
            warning, diagnoses also after the last epoch.
        first: epochs before the first diagnosis, >= 1; None for `every`. Published code has `every=20, first=21`.
        lam: factor of the strength, >= 0; 0 never re-initialises.
        max_relearns: upper limit of re-initialisations, >= 0; None for no limit.
        classes: how targets become classes, whose number is the number of clusters. None for the rule of the
            monitor's loss: class indices, the most probable class of soft labels, and for other losses as follows.
            `"quantiles"` cuts numbers into ten bins, equally frequent among all training targets; `"label-set"` makes
            a class of each of the ten most frequent sets of labels in training, and one of all others; a function
            maps a batch's labels to class indices `(B,)`.
        normalize: `"minmax"` scales each feature to [-1, 1] before clustering, as published code does; `"none"`.
        forward: function of (model, batch) that runs the model, for other batches, and returns the labels: integers
            `(B,)`, or any targets as `{"labels": targets}`. Labels that it does not return are the batch's.
        optimizer_state: `"keep"`, or `"reset"` to delete the momentum of re-initialised encoders.
        initial: initial weights, as a state dict of the model, or of each encoder by modality; None for the current
            weights (of lazy and frozen parameters: at the first forward that finds them built and trainable).
        snapshot_device: device of the initial weights; None for each parameter's device.
        max_samples: upper limit of each modality's samples in each split, over all ranks; with classes balanced, or
            for `"quantiles"` and `"label-set"` at random.
        equal_counts: cut the larger split into random parts of the smaller split's size, at most five, and average
            their purities; False clusters all samples, as published.
        gap: `"absolute"`, as published; `"one-sided"` for $\max(0, P_D^m - P_V^m)$.
        pool: pooling rule for features of more than two dimensions: `"auto"` (the model's own before the head, where
            known), `"mean"`, `"max"`, `"flatten"` or a function.
        n_init: number of k-means starts, >= 1; the best one counts.
        seed: seed of k-means and of the choice of samples; None for the first rank's `torch.initial_seed()`, read now.
        progress: show a progress bar (tqdm); None for passes over ten seconds on a terminal where tqdm is installed.

    Raises:
        ValueError: for an option outside its range, or a missing loader.
        TypeError: if `optimizer`, `monitor`, a loader, `forward` or `initial` has another type.

    Example:
        >>> import balanceopt as bo
        >>> model = torch.nn.ModuleDict({m: torch.nn.Linear(2, 3) for m in ("a", "b")})
        >>> monitor = bo.ModalityMonitor(model, {"a": "a", "b": "b"})
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> scheduler = bo.ReLearnScheduler(optimizer, monitor, [], [], every=2, epochs=10)
        >>> scheduler.step() is None, scheduler.last_epoch, scheduler.snapshot_bytes
        (True, 1, 72)

    Reference:
        Wei et al., Diagnosing and Re-learning for Balanced Multimodal Learning, ECCV 2024, Eq. 1-6, Algorithm 1.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        monitor: ModalityMonitor,
        train_loader: Iterable[Any] | None,
        val_loader: Iterable[Any] | None,
        *,
        every: int = 20,
        epochs: int | None = None,
        first: int | None = None,
        lam: float = 3.0,
        max_relearns: int | None = 3,
        classes: Classes | None = None,
        normalize: Normalize = "minmax",
        forward: Forward | None = None,
        optimizer_state: OptimizerState = "keep",
        initial: Mapping[str, Any] | None = None,
        snapshot_device: torch.device | str | None = None,
        max_samples: int = 50_000,
        equal_counts: bool = True,
        gap: Gap = "absolute",
        pool: Pool = "auto",
        n_init: int = 1,
        seed: int | None = None,
        progress: bool | None = None,
    ) -> None:
        check_kind("`optimizer`", optimizer, torch.optim.Optimizer, "a torch.optim.Optimizer")
        check_kind("`monitor`", monitor, ModalityMonitor, "a ModalityMonitor")
        check_count("max_relearns", max_relearns, or_none=True)
        check_choice("optimizer_state", optimizer_state, get_args(OptimizerState))
        _check_loaders(train_loader, val_loader)
        if initial is not None:
            check_kind(
                "`initial`", initial, Mapping, "a state dict of the model, or of each encoder by modality"
            )
        check_count("every", every, at_least=1)
        check_count("epochs", epochs, at_least=1, or_none=True)
        check_count("first", first, at_least=1, or_none=True)
        super().__init__(monitor)
        self.optimizer = optimizer
        self.train_loader = train_loader
        self.val_loader = val_loader
        self.every = every
        self.epochs = epochs
        self.first = every if first is None else first
        self.max_relearns = max_relearns
        self.optimizer_state: OptimizerState = optimizer_state
        self.relearns = 0
        self._options = options(
            seed,
            monitor.group,
            lam=lam,
            normalize=normalize,
            forward=forward,
            classes=classes,
            max_samples=max_samples,
            equal_counts=equal_counts,
            gap=gap,
            pool=pool,
            n_init=n_init,
            progress=progress,
        )
        _warn_of_schedule(every, epochs, self.first)
        self._initial = InitialWeights(monitor, snapshot_device)
        if initial is not None:
            self._initial.give(initial)
        if self._initial.waiting:
            monitor.hooks.outputs.add(self._copy_late)

    # -- public methods ------------------------------------------------------------------------------------------

    def step(self, *, train: Features | None = None, val: Features | None = None) -> Diagnosis | None:
        """Count an epoch; diagnose and re-initialise every `every`-th time that leaves `every` epochs to recover.

        Args:
            train: features by modality and labels of the training samples; None for the loader.
            val: features by modality and labels of the validation samples; None for the loader.

        Returns:
            The diagnosis; None on epochs without one.

        Raises:
            ValueError: for no samples, a single class, or labels that do not fit the loss or `classes`.
            TypeError, KeyError: if the data has another form.
        """
        diagnosis: Diagnosis | None = super().step(train=train, val=val)
        for quantity in _RECORDED if diagnosis is not None else ():
            values = list(getattr(diagnosis, quantity).values())
            shown = torch.tensor(values, dtype=torch.float64, device="cpu")
            self.report(self.last_epoch, quantity, self.monitor.modalities, shown)
        return diagnosis

    def run(
        self, epoch: int, *, train: Features | None = None, val: Features | None = None
    ) -> Diagnosis | None:
        """Diagnose and re-initialise after an epoch on which a diagnosis is due."""
        if not self._due:
            return None
        diagnosis = replace(self.diagnose(train, val), epoch=epoch + 1)
        self.attempt.note(partial(vars(self).update, relearns=self.relearns))
        reinitialise(self.attempt, diagnosis.strength, self._initial, self.optimizer, self.optimizer_state)
        self.relearns += len(diagnosis.skipped) < len(diagnosis.modalities)
        return diagnosis

    def diagnose(self, train: Source | None = None, val: Source | None = None) -> Diagnosis:
        """Diagnose the modalities with the scheduler's options, without re-initialisation.

        Args:
            train: a loader, or features by modality and labels; None for the scheduler's training loader.
            val: a loader, or features by modality and labels; None for the scheduler's validation loader.

        Raises:
            ValueError, TypeError, KeyError: as `step`.
        """
        samples = []
        sources = (("training", train, self.train_loader), ("validation", val, self.val_loader))
        for split, source, loader in sources:
            data = loader if source is None else source
            if data is None:
                raise ValueError(
                    f"there is no {split} data: without loaders call step(train=(features, labels), "
                    "val=(features, labels)), features by modality."
                )
            samples.append(collect_samples(data, split, self.monitor, self._options))
        return diagnose_samples(self.monitor.modalities, samples[0], samples[1], self._options)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts of epochs and re-initialisations, the seed, and the initial weights by dotted name."""
        return {
            **super().state_dict(),
            "relearns": self.relearns,
            "seed": self._options.seed,
            "initial": self._initial.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of a checkpoint; a load that fails changes nothing.

        Args:
            state: from `state_dict()`.

        Raises:
            ValueError: if the initial weights belong to another model, or a counter is not a whole number.
            TypeError, KeyError: if `state` is not a scheduler's state.
        """
        super().load_state_dict(state)
        self._initial.load(state["initial"])
        self.relearns = int(state["relearns"])
        self._options = replace(self._options, seed=int(state["seed"]))

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise where `load_state_dict` would, before anything changes."""
        super().check_state(state)
        check_entries("the state of ReLearnScheduler", state, ("relearns", "seed", "initial"))
        for entry in ("relearns", "seed"):
            check_count(entry, state[entry])
        self._initial.check(state["initial"])

    def remove(self) -> None:
        """Stop the scheduler from acting and remove its hook on the monitor; a second call is a no-op."""
        super().remove()
        self.monitor.hooks.outputs.drop(self._copy_late)

    @property
    def lam(self) -> float:
        """Factor of the re-initialisation strength."""
        return self._options.lam

    @property
    def snapshot_bytes(self) -> int:
        """Memory of this rank's initial weights in bytes."""
        return self._initial.nbytes

    def __repr__(self) -> str:
        return (
            f"ReLearnScheduler(every={self.every}, epochs={self.epochs}, first={self.first}, lam={self.lam}, "
            f"max_relearns={self.max_relearns}, "
            f"optimizer_state={self.optimizer_state!r}, "
            f"last_epoch={self.last_epoch}, relearns={self.relearns}, snapshot={self.snapshot_bytes} bytes)"
        )

    # -- private helpers -----------------------------------------------------------------------------------------

    @property
    def _due(self) -> bool:
        """Whether the next step diagnoses."""
        left = self.max_relearns is None or self.relearns < self.max_relearns
        epoch = self.last_epoch + 1
        in_time = self.epochs is None or epoch + self.every <= self.epochs
        return left and in_time and epoch >= self.first and (epoch - self.first) % self.every == 0

    def _copy_late(self, name: str, output: Any, current: Any) -> None:
        """Copy parameters that a forward finds built and trainable for the first time."""
        self._initial.take()
        if not self._initial.waiting:
            self.monitor.hooks.outputs.drop(self._copy_late)


def _warn_of_schedule(every: int, epochs: int | None, first: int) -> None:
    """Warn of a schedule that re-initialises after the last epoch, or never."""
    if epochs is None:
        warn_user(
            f"without `epochs=` encoders go back after every {every} epochs, also after the last one, and no training "
            "follows it. Give the number of epochs of the run: then nothing fires in the last `every` ones."
        )
    elif first + every > epochs:
        warn_user(
            f"nothing fires in a run of {epochs} epochs: the first diagnosis comes after {first} of them, and "
            f"`every` = {every} should be left after it. Give a smaller `every`."
        )


def _check_loaders(train: Any, val: Any) -> None:
    """Check that both loaders are given or neither, and that neither is a pair of features and labels."""
    for loader, name in ((train, "train_loader"), (val, "val_loader")):
        if loader is None and (train is not None or val is not None):
            raise ValueError(
                f"`{name}` should yield batches: a diagnosis compares training with held-out samples. Found None; "
                "give both loaders, or neither and features to each step."
            )
        if is_given(loader):
            raise TypeError(
                f"`{name}` should be a loader. Found features: pass them to each step, and None for both loaders here."
            )
        if loader is not None:
            check_loader(f"`{name}`", loader)
