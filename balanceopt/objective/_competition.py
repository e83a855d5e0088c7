"""CompetitionObjective: MCR's game between encoders for influence on the joint prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from balanceopt._options import (
    check_choice,
    check_count,
    check_entries,
    check_kind,
    check_number,
    names_of,
)
from balanceopt._random import generator_for, mixed
from balanceopt.distributed import shared_seed
from balanceopt.functional import derangement, permutation_divergence, wide
from balanceopt.monitor import ModalityMonitor, two_classes
from balanceopt.objective._additive import additive_logits, check_classes, logits_by_sample
from balanceopt.objective._base import Objective

Strategy = Literal["greedy", "independent", "collaborative"]

# Factor k on the gradient of the other modalities' terms in each encoder.
_FACTORS = {"greedy": -1, "independent": 0, "collaborative": 1}
_STATE = "_extra_state"


class CompetitionObjective(Objective):
    r"""MCR's competition term: train each encoder for its influence on the joint prediction.

    $$L = \sum_m L^m, \qquad
    L^m = -\frac{1}{B} \sum_i JS\left(p(y \mid z_i),\ p(y \mid z_i, z^m_i \to z^m_{\pi(i)})\right)$$

    with the encoders' clean features z of the latest training forward, and a random permutation \(\pi\) that leaves no
    sample in its place. The gradient of encoder m is that of \(L^m + k \sum_{j \ne m} L^j\); with the greedy k = -1 an
    encoder works against the others' influence too. The shared head gets the gradient of L. In the loop:
    `loss = loss + competition()`.

    The joint logits must be a sum over modalities: a linear head on concatenated features, or a head for each modality.
    Permuted predictions are then made of the logits, without a run of the fusion. Labels play no role. A sample that
    lacks a modality (`monitor.observe(labels, present=...)`) takes no part in its permutation and in its mean. Each
    call, and with several ranks each rank's part of the batch, is permuted by itself. Keep a reference to the
    objective: garbage collection removes its hooks.

    Args:
        monitor: a `ModalityMonitor` on the model.
        weight: factor on the term, >= 0; at 0 the term is a plain 0.
        strategy: what each encoder does about the others' terms: `"greedy"` (k = -1), `"independent"` (k = 0) or
            `"collaborative"` (k = 1).
        samples: number of permutations for each modality and call, over which the divergence is averaged.
        seed: seed of the permutations; None for `torch.initial_seed()` of the first rank, read now.

    Attributes:
        calls: number of calls so far, the step of the permutations' random numbers.

    Raises:
        ValueError: for an option outside its range; for a monitor without a head, of another loss than cross-entropy,
            or of a fusion whose logits are no sum over modalities, which may show in the first call only.
        TypeError: if `monitor` is no `ModalityMonitor`.

    Example:
        >>> import balanceopt as bo
        >>> model = torch.nn.ModuleDict({m: torch.nn.Linear(2, 3) for m in ("a", "b")})
        >>> model["head"] = torch.nn.Linear(6, 5)
        >>> monitor = bo.ModalityMonitor(model, {"a": "a", "b": "b"}, head="head")
        >>> bo.CompetitionObjective(monitor, strategy="independent")
        CompetitionObjective(weight=1, strategy='independent', samples=1)

    Reference:
        Kontras et al., Balancing Multimodal Training Through Game-Theoretic Regularization, NeurIPS 2025, its term
        MIPD; docs/methods/mcr.md.
    """

    def __init__(
        self,
        monitor: ModalityMonitor,
        *,
        weight: float = 1.0,
        strategy: Strategy = "greedy",
        samples: int = 1,
        seed: int | None = None,
    ) -> None:
        check_kind("`monitor`", monitor, ModalityMonitor, "a ModalityMonitor")
        check_number("weight", weight, at_least=0)
        check_choice("strategy", strategy, get_args(Strategy))
        check_count("samples", samples, at_least=1)
        check_classes(monitor, "the divergence is between distributions over classes")
        additive_logits(monitor, "CompetitionObjective")
        super().__init__(monitor)
        self.weight = float(weight)
        self.strategy: Strategy = strategy
        self.samples = int(samples)
        self.seed = shared_seed(monitor.group, seed)
        self.calls = 0
        self._hook(uncalled="it takes no part in the competition")

    def forward(self) -> Tensor:
        """Return the weight times the term of the latest training forward, a scalar in float32 or wider.

        Raises:
            RuntimeError: before a training forward of the model, or without gradients; before a forward has shown how
                features become the head's input.
            ValueError: for logits with several positions (tokens, pixels) a sample; for a fusion whose logits are no
                sum over modalities.
        """
        if not self.weight:
            device = next(self.monitor.model.parameters()).device
            return torch.zeros((), dtype=torch.float32, device=device)
        if not torch.is_grad_enabled():
            raise RuntimeError(
                "competition() needs gradients: it trains encoders, and is no measure of them. Leave it out of the "
                "loss in validation."
            )
        features, present, _ = self._live.of_latest()
        logits = self._joint_logits()
        own = self._parts(features, present, len(logits), 1)
        factor = _FACTORS[self.strategy]
        others = own if factor == 1 else self._parts(features, present, len(logits), factor)
        # What else the logits are made of: columns and bias that belong to no encoder of the pass.
        rest = logits - torch.stack(list(own.values())).sum(0).detach()
        divergences = []
        for name, part in own.items():
            joint = rest + torch.stack(list({**others, name: part}.values())).sum(0)
            divergences.append(self._divergence(name, joint, part, present.get(name)))
        self.calls += 1
        return -self.weight * torch.stack(divergences).sum()

    def get_extra_state(self) -> dict[str, int]:
        """Return the seed and the number of calls, with which a resumed run draws the same permutations."""
        return {"calls": self.calls, "seed": self.seed}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Load what `get_extra_state` returned. A state that is refused changes nothing.

        Raises:
            TypeError, KeyError, ValueError: if `state` is no state of this class.
        """
        check_entries("the state of CompetitionObjective", state, ("calls", "seed"))
        check_count("calls", state["calls"])
        check_count("seed", state["seed"])
        self.calls, self.seed = int(state["calls"]), int(state["seed"])

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load seed and number of calls. A load that fails changes nothing.

        Args:
            state_dict: result of `state_dict()`.
            strict: raise for unknown entries.
            assign: no effect, as in an `nn.Module` without tensors.

        Raises:
            TypeError, KeyError, ValueError: if `state_dict` is no state of this class.
        """
        check_entries("the state of CompetitionObjective", state_dict, (_STATE,))
        if strict and len(state_dict) > 1:
            raise KeyError(
                f"the state of CompetitionObjective should hold [{_STATE!r}] only. Found {names_of(state_dict)}."
            )
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def extra_repr(self) -> str:
        """Return the options for `repr`."""
        return f"weight={self.weight:g}, strategy={self.strategy!r}, samples={self.samples}"

    def _joint_logits(self) -> Tensor:
        """Return the model's own logits `(B, C)` of the features' pass, in float32 or wider."""
        current = self._live.current
        if current is None or current.logits is None:
            raise RuntimeError(
                "competition() needs the joint logits of a training forward: call it after the model, with the model "
                "in training mode (or the monitor with train_only=False)."
            )
        if len(current.logits) != current.samples:
            raise ValueError(
                f"the joint logits should be one row for each sample. Found {len(current.logits)} rows for "
                f"{current.samples} samples: predictions at several positions (tokens, pixels) are not supported."
            )
        return wide(current.logits)

    def _parts(
        self, features: Mapping[str, Tensor], present: Mapping[str, Tensor], samples: int, factor: int
    ) -> dict[str, Tensor]:
        """Return each modality's part `(B, C)` of the logits, with `factor` on the gradient of the features."""
        unimodal = additive_logits(self.monitor, "CompetitionObjective")
        parts = {}
        for name, z in features.items():
            of_sample = present.get(name)
            rows = logits_by_sample(self.monitor, unimodal, name, _with_factor(z, factor), samples, of_sample)
            parts[name] = wide(rows)
        return parts

    def _divergence(self, name: str, joint: Tensor, part: Tensor, present: Tensor | None) -> Tensor:
        """Return the mean divergence, over samples with the modality, of the joint prediction from permuted ones."""
        index = torch.arange(len(joint), dtype=torch.int64, device=joint.device)
        total, count = joint.new_zeros(()), joint.new_zeros(())
        for number in range(self.samples):
            stream = mixed(self.monitor.modalities.index(name), number)
            generator = generator_for(self.seed, self.calls, stream, joint.device)
            permutation = derangement(len(joint), generator, present)
            # As a difference, so that a modality without a part in the logits changes no bit.
            permuted = joint + (part[permutation] - part)
            values = permutation_divergence(two_classes(joint), two_classes(permuted))
            moved = permutation != index
            total = total + torch.where(moved, values, 0).sum()
            count = count + moved.sum()
        return total / count.clamp(min=1)


def _with_factor(x: Tensor, factor: int) -> Tensor:
    """Return a tensor of the same values through which `factor` (1, 0 or -1) times the gradient goes back."""
    if factor == 0:
        return x.detach()
    if factor == 1 or not x.requires_grad:
        return x
    result = x.view_as(x)
    result.register_hook(torch.neg)
    return result
