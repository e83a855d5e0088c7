"""What can be compared: a name, and a function that puts the method around a plain training loop.

A new row is one function here and one line in `METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import balanceopt as bo
from benchmarks.models import MultimodalClassifier


@dataclass(frozen=True)
class Context:
    """What a method may need to know of the loop it joins.

    Args:
        train_loader: batches `(*inputs, labels)`.
        val_loader: the same of the validation samples.
        num_classes: C.
        lr: learning rate.
        momentum: of SGD.
        seed: of this run.
        epochs: of this run.
        loss: the loss module that the loop calls; None for cross-entropy, which monitors read from the gradient.
        criterion: the same, a module for cross-entropy too.
    """

    train_loader: Iterable[tuple[Tensor, ...]]
    val_loader: Iterable[tuple[Tensor, ...]]
    num_classes: int
    lr: float
    momentum: float
    seed: int
    epochs: int
    loss: nn.Module | None = None
    criterion: nn.Module | None = None


@dataclass(frozen=True)
class Method:
    """A method at work on one model.

    Args:
        optimizer: what the loop steps.
        recorder: holds score, ratio and coefficient over time; None if nothing is recorded.
        losses: functions of the labels whose values the loop adds to the loss.
        share: factor on the joint loss in the sum.
        epoch_ends: called after each epoch.
        removes: called at the end, to take hooks off.
        predict: after training, from the joint logits to what all heads answer together; None without other heads.
    """

    optimizer: torch.optim.Optimizer
    recorder: bo.Recorder | None = None
    losses: tuple[Callable[[Tensor], Tensor], ...] = ()
    share: float = 1.0
    epoch_ends: tuple[Callable[[], object], ...] = ()
    removes: tuple[Callable[[], object], ...] = ()
    predict: Callable[..., Tensor] | None = None


Build = Callable[[MultimodalClassifier, Context], Method]


def plain(model: MultimodalClassifier, context: Context) -> Method:
    """SGD and nothing else."""
    return Method(torch.optim.SGD(model.parameters(), lr=context.lr, momentum=context.momentum))


def joint(model: MultimodalClassifier, context: Context) -> Method:
    """SGD, watched: with `alpha=0` and no noise the steps are SGD's own, bit for bit, and the ratio is recorded."""
    return _modulated(model, context, bo.OGM(alpha=0.0, noise=False))


def ogm_ge(model: MultimodalClassifier, context: Context) -> Method:
    """OGM-GE with the strength its authors took for CREMA-D; not tuned for these data."""
    return _modulated(model, context, bo.OGM(alpha=0.8))


def opm(model: MultimodalClassifier, context: Context) -> Method:
    """OPM with its default drop probabilities, not tuned either."""
    return _modulated(model, context, bo.OGM(alpha=0.0, noise=False), drops=True)


def ogm_ge_and_opm(model: MultimodalClassifier, context: Context) -> Method:
    """Both at once, on one monitor."""
    return _modulated(model, context, bo.OGM(alpha=0.8), drops=True)


def amss(model: MultimodalClassifier, context: Context) -> Method:
    """AMSS as published."""
    return _modulated(model, context, [RATIO_ALONE, bo.AMSS()])


def amss_plus(model: MultimodalClassifier, context: Context) -> Method:
    """AMSS+: the masked gradient's mean is the gradient."""
    return _modulated(model, context, [RATIO_ALONE, bo.AMSS(scale="unbiased")])


def with_relearning(build: Build, *, every: int = 5, lam: float = 7.0, equal_counts: bool = False) -> Build:
    """Diagnosing & Re-learning on top, three times at most, as its authors did it; lam as for Kinetics-Sounds."""

    def both(model: MultimodalClassifier, context: Context) -> Method:
        method = build(model, context)
        optimizer: Any = method.optimizer
        scheduler = bo.ReLearnScheduler(
            optimizer,
            optimizer.monitor,
            context.train_loader,
            context.val_loader,
            every=every,
            epochs=context.epochs,
            lam=lam,
            equal_counts=equal_counts,
            seed=context.seed,
        )
        if method.recorder is not None:
            method.recorder.remove()
        recorder = bo.Recorder(optimizer, scheduler)
        return replace(method, recorder=recorder, epoch_ends=(*method.epoch_ends, scheduler.step))

    return both


def with_unimodal_losses(build: Build) -> Build:
    """The cross-entropy of each encoder by itself on top, with a linear head of its own."""

    def both(model: MultimodalClassifier, context: Context) -> Method:
        method = build(model, context)
        optimizer: Any = method.optimizer
        objective = bo.UnimodalObjective(optimizer.monitor, context.num_classes, seed=context.seed)
        optimizer.add_param_group({"params": list(objective.parameters()), "modality": None})
        removes = (objective.remove, *method.removes)
        return replace(method, losses=(*method.losses, objective), removes=removes)

    return both


def relearning(model: MultimodalClassifier, context: Context) -> Method:
    """Diagnosing & Re-learning after epochs 5, 10 and 15."""
    return with_relearning(joint)(model, context)


def relearning_and_unimodal(model: MultimodalClassifier, context: Context) -> Method:
    """The same with uni-modal losses: the strongest row of its paper's Table 2."""
    return with_unimodal_losses(with_relearning(joint))(model, context)


# Records the ratio and changes nothing.
RATIO_ALONE = bo.OGM(alpha=0.0, noise=False)

# Rows of the table, in order; the first is what the others are compared with.
METHODS: dict[str, Build] = {
    "joint": joint,
    "OGM-GE": ogm_ge,
    "OPM": opm,
    "OGM-GE + OPM": ogm_ge_and_opm,
    "AMSS": amss,
    "AMSS+": amss_plus,
    "Re-learning": relearning,
    "Re-learning + uni-modal losses": relearning_and_unimodal,
}


def _modulated(
    model: MultimodalClassifier, context: Context, modulation: Any, *, drops: bool = False
) -> Method:
    encoders = dict(model.encoders.items())
    groups = bo.modality_groups(model, encoders)
    base = torch.optim.SGD(groups, lr=context.lr, momentum=context.momentum)
    monitor = bo.ModalityMonitor(model, encoders, head=model.head)
    optimizer = bo.ModulatedOptimizer(base, monitor, modulation, seed=context.seed)
    if not drops:
        return Method(optimizer, bo.Recorder(optimizer), removes=(monitor.remove,))
    modulator = bo.OPM(monitor, seed=context.seed)
    return Method(optimizer, bo.Recorder(optimizer, modulator), removes=(modulator.remove, monitor.remove))
