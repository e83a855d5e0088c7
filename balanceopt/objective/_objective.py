"""UnimodalObjective: uni-modal losses, added to the loss or injected into its gradient."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from types import TracebackType
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
from balanceopt._torch import holds_compiled_code, in_backward
from balanceopt.distributed import active_group, shared_seed
from balanceopt.monitor import COMPILED, CallWatch, ModalityMonitor, Pass, require_scores
from balanceopt.objective._heads import (
    HeadKind,
    Heads,
    Loss,
    OwnHead,
    as_target,
    loss_of,
    mean_cross_entropy,
    widened,
)
from balanceopt.objective._inject import Injection, remove_handles


class UnimodalObjective(nn.Module):
    r"""Ask each encoder for the class by itself, too.

    $$L = L_{\text{joint}} + \sum_m w^m L(h^m(z^m), y)$$

    with the encoders' clean features z of the latest forward (before any drop) and a linear head h for each modality:
    its own, trained with the rest, or the part of the shared head that belongs to it. In the loop:
    `loss = loss + objective(labels)`. With `inject=True` nothing is called: the same gradients are added while backward
    passes through the encoders' outputs. Keep a reference to it: one that is garbage-collected takes its hooks off.

    Args:
        monitor: a `ModalityMonitor` on the model.
        out_features: C of the own heads' logits; 1 for a single logit of two classes.
        heads: `"own"`: give `objective.parameters()` to the optimizer too; the first features give their width.
            `"shared"`: the shared head's uni-modal logits, `W^m z^m + b / M` or a late fusion's own head.
        weight: of these losses, or a mapping from modality to it.
        inject: add the gradients during backward. Labels and scale come from the gradient at the joint logits (exact
            for plain cross-entropy, whatever the loss scale or accumulation), or from `loss`.
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
        heads: HeadKind = "own",
        weight: float | Mapping[str, float] = 1.0,
        inject: bool = False,
        loss: Loss | None = None,
        pool: Pool = "auto",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        weights = _checked(monitor, out_features, heads, weight)
        check_flag("inject", inject)
        check_function("loss", loss, "(logits, labels)")
        check_pool(pool)
        check_seed(seed)
        self.heads: HeadKind = heads
        self.weight = weights
        # Not as attributes of a module: the user's loss and model are no parts of this one.
        self.__dict__.update(monitor=monitor, loss=loss)
        self.own_heads = nn.ModuleList(_made_heads(monitor, out_features, seed) if heads == "own" else [])
        self._heads = Heads(monitor, self.own_heads, out_features, pool)
        self._live = LiveFeatures(monitor)
        self._injection = Injection(monitor, self._heads, weights, loss) if inject else None
        if self._injection is None:
            monitor.hooks.outputs.add(self._live.on_output)
            self._live.watch = CallWatch(monitor, None, "it has no uni-modal loss")
            weakref.finalize(self, self._live.watch.remove).atexit = False
        else:
            weakref.finalize(self, remove_handles, self._injection.handles).atexit = False
            self._injection.hook()

    @property
    def inject(self) -> bool:
        """Whether gradients are added during backward."""
        return self._injection is not None

    @property
    def out_features(self) -> int:
        """C of the heads' logits."""
        return self._heads.out_features

    def forward(self, labels: Tensor) -> Tensor:
        """The weighted sum of the modalities' losses, a scalar.

        Args:
            labels: `(B,)` class indices, or what `loss` takes.

        Raises:
            RuntimeError: before any forward of the model, or with `inject=True`, which adds the gradient already.
            ValueError: if labels are not one for each sample, or lie outside [0, out_features).
            TypeError: if labels are no numbers, or `loss` returns no tensor.
        """
        if self.inject:
            raise RuntimeError(
                "inject=True adds the uni-modal gradients already: leave the objective out of the loss."
            )
        if self.loss is None:
            labels = to_tensor("labels", labels, "class indices (B,)")
        if not any(self.weight.values()):
            device = labels.device if isinstance(labels, Tensor) else torch.device("cpu")
            return torch.zeros((), dtype=torch.float32, device=device)
        features, present = self._live.of_latest()
        losses = [
            self.weight[name] * self._loss(name, z, labels, present.get(name))
            for name, z in features.items()
            if self.weight[name]
        ]
        if torch.is_grad_enabled():
            self._heads.warn_if_untrained()
        total = torch.stack([widened(loss) for loss in losses]).sum()
        if self.own_heads and active_group(self.monitor.group) is not None and total.requires_grad:
            total = total + self._touched(features)
            average = self._heads.average
            total.register_hook(lambda _: average.after_this_backward())
        return total

    def head_of(self, name: str) -> nn.Linear:
        """A modality's own head."""
        return self._heads.of(name)

    def remove(self) -> None:
        """Take every hook off. May be called twice."""
        self.monitor.hooks.outputs.drop(self._live.on_output)
        self._live.forget()
        if self._live.watch is not None:
            self._live.watch.remove()
        if self._injection is not None:
            self._injection.remove()

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load the own heads' weights; a load that fails changes nothing.

        Args:
            state_dict: from `state_dict()`.
            strict: refuse entries that are missing or unknown.
            assign: as in `nn.Module`.

        Raises:
            TypeError: if it is no mapping to tensors.
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
            elif name.endswith("weight"):  # not built yet: of any width
                shape = (self.out_features, value.shape[-1] if value.dim() else 0)
            else:
                shape = (self.out_features,)
            if value.shape != shape or not value.is_floating_point():
                raise ValueError(
                    f"the state's {name!r} should be floating, of shape {shape}. Found {shown(value)}."
                )
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"heads={self.heads!r}, weight={self.weight}, inject={self.inject}"

    def __enter__(self) -> UnimodalObjective:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __getstate__(self) -> dict[str, Any]:
        # The hooks are on the model of this one's monitor, and what they remember of it is no part of a copy.
        return {**self.__dict__, "_live": LiveFeatures(self.monitor), "_injection": None}

    def _loss(self, name: str, features: Tensor, labels: Tensor, present: Tensor | None) -> Tensor:
        samples = len(labels) if isinstance(labels, Tensor) and labels.dim() else None
        logits = self._heads.logits(name, features, samples, present)
        if present is not None:
            rows = present.to(logits.device).nonzero()[:, 0]
            labels = labels.to(logits.device)[rows]
            logits = logits[rows] if len(logits) == samples else logits
        if self.loss is None:
            ignore_index = self.monitor.labels.ignore_index
            return mean_cross_entropy(logits, as_target(labels, logits, name, ignore_index), ignore_index)
        if len(logits) == 0:
            return logits.sum()
        return loss_of(self.loss, logits, labels.to(logits.device))

    def _touched(self, features: Mapping[str, Tensor]) -> Tensor:
        """Zero, with a gradient for the heads that this rank's batch left out: ranks average the same heads."""
        names = [n for n in self.monitor.modalities if n not in features or not self.weight[n]]
        unused = [p for name in names for p in self._heads.of(name).parameters()]
        built = [p.sum() for p in unused if not nn.parameter.is_lazy(p)]
        return 0.0 * torch.stack(built).sum() if built else torch.zeros((), dtype=torch.float32, device="cpu")


class LiveFeatures:
    """Each modality's clean features, of the latest forward with gradients and of the latest one without."""

    def __init__(self, monitor: ModalityMonitor) -> None:
        """Take what `on_output` is shown of the passes of `monitor`."""
        self.monitor = monitor
        self.watch: CallWatch | None = None
        self.forget()

    def of_latest(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Features by modality, and which samples have the modality, where the user told.

        Raises:
            RuntimeError: if there was no forward, or gradients can't go back through the features.
        """
        outputs = self._with if torch.is_grad_enabled() else self._without
        features = {name: held() for name, held in outputs.items()}
        if not features:
            raise RuntimeError(
                "no features came by: call the model on a batch before the objective, with the monitor's hooks on."
                + (" Where the model was called: " + COMPILED if holds_compiled_code() else "")
            )
        for name, z in features.items():
            encoder = self.monitor.encoders[name]
            trained = any(p.requires_grad for p in encoder.parameters())
            if torch.is_grad_enabled() and trained and not z.requires_grad:
                raise RuntimeError(
                    f"the features of {name!r} carry no gradient to their encoder, as under reentrant activation "
                    "checkpointing. Use checkpoint(..., use_reentrant=False), or inject=True."
                )
        present = {} if self._pass is None or not torch.is_grad_enabled() else self._pass.present
        return features, dict(present)

    def forget(self) -> None:
        """Let go of all features."""
        self._with: dict[str, Callable[[], Tensor]] = {}
        self._without: dict[str, Callable[[], Tensor]] = {}
        self._pass: Pass | None = None

    def on_output(self, name: str, output: Any, current: Pass | None) -> None:
        """Keep the features of an encoder's output."""
        if in_backward():
            return
        # A copy: what comes after the encoder may work in place.
        held = self.monitor.features.held(name, output, Tensor.clone)
        if current is None and not torch.is_grad_enabled():
            if name in self._without:
                self._without = {}
            self._without[name] = held
            return
        if current is not self._pass or (current is None and name in self._with):
            self._with, self._pass = {}, current
        self._with[name] = held


def _made_heads(monitor: ModalityMonitor, out_features: int, seed: int | None) -> list[nn.Module]:
    chosen = shared_seed(monitor.group, seed)
    first = next(p for params in monitor.parameters.values() for p in params)
    dtype = torch.promote_types(first.dtype, torch.float32).to_real()
    seeds = [(chosen + i) % 2**63 for i in range(len(monitor.modalities))]
    return [OwnHead(out_features, seed, first.device, dtype) for seed in seeds]


def _checked(
    monitor: ModalityMonitor, out_features: int, heads: str, weight: float | Mapping[str, float]
) -> dict[str, float]:
    """Each modality's weight, if all arguments fit."""
    check_kind("`monitor`", monitor, ModalityMonitor, "a ModalityMonitor")
    check_count("out_features", out_features, at_least=1)
    check_choice("heads", heads, get_args(HeadKind))
    if heads == "shared":
        require_scores(monitor, "UnimodalObjective(heads='shared')")
    weights = dict(weight) if isinstance(weight, Mapping) else dict.fromkeys(monitor.modalities, weight)
    unknown = weights.keys() - set(monitor.modalities)
    if unknown:
        raise ValueError(
            f"`weight` should be given by modality {monitor.modalities}. Found {names_of(unknown)}."
        )
    for value in weights.values():
        check_number("weight", value, at_least=0)
    return {name: float(weights.get(name, 0.0)) for name in monitor.modalities}
