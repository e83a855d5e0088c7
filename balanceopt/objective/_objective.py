"""UnimodalObjective: uni-modal losses, added to the loss or injected into its gradient."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from balanceopt._options import (
    check_choice,
    check_count,
    check_flag,
    check_function,
    check_kind,
    check_number,
    check_seed,
    names_of,
    shown,
    to_tensor,
)
from balanceopt._pooling import Pool, check_pool
from balanceopt.distributed import active_group, shared_seed
from balanceopt.functional import LossFunction, vote, wide
from balanceopt.monitor import ModalityMonitor, flags_by_modality, require_scores
from balanceopt.objective._base import Objective
from balanceopt.objective._heads import HeadKind, Heads, OwnHead
from balanceopt.objective._inject import Injection, remove_handles
from balanceopt.objective._loss import UnimodalLoss, in_samples, with_modality
from balanceopt.objective._share import JointShare


class UnimodalObjective(Objective):
    r"""Uni-modal losses: train each encoder to predict the target alone, in addition to the joint loss.

    $$L = L_{\text{joint}} + \sum_m w^m L(h^m(z^m), y)$$

    with the encoders' clean features z of the latest forward (before any drop) and a linear head h for each modality:
    a separate one, trained with the model, or the modality's part of the shared head. L is the monitor's loss. In the
    loop: `loss = loss + objective(labels)`. With `inject=True` there is no call: the same gradients are added at the
    encoders' outputs during backward. Keep a reference to the objective: garbage collection removes its hooks.

    In validation and test, `objective.predict(logits)` lets the joint head and the modalities' heads vote.

    Args:
        monitor: a `ModalityMonitor` on the model.
        out_features: number of outputs C of a head: classes, labels or numbers; 1 for a single logit of two classes.
        heads: `"own"` for separate heads, with the width of the first features: give `objective.parameters()` to the
            optimizer too. `"shared"` for the shared head's uni-modal logits, `W^m z^m + b / M`, or late fusion's heads;
            in a regression these add up to the prediction, and are refused.
        weight: weight of the uni-modal losses, >= 0, or a mapping from modality to weight.
        joint: share of the joint loss's gradient that the encoders get, in [0, 1], and of the uni-modal losses'
            gradient that a shared head gets. 0 is DGL: encoders learn from the uni-modal losses alone, fusion and head
            from the joint loss alone. The forward is unchanged. Shares of several objectives multiply.
        inject: add the gradients during backward. Target and scale come from the calls of the loss, a module, on the
            joint logits; without one from the gradient at the joint logits, exact for plain cross-entropy with any
            loss scale or accumulation.
        loss: loss module, or function of (prediction, target), in place of the monitor's. A module is called as it is;
            values for each sample are averaged. None for the monitor's; where that is None, cross-entropy, averaged
            over the samples with a valid label.
        pool: reduction of features with more dimensions to `(B, D)`; `"auto"` for that of the head's input.
        seed: seed of the separate heads' initial weights; None for `torch.initial_seed()` of the first rank, read now.

    Raises:
        ValueError: for an option outside its range, or one that is incompatible with the monitor or the loss.
        TypeError: if `monitor` is no `ModalityMonitor`.
        NotImplementedError: for `inject` with a sharded shared head.

    Example:
        >>> import balanceopt as bo
        >>> model = torch.nn.ModuleDict({m: torch.nn.Linear(2, 3) for m in ("a", "b")})
        >>> monitor = bo.ModalityMonitor(model, {"a": "a", "b": "b"})
        >>> objective = bo.UnimodalObjective(monitor, out_features=5)
        >>> _ = model["a"](torch.ones(4, 2)), model["b"](torch.ones(4, 2))
        >>> objective(torch.tensor([0, 1, 2, 3])).shape
        torch.Size([])

    Reference:
        Wei et al., Diagnosing and Re-learning for Balanced Multimodal Learning, ECCV 2024, Table 2; for `joint=0` Wei
        et al., Boosting Multimodal Learning via Disentangled Gradient Learning, ICCV 2025; docs/methods/unimodal.md.
    """

    loss: nn.Module | LossFunction | None

    def __init__(
        self,
        monitor: ModalityMonitor,
        out_features: int,
        *,
        heads: HeadKind = "own",
        weight: float | Mapping[str, float] = 1.0,
        joint: float = 1.0,
        inject: bool = False,
        loss: nn.Module | LossFunction | None = None,
        pool: Pool = "auto",
        seed: int | None = None,
    ) -> None:
        _check(monitor, out_features, heads, joint)
        weights = _by_modality(monitor, weight, joint)
        check_flag("inject", inject)
        check_function("loss", loss, "(prediction, target)")
        loss = monitor.loss if loss is None else loss
        criterion = UnimodalLoss(monitor, loss, out_features, shared=heads == "shared")
        check_pool(pool)
        check_seed(seed)
        super().__init__(monitor, trains=not inject)
        self.heads: HeadKind = heads
        self._criterion = criterion
        self._weight = weights
        self.joint = float(joint)
        # Set past nn.Module.__setattr__, because the user's loss must not become a submodule.
        self.__dict__["loss"] = loss
        self.own_heads = nn.ModuleList(_made_heads(monitor, out_features, seed) if heads == "own" else [])
        self._heads = Heads(monitor, self.own_heads, out_features, pool, self.joint)
        self._injection = Injection(monitor, self._heads, weights, criterion) if inject else None
        monitor.hooks.starts.add(self._live.on_start)
        if self._injection is not None:
            weakref.finalize(self, remove_handles, self._injection.handles).atexit = False
            self._injection.hook()
        self._share = JointShare(monitor, self.joint, called=not inject and any(weights.values()))
        self._share.hook()
        self._hook(uncalled="it has no uni-modal loss" if self._injection is None else None)

    @property
    def weight(self) -> Mapping[str, float]:
        """Weight of each modality's loss, which may be set between steps: to a number for all, or a mapping."""
        return MappingProxyType(self._weight)

    @weight.setter
    def weight(self, weight: float | Mapping[str, float]) -> None:
        weights = _by_modality(self.monitor, weight, self.joint)
        if self._injection is not None and not self._injection.handles and any(weights.values()):
            raise RuntimeError(
                "`weight` can't be set above 0 where inject=True has no hooks: the objective was removed, or built "
                "with weight 0. Build it with a weight above 0."
            )
        self._weight.update(weights)

    @property
    def inject(self) -> bool:
        """Whether gradients are added during backward."""
        return self._injection is not None

    @property
    def injection(self) -> Injection | None:
        """The hooks that add gradients during backward; None without `inject=True`."""
        return self._injection

    @property
    def out_features(self) -> int:
        """Number of logits C of the heads."""
        return self._heads.out_features

    def forward(self, labels: Tensor) -> Tensor:
        """Return the weighted sum of the modalities' losses, a scalar.

        Args:
            labels: target of the loss, such as `(B,)` class indices, or `(B, C)` numbers. Class indices `(B, T)` and
                numbers `(B, T, C)` are for the positions of features `(B, T, D)`.

        Raises:
            RuntimeError: before any forward of the model, or with `inject=True`, which adds the gradient already.
            ValueError: if there is not one target for each sample, or the targets do not fit the loss, `out_features`
                or the features' positions.
            TypeError: if labels are no numbers, or the loss returns no tensor.
        """
        if self.inject:
            raise RuntimeError(
                "inject=True adds the uni-modal gradients already: leave the objective out of the loss."
            )
        target = to_tensor("labels", labels, "the loss's target, such as class indices (B,)")
        if not any(self._weight.values()):
            return torch.zeros((), dtype=torch.float32, device=target.device)
        self._share.note_call()
        features, present, samples = self._live.of_latest()
        target, positions = self._criterion.by_sample(target, samples)
        losses = []
        for name, z in features.items():
            if self._weight[name]:
                logits = self._heads.logits(name, z, len(target), present.get(name), positions)
                chosen = with_modality(logits, target, present.get(name))
                losses.append(self._weight[name] * self._criterion.mean(name, *chosen))
        if torch.is_grad_enabled():
            self._heads.warn_if_untrained()
        total = torch.stack([wide(loss) for loss in losses]).sum()
        if self.own_heads and active_group(self.monitor.group) is not None and total.requires_grad:
            total = total + self._touched(features)
            average = self._heads.average
            total.register_hook(lambda _: average.after_this_backward())
        return total

    @torch.no_grad()
    def predict(self, logits: Tensor, *, present: Mapping[str, Tensor] | None = None) -> Tensor:
        r"""Return the vote of the joint head and the modalities' heads, in place of the joint logits, in eval mode.

        $$\log p(c) = \frac{1}{1 + n} \Big(f(c) + \sum_m h^m(z^m)(c)\Big) + \text{const}$$

        with the joint logits f of the model's latest forward in eval mode, and its features z of n modalities. A
        modality leaves the vote whose `weight` is 0, whose encoder was not called in that forward, or, for a sample,
        that `present` says is missing. Where a modality is missing the joint head, which was trained on all of them,
        leaves it too, unless nobody else is left. Nothing is trained, no training score changes, and no rank waits for
        another.

        Args:
            logits: what the model returned, in any form that ends in the C outputs: `(B, C)`, `(B, T, C)` for positions
                T of features `(B, T, D)`; with one output `(B,)` too.
            present: bool `(B,)` by modality, for batches in which some samples lack a modality.

        Returns:
            In the shape of `logits`, float32 or wider, and usable like them: log-probabilities of classes, or logits of
            labels and of two classes in one logit.

        Raises:
            RuntimeError: if no forward in eval mode came before, or the heads were never trained.
            ValueError: for a regression, whose numbers do not vote, and a loss that is a function; for logits or flags
                of another shape.
            TypeError: if `logits` is no tensor, or `present` no mapping to flags.
            KeyError: if `present` names an unknown modality.

        Example:
            >>> import balanceopt as bo
            >>> model = torch.nn.ModuleDict({m: torch.nn.Linear(2, 3) for m in ("a", "b")})
            >>> objective = bo.UnimodalObjective(bo.ModalityMonitor(model, {"a": "a", "b": "b"}), out_features=3)
            >>> logits = model["a"](torch.ones(4, 2)) + model["b"](torch.ones(4, 2))  # a training forward
            >>> _ = objective(torch.tensor([0, 1, 2, 0])), model.eval()
            >>> logits = model["a"](torch.ones(5, 2)) + model["b"](torch.ones(5, 2))
            >>> objective.predict(logits).exp().sum(1)
            tensor([1., 1., 1., 1., 1.])

        Reference:
            `functional.vote`; docs/methods/unimodal.md.
        """
        answers = self._criterion.voted()
        rows = self._criterion.as_rows(logits)
        samples, positions = len(rows), rows.shape[1:-1].numel()
        flags = {} if present is None else flags_by_modality(present, self.monitor.modalities, samples)
        every = torch.ones(samples, dtype=torch.bool, device=rows.device)
        features = self._live.of_evaluation()
        complete = every if features.keys() == set(self.monitor.modalities) else ~every
        voters, here = [wide(rows)], []
        for name, z in features.items():
            flag = flags[name].to(rows.device) if name in flags else every
            complete = complete & flag
            if self._weight[name] and len(z):
                answer = self._heads.trained_logits(name, z, samples, flags.get(name), positions)
                voters.append(in_samples(wide(answer).to(rows.device), flag, samples).view(rows.shape))
                here.append(flag)
        alone = ~torch.stack(here).any(0) if here else every
        dtype = torch.float64 if any(x.dtype == torch.float64 for x in voters) else torch.float32
        votes = torch.stack([x.to(dtype) for x in voters])
        return vote(votes, torch.stack([complete | alone, *here]), answers).view(logits.shape)

    def head_of(self, name: str) -> nn.Linear:
        """Return the separate head of the modality `name`."""
        return self._heads.of(name)

    def unimodal_logits(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the heads' logits `(B, C)` of features by modality, so that a monitor makes scores of them.

        The monitor comes first: `ModalityMonitor(..., scores=lambda features: objective.unimodal_logits(features))`.
        """
        return {name: self._heads.logits(name, z) for name, z in features.items()}

    def remove(self) -> None:
        """Remove every hook. May be called twice."""
        super().remove()
        self.monitor.hooks.starts.drop(self._live.on_start)
        self._share.remove()
        if self._injection is not None:
            self._injection.remove()

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load the separate heads' weights. A load that fails changes nothing.

        Args:
            state_dict: result of `state_dict()`.
            strict: raise for missing or unknown entries.
            assign: assign the tensors instead of copying, as in `nn.Module`.

        Raises:
            TypeError: if `state_dict` is no mapping to tensors.
            KeyError: if entries are missing or unknown.
            ValueError: for weights of another shape.
        """
        check_kind("the state of an objective", state_dict, Mapping, "what state_dict() returned, a mapping")
        entries = {f"own_heads.{name}": p for name, p in self.own_heads.named_parameters()}
        different = entries.keys() ^ state_dict.keys()
        if strict and different:
            raise KeyError(
                f"the state of an objective should hold {names_of(entries)}. Differing: {names_of(different)}."
            )
        for name in entries.keys() & state_dict.keys():
            value, current = state_dict[name], entries[name]
            check_kind(f"the state's {name!r}", value, Tensor, "a tensor")
            if not is_lazy(current):
                shape = tuple(current.shape)
            elif name.endswith("weight"):  # a lazy weight fits any width
                shape = (self.out_features, value.shape[-1] if value.dim() else 0)
            else:
                shape = (self.out_features,)
            if value.shape != shape or not value.is_floating_point():
                raise ValueError(
                    f"the state's {name!r} should be floating, of shape {shape}. Found {shown(value)}."
                )
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def extra_repr(self) -> str:
        """Return the options for `repr`."""
        return f"heads={self.heads!r}, weight={self._weight}, joint={self.joint:g}, inject={self.inject}"

    def __getstate__(self) -> dict[str, Any]:
        share = JointShare(self.monitor, self.joint, called=False)
        return {**super().__getstate__(), "_share": share, "_injection": None}

    def _touched(self, features: Mapping[str, Tensor]) -> Tensor:
        """Return 0 with a gradient for heads unused in this rank's batch, so that ranks average the same heads."""
        names = [n for n in self.monitor.modalities if n not in features or not self._weight[n]]
        unused = [p for name in names for p in self._heads.of(name).parameters()]
        built = [p.sum() for p in unused if not nn.parameter.is_lazy(p)]
        return 0.0 * torch.stack(built).sum() if built else torch.zeros((), dtype=torch.float32, device="cpu")


def _made_heads(monitor: ModalityMonitor, out_features: int, seed: int | None) -> list[nn.Module]:
    chosen = shared_seed(monitor.group, seed)
    first = next(p for params in monitor.parameters.values() for p in params)
    dtype = torch.promote_types(first.dtype, torch.float32).to_real()
    seeds = [(chosen + i) % 2**63 for i in range(len(monitor.modalities))]
    return [OwnHead(out_features, seed, first.device, dtype) for seed in seeds]


def _check(monitor: ModalityMonitor, out_features: int, heads: str, joint: float) -> None:
    """Check the constructor's arguments."""
    check_kind("`monitor`", monitor, ModalityMonitor, "a ModalityMonitor")
    check_count("out_features", out_features, at_least=1)
    check_choice("heads", heads, get_args(HeadKind))
    if heads == "shared":
        require_scores(monitor, "UnimodalObjective(heads='shared')")
    check_number("joint", joint, at_least=0, at_most=1)


def _by_modality(
    monitor: ModalityMonitor, weight: float | Mapping[str, float], joint: float
) -> dict[str, float]:
    """Return the weights by modality, checked."""
    weights = dict(weight) if isinstance(weight, Mapping) else dict.fromkeys(monitor.modalities, weight)
    unknown = weights.keys() - set(monitor.modalities)
    if unknown:
        raise ValueError(
            f"`weight` should be given by modality {monitor.modalities}. Found {names_of(unknown)}."
        )
    for value in weights.values():
        check_number("weight", value, at_least=0)
    result = {name: float(weights.get(name, 0.0)) for name in monitor.modalities}
    trained = {name: any(p.requires_grad for p in params) for name, params in monitor.parameters.items()}
    untaught = [name for name, value in result.items() if not value and trained[name]]
    if joint == 0 and untaught:
        raise ValueError(
            f"`weight` should be above 0 for every trained encoder with joint=0. Found 0 for {names_of(untaught)}: "
            "they would get no gradient. Give a weight, freeze these encoders, or pass joint=1."
        )
    return result
