"""From a row's options to a method around the plain loop, by the package's public names only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

import torch

import balanceopt as bo
from benchmarks.fixed_dropout import drop_at_random
from benchmarks.methods import Build, Context, Method
from benchmarks.models import MultimodalClassifier

# Re-initialisations are spread over the first 60 % of the training, as in the papers' settings.
_RELEARNS = 3
_PARTS = 5


def build_of(options: Mapping[str, Any]) -> Build:
    """What puts a row's method around the loop.

    Args:
        options: `lr`, `epochs`, and any of `optimizer`, `lr_factor`, `dropout_p`, `unimodal_heads` with
            `unimodal_weight`, `ogm_alpha` with `ogm_noise` and `ogm_apply_to`, `opm_q_base`, `amss_scale` with
            `amss_temperature`, `relearn_lam` with `relearn_every`; `weight_decay`, and `ogm_epochs`, the first and the
            last epoch in which OGM acts.
    """

    def build(model: MultimodalClassifier, context: Context) -> Method:
        if not _BALANCING & set(options):
            return Method(
                _base(model.parameters(), context, options), removes=_dropout(model, context, options)
            )
        return _balanced(model, context, options)

    return build


_BALANCING = {"unimodal_weight", "ogm_alpha", "opm_q_base", "amss_scale", "relearn_lam"}
_NEED_HEAD = {"ogm_alpha", "opm_q_base", "amss_scale"}


def _balanced(model: MultimodalClassifier, context: Context, options: Mapping[str, Any]) -> Method:
    encoders = dict(model.encoders.items())
    # Without a head where none is needed: dropped features don't look like an encoder's output.
    scored = _NEED_HEAD & set(options) or options.get("unimodal_heads") == "shared"
    monitor = bo.ModalityMonitor(model, encoders, head=model.head if scored else None, loss=context.loss)
    removes = [monitor.remove]
    groups = bo.modality_groups(model, encoders)
    losses = []
    if "unimodal_weight" in options:
        objective = bo.UnimodalObjective(
            monitor,
            context.num_classes,
            heads=options["unimodal_heads"],
            weight=options["unimodal_weight"],
            seed=context.seed,
        )
        removes.insert(0, objective.remove)
        losses.append(objective)
        if options["unimodal_heads"] == "own":
            groups = [*groups, {"params": list(objective.parameters())}]
    optimizer = _optimizer(groups, monitor, context, options)
    if "opm_q_base" in options:
        modulator = bo.OPM(monitor, q_base=options["opm_q_base"], seed=context.seed)
        removes.insert(0, modulator.remove)
    epoch_ends = _window(optimizer) if "ogm_epochs" in options else []
    if "relearn_lam" in options:
        scheduler = bo.ReLearnScheduler(
            optimizer,
            monitor,
            context.train_loader,
            context.val_loader,
            every=options.get("relearn_every", max(1, options["epochs"] // _PARTS)),
            epochs=options["epochs"],
            max_relearns=_RELEARNS,
            equal_counts=False,  # as published
            lam=options["relearn_lam"],
            seed=context.seed,
        )
        epoch_ends.append(scheduler.step)
    removes.extend(_dropout(model, context, options))
    return Method(optimizer, None, tuple(losses), tuple(epoch_ends), tuple(removes))


def _optimizer(
    groups: list[dict[str, Any]], monitor: bo.ModalityMonitor, context: Context, options: Mapping[str, Any]
) -> torch.optim.Optimizer:
    if "amss_scale" in options:
        return bo.MaskedSubnetworkSGD(
            groups,
            monitor,
            lr=context.lr * options.get("lr_factor", 1.0),
            momentum=context.momentum,
            scale=options["amss_scale"],
            temperature=options["amss_temperature"],
            weight_decay=options.get("weight_decay", 0.0),
            seed=context.seed,
        )
    base = _base(groups, context, options)
    if "ogm_alpha" not in options:
        return base
    start, end = options.get("ogm_epochs", (0, None))
    modulation = bo.OGM(
        alpha=options["ogm_alpha"],
        noise=options["ogm_noise"],
        apply_to=options.get("ogm_apply_to", "grad"),
        start=start,
        end=end,
        unit="epoch" if "ogm_epochs" in options else "step",
    )
    return bo.ModulatedOptimizer(base, monitor, modulation, seed=context.seed)


def _base(params: Any, context: Context, options: Mapping[str, Any]) -> torch.optim.Optimizer:
    if options.get("optimizer") == "adamw":
        return torch.optim.AdamW(params, lr=context.lr)
    decay = options.get("weight_decay", 0.0)
    return torch.optim.SGD(params, lr=context.lr, momentum=context.momentum, weight_decay=decay)


def _window(optimizer: Any) -> list[Callable[[], object]]:
    """What counts the window of a modulation in epochs."""
    epochs = count()
    optimizer.set_epoch(next(epochs))
    return [lambda: optimizer.set_epoch(next(epochs))]


def _dropout(model: MultimodalClassifier, context: Context, options: Mapping[str, Any]) -> tuple[Any, ...]:
    return drop_at_random(model, options["dropout_p"], context.seed) if "dropout_p" in options else ()
