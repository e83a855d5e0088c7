"""balance: the recommended composition in one line, uni-modal losses, re-learning and the vote of all heads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from balanceopt._options import check_count, check_entries, check_kind, names_of
from balanceopt._removable import Removable
from balanceopt.functional import LossFunction, as_loss
from balanceopt.modality import Encoders
from balanceopt.monitor import ModalityMonitor
from balanceopt.objective import UnimodalObjective
from balanceopt.relearn import Diagnosis, ReLearnScheduler

# Re-learning comes after each of these parts of the run, but for the last ones.
_PARTS = 5


class Balance(Removable):
    """What `balance` built: the loss to add, the step after each epoch, the vote at test time.

    Attributes:
        monitor: the `ModalityMonitor` on the model, which further methods, probes and a `Recorder` may share.
        objective: the `UnimodalObjective`, with heads of its own.
        scheduler: the `ReLearnScheduler`; None without loaders, and in a regression.

    Reference:
        docs/recipe.md.
    """

    def __init__(self, objective: UnimodalObjective, scheduler: ReLearnScheduler | None) -> None:
        """Compose methods on one monitor."""
        self.monitor: ModalityMonitor = objective.monitor
        self.objective = objective
        self.scheduler = scheduler
        form = as_loss(objective.loss)
        self._votes = form.rowwise and form.answers != "numbers"

    def __call__(self, labels: Tensor) -> Tensor:
        """Return the uni-modal losses of the latest forward, to be added to the joint loss; see `UnimodalObjective`."""
        loss: Tensor = self.objective(labels)
        return loss

    def step(self) -> Diagnosis | None:
        """End an epoch: diagnose and re-initialise where that is due; see `ReLearnScheduler.step`.

        Returns:
            The diagnosis; None on epochs without one.
        """
        return None if self.scheduler is None else self.scheduler.step()

    def predict(self, logits: Tensor, *, present: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the vote of all heads in place of the joint logits, in eval mode; see `UnimodalObjective.predict`.

        In a regression, and under a loss that is a function, where nothing can vote, it is the model's output itself.

        Args:
            logits: what the model returned in its latest forward.
            present: bool `(B,)` by modality, for batches in which some samples lack a modality.
        """
        return self.objective.predict(logits, present=present) if self._votes else logits

    def state_dict(self) -> dict[str, Any]:
        """Return the state that resumes a run bit for bit: the heads' weights, and that of re-learning."""
        heads = {name: p for name, p in self.objective.state_dict().items() if not is_lazy(p)}
        return {"heads": heads, "scheduler": None if self.scheduler is None else self.scheduler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of a checkpoint; a load that fails changes nothing.

        Args:
            state: from `state_dict()`.

        Raises:
            TypeError, KeyError, ValueError: if `state` is not a state of this composition on this model.
        """
        check_entries("the state of bo.balance", state, ("heads", "scheduler"))
        if (state["scheduler"] is None) != (self.scheduler is None):
            raise ValueError(
                "the state should be of a composition with re-learning, or without, as this one. Build both with "
                "loaders, or neither."
            )
        if self.scheduler is not None:
            self.scheduler.check_state(state["scheduler"])
        check_kind("the state's 'heads'", state["heads"], Mapping, "a mapping from names to weights")
        unknown = state["heads"].keys() - self.objective.state_dict().keys()
        if unknown:
            raise KeyError(
                f"the state's heads should be of {self.monitor.modalities}. Found {names_of(unknown)}."
            )
        # Heads that no batch had built by the time of the checkpoint are built as they would have been then.
        self.objective.load_state_dict(state["heads"], strict=False)
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])

    def remove(self) -> None:
        """Remove every hook. The heads' parameters stay in the optimizer, without gradients. May be called twice."""
        self.objective.remove()
        if self.scheduler is not None:
            self.scheduler.remove()
        self.monitor.remove()

    def __repr__(self) -> str:
        return f"Balance({self.objective.extra_repr()}, scheduler={self.scheduler!r}, votes={self._votes})"


def balance(
    model: nn.Module,
    encoders: Encoders,
    optimizer: torch.optim.Optimizer,
    out_features: int,
    *,
    train_loader: Iterable[Any] | None = None,
    val_loader: Iterable[Any] | None = None,
    epochs: int | None = None,
    loss: nn.Module | LossFunction | None = None,
    seed: int | None = None,
) -> Balance:
    r"""Balance a model by the recommended composition: uni-modal losses, re-learning, and the vote of all heads.

    Builds a `ModalityMonitor`, a `UnimodalObjective` with heads of its own and weight 1, whose parameters join the
    optimizer, and, with loaders, a `ReLearnScheduler` with `lam=3` and `equal_counts=False`, after each fifth of the
    epochs. In a regression there is no re-learning and no vote, which cost accuracy there. The options were chosen once
    for all of the evidence's sets; to change one, build the parts. Keep a reference: garbage collection removes the
    hooks.

    Args:
        model: the whole model; wrap it in DistributedDataParallel, or shard it, before.
        encoders: each modality's encoder, a module of `model` or the module's dotted name.
        optimizer: the model's optimizer, wrapped or not; learning-rate schedulers are built after this call.
        out_features: number of outputs C: classes, labels or numbers; 1 for a single logit of two classes.
        train_loader: batches `(*inputs, labels)`, or mappings with "labels" or "label", for re-learning.
        val_loader: batches of held-out samples in the same form.
        epochs: number of epochs of the run, where loaders are given.
        loss: the loss module that the loop calls, or a function of (prediction, target); None for cross-entropy.
        seed: seed of the heads' initial weights and of re-learning; None for `torch.initial_seed()` of the first rank.

    Returns:
        The composition: `loss + balance(labels)` in the loop, `step()` after each epoch, `predict(logits)` in eval
        mode, `state_dict()`, `remove()`.

    Raises:
        ValueError: for arguments that do not fit the model or the loss, one loader without the other or without
            `epochs`, or an optimizer that has a learning-rate scheduler already.
        TypeError: if an argument has another type.

    Example:
        >>> import balanceopt as bo
        >>> model = nn.ModuleDict({m: nn.Linear(2, 3) for m in ("a", "b")})
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> balance = bo.balance(model, {"a": "a", "b": "b"}, optimizer, 3)
        >>> logits = model["a"](torch.ones(4, 2)) + model["b"](torch.ones(4, 2))
        >>> balance(torch.tensor([0, 1, 2, 0])).shape, len(optimizer.param_groups)
        (torch.Size([]), 2)

    Reference:
        Wei et al., Diagnosing and Re-learning for Balanced Multimodal Learning, ECCV 2024, Table 2, for the losses and
        re-learning; the vote and the choice are ours: docs/recipe.md.
    """
    check_kind("`optimizer`", optimizer, torch.optim.Optimizer, "a torch.optim.Optimizer")
    check_count("epochs", epochs, at_least=1, or_none=True)
    loaded = [x is not None for x in (train_loader, val_loader, epochs)]
    if any(loaded) and not all(loaded):
        raise ValueError(
            "`train_loader`, `val_loader` and `epochs` should be given together, for re-learning, or none of them. "
            f"Found {sum(loaded)} of them."
        )
    if any("initial_lr" in group for group in optimizer.param_groups):
        raise ValueError(
            "`optimizer` should have no learning-rate scheduler yet: the heads' parameters become a group of it, which "
            "the scheduler would not know. Build the scheduler after bo.balance."
        )
    form = as_loss(loss)
    regression = form.rowwise and form.answers == "numbers"
    monitor = ModalityMonitor(model, encoders, loss=loss)
    try:
        objective = UnimodalObjective(monitor, out_features, seed=seed)
        scheduler = None
        if epochs is not None and not regression:
            every = max(1, epochs // _PARTS)
            scheduler = ReLearnScheduler(
                optimizer,
                monitor,
                train_loader,
                val_loader,
                every=every,
                epochs=epochs,
                equal_counts=False,  # as published and as measured: one clustering of a split
                seed=seed,
            )
        optimizer.add_param_group({"params": list(objective.parameters())})
    except BaseException:
        monitor.remove()
        raise
    return Balance(objective, scheduler)
