"""Scheduler that sets the weights of uni-modal losses by how much the heads gain and overfit."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from balanceopt._options import check_count, check_entries, check_kind, check_number, shown
from balanceopt._sharding import local_part
from balanceopt._warnings import WarnOnce
from balanceopt.distributed import sum_over_ranks
from balanceopt.functional import blend_weights
from balanceopt.objective import UnimodalObjective
from balanceopt.probes import ProbeLosses, ProbeMonitor
from balanceopt.relearn._base import EpochMethod

_NO_PASSES = {
    "train": "no training pass with targets came since the last step",
    "val": (
        "no validation came since the last step: run the model on held-out samples in eval mode before step(), and "
        "let their targets be seen, by monitor.observe(labels), a loss module that the monitor watches, or the "
        "model's labels=; one target for each sample"
    ),
}


class BlendScheduler(EpochMethod):
    r"""Gradient blending: weigh each head's loss by its ratio of generalisation to overfitting, between epochs.

    $$w_k \propto G_k / O_k^2, \qquad G_k = V_k(N) - V_k(N + n), \qquad
    O_k = (V_k - T_k)(N + n) - (V_k - T_k)(N)$$

    with training losses T and validation losses V of the uni-modal heads and the joint one over a super-epoch of n
    epochs. The weights of the objective become \(w_m / w_{\text{joint}}\), so that the joint loss, which is the
    loop's, keeps weight 1: the paper's blend but for the learning rate.

    A variation of the paper, which trains a copy of each head alone to measure its losses: here they are those of
    linear probes in the joint run itself, and cost nothing beyond the probes.

    `step()` comes after each epoch's training and validation. The losses are measured after the first epoch and then
    after each `every` epochs; the weights are set from the second measure on. A head whose validation loss rose has
    weight 0; where all rose, the weights stay. They stay too, with a warning, where a loss is missing or not finite,
    and the next measure is compared with the last complete one.

    Args:
        objective: a `UnimodalObjective` with `joint=1`, in the loop or injected; its weights until the first blend.
        probes: a `ProbeMonitor(monitor, losses=True)` on the objective's monitor, for this scheduler alone.
        every: number n of epochs of a super-epoch, >= 1.
        floor: the least |O| as a share of the largest one, in [0.001, 1].
        min_joint: the least w of the joint loss, in (0, 1]: the objective's weights sum to at most 1 / `min_joint`.

    Raises:
        ValueError: for an option outside its range, an objective with a share `joint` below 1 or weights of 0 only, or
            probes on another monitor.
        TypeError: if `objective` or `probes` has another type.

    Example:
        >>> import balanceopt as bo
        >>> model = torch.nn.ModuleDict({m: torch.nn.Linear(2, 3) for m in ("a", "b", "head")})
        >>> monitor = bo.ModalityMonitor(model, {"a": "a", "b": "b"}, head="head")
        >>> objective = bo.UnimodalObjective(monitor, out_features=5)
        >>> bo.BlendScheduler(objective, bo.ProbeMonitor(monitor, losses=True), every=5)
        BlendScheduler(every=5, floor=0.1, min_joint=0.1)

    Reference:
        Wang, Tran, Feiszli, What Makes Training Multi-Modal Classification Networks Hard?, CVPR 2020,
        Proposition 1 and Algorithm 1; docs/methods/blending.md.
    """

    def __init__(
        self,
        objective: UnimodalObjective,
        probes: ProbeMonitor,
        *,
        every: int = 10,
        floor: float = 0.1,
        min_joint: float = 0.1,
    ) -> None:
        check_kind("`objective`", objective, UnimodalObjective, "a UnimodalObjective")
        check_kind("`probes`", probes, ProbeMonitor, "a ProbeMonitor")
        check_count("every", every, at_least=1)
        check_number("floor", floor, at_least=0.001, at_most=1)
        check_number("min_joint", min_joint, above=0, at_most=1)
        if objective.joint != 1 or not any(objective.weight.values()):
            raise ValueError(
                "`objective` should have joint=1, since the joint loss is one of those that are weighed, and a weight "
                f"above 0 to begin with. Found joint={objective.joint:g} and weight={dict(objective.weight)}."
            )
        if probes.monitor is not objective.monitor or not probes.losses:
            raise ValueError(
                "`probes` should be built with the objective's monitor and losses=True. Found "
                f"{'losses=False' if probes.monitor is objective.monitor else 'another monitor'}."
            )
        super().__init__(objective.monitor)
        self.objective = objective
        self.probes = probes
        self.every = every
        self.floor = float(floor)
        self.min_joint = float(min_joint)
        self._before: ProbeLosses | None = None
        self._warned = WarnOnce()

    def step(self) -> dict[str, float] | None:
        """Count an epoch; measure the losses where that is due, and set the objective's weights.

        On several ranks it is a collective, and the weights are the same on all ranks.

        Returns:
            The objective's weights by modality at the end of a super-epoch; None after other epochs.

        Raises:
            RuntimeError: if a measure is due, and no training or no validation pass came since the last step; if the
                objective was removed.
        """
        weights: dict[str, float] | None = super().step()
        return weights

    def run(self, epoch: int) -> dict[str, float] | None:
        """Measure the losses after an epoch where that is due, and set the objective's weights."""
        losses = self.probes.take_losses()  # in every epoch, so that they are those of the epoch alone
        if epoch % self.every:
            return None
        for split, values in losses._asdict().items():
            # A model that diverged gives no losses either.
            if bool(values.isnan().all()) and not self._diverged():
                raise RuntimeError(f"BlendScheduler can't compare losses: {_NO_PASSES[split]}.")
        if not bool(torch.isfinite(torch.stack(losses)).all()):
            self._skip(losses)
            return None
        before = self._before
        self.attempt.note(partial(vars(self).update, _before=before))
        self._before = losses
        if before is None:
            return None
        w = blend_weights(before.train, losses.train, before.val, losses.val, floor=self.floor)
        names = self.monitor.modalities
        if bool(w.any()):
            weights = dict(zip(names, (w[:-1] / w[-1].clamp(min=self.min_joint)).tolist(), strict=True))
            self.attempt.note(partial(setattr, self.objective, "weight", dict(self.objective.weight)))
            self.objective.weight = weights
        gain, gap = before.val - losses.val, losses.val - losses.train - (before.val - before.train)
        in_use = torch.tensor(list(self.objective.weight.values()), dtype=torch.float64, device="cpu")
        for quantity, values in (("loss_weight", in_use), ("gain", gain[:-1]), ("overfitting", gap[:-1])):
            self.report(epoch + 1, quantity, names, values)
        return dict(self.objective.weight)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of epochs, the objective's weights and the losses of the last measure."""
        before = self._before
        return {
            **super().state_dict(),
            "weight": dict(self.objective.weight),
            "losses": None if before is None else torch.stack(before),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of a checkpoint, and set the objective's weights; a load that fails changes nothing.

        The probes have a state of their own.

        Args:
            state: from `state_dict()`.

        Raises:
            ValueError: if weights or losses are not those of the objective's modalities.
            TypeError, KeyError: if `state` is not a scheduler's state.
            RuntimeError: if the objective was removed.
        """
        self.check_state(state)
        self.objective.weight = state["weight"]
        super().load_state_dict(state)
        losses = state["losses"]
        self._before = None if losses is None else ProbeLosses(*losses.detach().cpu().double().clone())

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise where `load_state_dict` would, before anything changes."""
        super().check_state(state)
        check_entries("the state of BlendScheduler", state, ("weight", "losses"))
        names = self.monitor.modalities
        check_entries("the state's 'weight'", state["weight"], names)
        if len(state["weight"]) != len(names):
            raise ValueError(
                f"the state's 'weight' should be of {names}. Found {sorted(map(str, state['weight']))}."
            )
        for value in state["weight"].values():
            check_number("weight", value, at_least=0)
        losses, shape = state["losses"], (2, len(names) + 1)
        if losses is None:
            return
        check_kind("the state's 'losses'", losses, Tensor, "a tensor, or None")
        if losses.shape != shape or not losses.is_floating_point():
            raise ValueError(
                f"the state's 'losses' should be floating, of shape {shape}. Found {shown(losses)}."
            )

    def options(self) -> dict[str, Any]:
        """Return the named options for `repr`."""
        return {name: getattr(self, name) for name in ("every", "floor", "min_joint")}

    def _diverged(self) -> bool:
        """Whether a weight of the model is not finite, on any rank."""
        weights = [local_part(p.detach()) for p in self.monitor.model.parameters()]
        broken = torch.stack(
            [(~torch.isfinite(w)).any().double().to(weights[0].device) for w in weights]
        ).sum()
        return bool(sum_over_ranks(broken, self.monitor.group))

    def _skip(self, losses: ProbeLosses) -> None:
        """Count and warn of a measure that can't be used."""
        self.count(unusable_losses=torch.ones((), dtype=torch.int64, device="cpu"))
        unusable = ~torch.isfinite(torch.stack(losses)).all(0)
        heads = [
            name
            for name, bad in zip((*self.monitor.modalities, "joint"), unusable.tolist(), strict=True)
            if bad
        ]
        self._warned(
            "unusable",
            f"BlendScheduler leaves the weights as they are: the losses of {heads} are missing or not finite. Likely "
            "causes: a modality without samples in training or validation, a joint head with other rows than the "
            "targets, or a model that diverged.",
        )
