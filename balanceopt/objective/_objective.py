"""UnimodalObjective: uni-modal losses, added to the loss or injected into its gradient."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from balanceopt._pooling import Pool, check_pool, pool_features
from balanceopt.distributed import active_group, shared_seed
from balanceopt.monitor import ModalityMonitor
from balanceopt.objective._average import GradientAverage
from balanceopt.objective._features import LiveFeatures
from balanceopt.objective._heads import OwnHead, answer, build
from balanceopt.objective._inject import Injection
from balanceopt.objective._losses import Loss, as_target, loss_of, mean_cross_entropy, widened

Heads = Literal["own", "shared"]


class UnimodalObjective(nn.Module):
    r"""Ask each encoder for the class by itself, too.

    $$L = L_{\text{joint}} + \sum_m w^m L(h^m(z^m), y)$$

    with the encoders' clean features z of the latest forward (before any drop) and a linear head h for each modality:
    its own, trained with the rest, or the part of the shared head that belongs to it. In the loop:
    `loss = loss + objective(labels)`. With `inject=True` nothing is called: the same gradients are added while backward
    passes through the encoders' outputs.

    Args:
        monitor: a `ModalityMonitor` on the model.
        out_features: C of the own heads' logits; 1 for a single logit of two classes.
        heads: `"own"`: give `objective.parameters()` to the optimizer too; `"shared"`: the shared head's uni-modal
            logits, `W^m z^m + b / M` or a late fusion's own head.
        weight: of these losses, or a mapping from modality to it.
        inject: add the gradients during backward. Labels and scale come from the gradient at the joint logits (exact
            for plain cross-entropy, whatever the loss scale or accumulation), or from `loss`.
        feature_dims: width of each modality's features, to build own heads now; else their first features tell it, and
            optimizers take the parameters before that.
        loss: function of (logits, labels); None for cross-entropy, averaged over the samples that count. With `inject`
            the very loss module that the loop calls on the joint logits.
        pool: makes `(B, D)` of features with more dimensions; `"auto"` is as the head gets them.
        seed: of the own heads' initial weights; None for `torch.initial_seed()` of the first rank, read now.

    Raises:
        ValueError: for an option outside its range, or one that does not go with the monitor.
        TypeError: if `monitor` is no `ModalityMonitor`.
        NotImplementedError: for `inject` with the shared head where it is sharded.

    Example:
        >>> import balanceopt as bo
        >>> model = torch.nn.ModuleDict({m: torch.nn.Linear(2, 3) for m in ("a", "b")})
        >>> monitor = bo.ModalityMonitor(model, {"a": "a", "b": "b"})
        >>> objective = bo.UnimodalObjective(monitor, out_features=5)
        >>> _ = model["a"](torch.ones(4, 2)), model["b"](torch.ones(4, 2))
        >>> objective(torch.tensor([0, 1, 2, 3])).shape
        torch.Size([])

    Reference:
        Wei et al., Diagnosing and Re-learning for Balanced Multimodal Learning, ECCV 2024, Table 2.
    """

    monitor: ModalityMonitor
    loss: Loss | None

    def __init__(
        self,
        monitor: ModalityMonitor,
        out_features: int,
        *,
        heads: Heads = "own",
        weight: float | Mapping[str, float] = 1.0,
        inject: bool = False,
        feature_dims: Mapping[str, int] | None = None,
        loss: Loss | None = None,
        pool: Pool = "auto",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        weights = _checked(monitor, out_features, heads, weight, feature_dims)
        check_pool(pool)
        self.out_features = out_features
        self.heads: Heads = heads
        self.weight = weights
        self.pool: Pool = pool
        # Not as attributes of a module: the user's loss and model are no parts of this one.
        self.__dict__.update(monitor=monitor, loss=loss)
        self.own_heads = nn.ModuleList(self._made_heads(seed) if heads == "own" else [])
        for name, width in (feature_dims or {}).items():
            build(self.head_of(name), width)
        self._average = GradientAverage(self.own_heads.parameters(), monitor.group)
        self._live: LiveFeatures | None = None if inject else LiveFeatures(monitor)
        self._injection = Injection(self, monitor) if inject else None

    @property
    def inject(self) -> bool:
        """Whether gradients are added during backward."""
        return self._injection is not None

    def forward(self, labels: Tensor) -> Tensor:
        """The weighted sum of the modalities' losses, a scalar.

        Args:
            labels: `(B,)` class indices, or what `loss` takes.

        Raises:
            RuntimeError: before any forward of the model, or with `inject=True`, which adds the gradient already.
            ValueError: if labels are not one for each sample.
        """
        if self._live is None:
            raise RuntimeError(
                "inject=True adds the uni-modal gradients already: leave the objective out of the loss."
            )
        if not any(self.weight.values()):
            return torch.zeros((), device=labels.device)
        features, present = self._live.of_latest()
        losses = [
            self.weight[name] * self._loss(name, z, labels, present.get(name))
            for name, z in features.items()
            if self.weight[name]
        ]
        total = torch.stack([widened(loss) for loss in losses]).sum()
        if self.own_heads and active_group(self.monitor.group) is not None and total.requires_grad:
            total = total + self._touched(features)
            total.register_hook(lambda _: self._average.after_this_backward())
        return total

    def unimodal_logits(self, name: str, features: Tensor) -> Tensor:
        """What the modality's head answers to its features `(B, ...)`, attached to the graphs of both."""
        if self.heads == "shared":
            logits = self.monitor.live_logits(name, features)
            if logits.shape[-1] != self.out_features:
                raise ValueError(
                    f"`out_features` should be that of the shared head, {logits.shape[-1]}. "
                    f"Found {self.out_features}."
                )
            return logits
        vectors = pool_features(features, self.pool, self.monitor.projection(name))
        return answer(self.head_of(name), vectors, name)

    def head_of(self, name: str) -> nn.Linear:
        """A modality's own head."""
        head = self.own_heads[self.monitor.modalities.index(name)]
        assert isinstance(head, nn.Linear)
        return head

    def remove(self) -> None:
        """Stop listening to the monitor. May be called twice."""
        if self._live is not None:
            self._live.remove()
        if self._injection is not None:
            self._injection.remove()

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"heads={self.heads!r}, weight={self.weight}, inject={self.inject}"

    def __enter__(self) -> UnimodalObjective:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _loss(self, name: str, features: Tensor, labels: Tensor, present: Tensor | None) -> Tensor:
        logits = self.unimodal_logits(name, features)
        if present is not None:
            rows = present.to(logits.device).nonzero()[:, 0]
            labels = labels.to(logits.device)[rows]
            logits = logits[rows]
        if self.loss is None:
            return mean_cross_entropy(logits, as_target(labels, logits, name), self.monitor.ignore_index)
        if len(logits) == 0:
            return logits.sum()
        return loss_of(self.loss, logits, labels.to(logits.device))

    def _touched(self, features: Mapping[str, Tensor]) -> Tensor:
        """Zero, with a gradient for the heads that this rank's batch left out: ranks average the same heads."""
        names = [n for n in self.monitor.modalities if n not in features or not self.weight[n]]
        unused = [p for name in names for p in self.head_of(name).parameters()]
        built = [p.sum() for p in unused if not nn.parameter.is_lazy(p)]
        return 0.0 * torch.stack(built).sum() if built else torch.zeros(())

    def _made_heads(self, seed: int | None) -> list[nn.Module]:
        chosen = shared_seed(self.monitor.group, seed)
        device = next(p.device for own in self.monitor.parameters.values() for p in own)
        return [
            OwnHead(self.out_features, (chosen + i) % 2**63, device)
            for i in range(len(self.monitor.modalities))
        ]


def _checked(
    monitor: ModalityMonitor,
    out_features: int,
    heads: Heads,
    weight: float | Mapping[str, float],
    feature_dims: Mapping[str, int] | None,
) -> dict[str, float]:
    """Each modality's weight, if all arguments fit."""
    if not isinstance(monitor, ModalityMonitor):
        raise TypeError(f"`monitor` should be a ModalityMonitor. Found {type(monitor).__name__}.")
    if out_features < 1:
        raise ValueError(f"`out_features` should be at least 1. Found {out_features}.")
    if heads not in get_args(Heads):
        raise ValueError(f"`heads` should be one of {get_args(Heads)}. Found {heads!r}.")
    if heads == "shared":
        monitor.expect_scores("UnimodalObjective(heads='shared')")
    for given, option in ((weight, "weight"), (feature_dims or {}, "feature_dims")):
        unknown = given.keys() - set(monitor.modalities) if isinstance(given, Mapping) else set()
        if unknown:
            raise ValueError(
                f"`{option}` should be given by modality {monitor.modalities}. Found {sorted(unknown)}."
            )
    if feature_dims and heads == "shared":
        raise ValueError("`feature_dims` is for own heads. Found heads='shared'.")
    weights = dict(weight) if isinstance(weight, Mapping) else dict.fromkeys(monitor.modalities, weight)
    if not all(w >= 0 for w in weights.values()):
        raise ValueError(f"`weight` should be non-negative. Found {weight}.")
    return {name: float(weights.get(name, 0.0)) for name in monitor.modalities}
