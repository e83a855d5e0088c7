"""From a row's options to a method around the plain loop, by the package's public names only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

import balanceopt as bo
from benchmarks.methods import Build, Context, Method
from benchmarks.models import MultimodalClassifier

# Re-initialisations are spread over the first 60 % of the training, as in the papers' settings.
_RELEARNS = 3
_PARTS = 5

Options = Mapping[str, Any]


def build_of(options: Options) -> Build:
    """What puts a row's method around the loop.

    Args:
        options: `lr`, `epochs`, and any of `optimizer`, `weight_decay`, `encoder_factor`, `dropout_p`,
            `unimodal_heads` with `unimodal_weight` and `unimodal_joint`, `ogm_alpha` with `ogm_noise` and `ogm_epochs`
            (the first and the last epoch in which OGM acts), `agm_alpha`, `mlb_alpha`, `inforeg_scale`,
            `mmpareto_gamma`, `tcmax_weight`, `mcr_weight`, `opm_q_base`, `amss_scale` with `amss_temperature`,
            `relearn_lam` with `relearn_every`, `blend_every`; or `balance`, for all that
            `bo.balance` does.
    """

    def build(model: MultimodalClassifier, context: Context) -> Method:
        if "balance" in options:
            return _recommended(model, context, options)
        if not _ACTING & set(options):
            return Method(_base(model.parameters(), context, options))
        return _balanced(model, context, options)

    return build


# A method around the optimizer, by the option that asks for it.
_MODULATIONS: dict[str, Callable[[Options, bo.ModalityMonitor], bo.Modulation]] = {
    "encoder_factor": lambda o, monitor: _times(o["encoder_factor"], monitor),
    "ogm_alpha": lambda o, _: _ogm(o),
    "agm_alpha": lambda o, _: bo.AGM(alpha=o["agm_alpha"]),
    "mlb_alpha": lambda o, _: bo.MLB(alpha=o["mlb_alpha"]),
    "inforeg_scale": lambda o, _: bo.InfoReg(scale=o["inforeg_scale"]),
}
_NEED_HEAD = {
    "ogm_alpha", "agm_alpha", "mlb_alpha", "inforeg_scale", "mmpareto_gamma", "tcmax_weight", "mcr_weight",
    "opm_q_base", "amss_scale", "blend_every",
}  # fmt: skip
_BY_EPOCH = {"ogm_epochs", "inforeg_scale"}
_ACTING = {*_MODULATIONS, *_NEED_HEAD, "unimodal_weight", "dropout_p", "relearn_lam"}


def _balanced(model: MultimodalClassifier, context: Context, options: Options) -> Method:
    objectives: list[bo.UnimodalObjective] = []
    encoders = dict(model.encoders.items())
    # Without a head where none is needed: dropped features don't look like an encoder's output.
    scored = _NEED_HEAD & set(options) or options.get("unimodal_heads") == "shared"
    monitor = bo.ModalityMonitor(
        model,
        encoders,
        head=model.head if scored else None,
        # Injected losses need labels where a diverging run leaves no gradient to read them from, too.
        loss=context.criterion if "mmpareto_gamma" in options else context.loss,
        # As in its paper, MLB's scores are those of the uni-modal losses' heads.
        scores=(lambda z: objectives[0].unimodal_logits(z)) if "mlb_alpha" in options else "auto",
    )
    groups = bo.modality_groups(model, encoders)
    if "unimodal_weight" in options:
        objectives = [_objective(monitor, context, options)]
        groups += _groups_of(objectives[0], monitor, options)
    objective = objectives[0] if objectives else None
    optimizer = _optimizer(groups, monitor, objective, context, options)
    epoch_ends = _epoch_by_epoch(optimizer) if _BY_EPOCH & set(options) else []
    if "relearn_lam" in options:
        epoch_ends.append(_relearning(optimizer, monitor, context, options))
    if "blend_every" in options:
        epoch_ends.append(_blending(objectives[0], model, context, options))
    losses: list[Callable[[Tensor], Tensor]] = [o for o in objectives if not o.inject]
    removes = [o.remove for o in objectives] + _droppers(monitor, context, options)
    if "tcmax_weight" in options:
        correlation = bo.TotalCorrelationLoss(monitor, weight=options["tcmax_weight"])
        losses.append(correlation)
        removes.append(correlation.remove)
    if "mcr_weight" in options:
        competition = bo.CompetitionObjective(monitor, weight=options["mcr_weight"], seed=context.seed)
        losses.append(lambda labels: competition())
        removes.append(competition.remove)
    return Method(
        optimizer,
        losses=tuple(losses),
        share=1.0 - options.get("tcmax_weight", 0.0),
        epoch_ends=tuple(epoch_ends),
        removes=(*removes, monitor.remove),
        predict=None if isinstance(context.loss, nn.MSELoss) else _vote_of(objectives),
    )


def _vote_of(objectives: list[bo.UnimodalObjective]) -> Callable[..., Tensor] | None:
    return next((objective.predict for objective in objectives if objective.heads == "own"), None)


def _recommended(model: MultimodalClassifier, context: Context, options: Options) -> Method:
    optimizer = _base(model.parameters(), context, options)
    balance = bo.balance(
        model,
        dict(model.encoders.items()),
        optimizer,
        context.num_classes,
        train_loader=context.train_loader,
        val_loader=context.val_loader,
        epochs=options["epochs"],
        loss=context.loss,
        seed=context.seed,
    )
    return Method(
        optimizer,
        losses=(balance,),
        epoch_ends=(balance.step,),
        removes=(balance.remove,),
        predict=balance.predict,
    )


def _objective(monitor: bo.ModalityMonitor, context: Context, options: Options) -> bo.UnimodalObjective:
    return bo.UnimodalObjective(
        monitor,
        context.num_classes,
        heads=options["unimodal_heads"],
        weight=options["unimodal_weight"],
        joint=options.get("unimodal_joint", 1.0),
        inject="mmpareto_gamma" in options,
        seed=context.seed,
    )


def _groups_of(
    objective: bo.UnimodalObjective, monitor: bo.ModalityMonitor, options: Options
) -> list[dict[str, Any]]:
    """Parameter groups of the objective's own heads; MLB scales a head's gradient with its encoder's."""
    if options["unimodal_heads"] == "shared":
        return []
    if "mlb_alpha" in options:
        return [
            {"params": list(objective.head_of(name).parameters()), "modality": name}
            for name in monitor.modalities
        ]
    return [{"params": list(objective.parameters())}]


def _optimizer(
    groups: list[dict[str, Any]],
    monitor: bo.ModalityMonitor,
    objective: bo.UnimodalObjective | None,
    context: Context,
    options: Options,
) -> torch.optim.Optimizer:
    if "amss_scale" in options:
        return bo.MaskedSubnetworkSGD(
            groups,
            monitor,
            lr=context.lr,
            momentum=context.momentum,
            scale=options["amss_scale"],
            temperature=options["amss_temperature"],
            weight_decay=options.get("weight_decay", 0.0),
            seed=context.seed,
            strict=False,
        )
    base = _base(groups, context, options)
    modulations = [make(options, monitor) for name, make in _MODULATIONS.items() if name in options]
    if "mmpareto_gamma" in options:
        assert objective is not None
        modulations.append(bo.MMPareto(objective, gamma=options["mmpareto_gamma"]))
    if not modulations:
        return base
    # A training that diverges, which leaves no scores to act on, is a result as well.
    return bo.ModulatedOptimizer(base, monitor, modulations, seed=context.seed, strict=False)


def _times(factor: float, monitor: bo.ModalityMonitor) -> bo.FixedModulation:
    return bo.FixedModulation(dict.fromkeys(monitor.modalities, factor))


def _ogm(options: Options) -> bo.OGM:
    start, end = options.get("ogm_epochs", (0, None))
    return bo.OGM(
        alpha=options["ogm_alpha"],
        noise=options["ogm_noise"],
        start=start,
        end=end,
        unit="epoch" if "ogm_epochs" in options else "step",
    )


def _base(params: Any, context: Context, options: Options) -> torch.optim.Optimizer:
    if options.get("optimizer") == "adamw":
        return torch.optim.AdamW(params, lr=context.lr)
    decay = options.get("weight_decay", 0.0)
    return torch.optim.SGD(params, lr=context.lr, momentum=context.momentum, weight_decay=decay)


def _droppers(monitor: bo.ModalityMonitor, context: Context, options: Options) -> list[Callable[[], object]]:
    """Put on what drops features; returns what takes it off."""
    removes: list[Callable[[], object]] = []
    if "opm_q_base" in options:
        removes.append(bo.OPM(monitor, q_base=options["opm_q_base"], seed=context.seed).remove)
    if "dropout_p" in options:
        removes.append(bo.ModalityDropout(monitor, p=options["dropout_p"], seed=context.seed).remove)
    return removes


def _epoch_by_epoch(optimizer: Any) -> list[Callable[[], object]]:
    """Start the epochs of a method that counts them; returns what starts the next one."""
    epochs = count()
    optimizer.set_epoch(next(epochs))
    return [lambda: optimizer.set_epoch(next(epochs))]


def _relearning(
    optimizer: torch.optim.Optimizer, monitor: bo.ModalityMonitor, context: Context, options: Options
) -> Callable[[], object]:
    return bo.ReLearnScheduler(
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
    ).step


def _blending(
    objective: bo.UnimodalObjective, model: MultimodalClassifier, context: Context, options: Options
) -> Callable[[], object]:
    """Validate and weigh the losses after each epoch."""
    monitor = objective.monitor
    scheduler = bo.BlendScheduler(
        objective, bo.ProbeMonitor(monitor, losses=True), every=options["blend_every"]
    )

    def validate() -> None:
        model.eval()
        with torch.no_grad():
            for *inputs, labels in context.val_loader:
                model(*inputs)
                monitor.observe(labels)
        scheduler.step()

    return validate
