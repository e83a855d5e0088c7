"""Uni-modal heads: linear heads on each modality's features, or each modality's part of the shared head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from balanceopt._pooling import Pool, pool_features, samples_in
from balanceopt._torch import after_backward, backward_number, parameter_dict, version_of
from balanceopt._undo import Undo
from balanceopt._warnings import warn_user
from balanceopt.distributed import Group, active_group
from balanceopt.functional import without_autocast
from balanceopt.monitor import ModalityMonitor
from balanceopt.objective._share import with_share

HeadKind = Literal["own", "shared"]


class OwnHead(nn.LazyLinear):
    """Linear layer with the width of the first features, and the initial distribution of nn.Linear.

    The weights are a function of the seed: the same on every rank, without numbers of the global random stream.
    """

    def __init__(self, out_features: int, seed: int, device: torch.device, dtype: torch.dtype) -> None:
        """Build a layer with `out_features` logits and lazy parameters."""
        super().__init__(out_features, device=device, dtype=dtype)
        self.seed = seed

    def reset_parameters(self) -> None:
        """Draw weight and bias from U(-1/sqrt(width), 1/sqrt(width))."""
        if self.has_uninitialized_params() or self.in_features == 0:
            return
        generator = torch.Generator("cpu").manual_seed(self.seed)
        bound = self.in_features**-0.5
        with torch.no_grad():
            for parameter in (self.weight, self.bias):
                uniform = torch.rand(parameter.shape, generator=generator, dtype=torch.float32, device="cpu")
                parameter.copy_(bound * (2 * uniform - 1))


def build(head: nn.Linear, width: int) -> None:
    """Initialise a lazy `OwnHead` for features of `width`; weights loaded from a checkpoint stay."""
    if isinstance(head, OwnHead):
        device, dtype = head.weight.device, head.weight.dtype
        width = width if head.has_uninitialized_params() else head.weight.shape[1]
        # Autocast is disabled, because its cache would hold a weight without a graph for the first batch.
        with torch.no_grad(), without_autocast(device.type):
            head(torch.empty(0, width, device=device, dtype=dtype))
        head.in_features = width  # torch before 2.8 leaves this at 0 for weights loaded from a checkpoint


def _versions_of(params: Iterable[nn.Parameter]) -> int:
    return sum(version_of(p) for p in params if not is_lazy(p))


class Heads:
    """Heads of the modalities: separate heads, or each modality's part of the shared head.

    Attributes:
        own: separate heads, in the order of the monitor's modalities; empty where the shared head is used.
        average: average of the separate heads' gradients over ranks.
        share: share of the uni-modal losses' gradient that the shared head gets.
    """

    def __init__(
        self, monitor: ModalityMonitor, own: nn.ModuleList, out_features: int, pool: Pool, share: float
    ) -> None:
        """Use the separate heads in `own`, or the shared head for an empty list."""
        self.monitor = monitor
        self.share = share
        self.own = own
        self.out_features = out_features
        self.pool: Pool = pool
        self.average = GradientAverage(own, monitor.group)
        self._versions: tuple[int, int] | None = None
        self._settled = len(own) == 0

    @property
    def shared(self) -> bool:
        """Whether the shared head makes the uni-modal logits."""
        return len(self.own) == 0

    def of(self, name: str) -> nn.Linear:
        """Return the separate head of the modality `name`."""
        head = self.own[self.monitor.modalities.index(name)]
        assert isinstance(head, nn.Linear)
        return head

    def parameters(self, name: str) -> list[nn.Parameter]:
        """Return the trainable parameters between a modality's features and uni-modal logits."""
        modules = self._shared_modules() if self.shared else [self.of(name)]
        return [p for module in modules for p in module.parameters() if p.requires_grad]

    def warn_if_untrained(self) -> None:
        """Warn once of separate heads that no optimizer holds: a step changed the encoders, and not the heads.

        Called after each loss of the heads, when the previous loss's step is over. Changes in place raise the version
        counters of the parameters.
        """
        if self._settled or torch.compiler.is_compiling():
            return
        encoders = [p for params in self.monitor.parameters.values() for p in params]
        versions = _versions_of(encoders), _versions_of(self.own.parameters())
        before = self._versions = self._versions or versions
        self._settled = versions[1] != before[1]
        graded = any(p.grad is not None for p in self.own.parameters())
        if versions[0] != before[0] and not self._settled and graded:
            self._settled = True
            warn_user(
                "the objective's own heads are not trained: a step moved the encoders, and left the heads, which have "
                "gradients, as they were. Give their parameters to the optimizer too: "
                "optimizer.add_param_group({'params': list(objective.parameters())})."
            )

    def logits(
        self,
        name: str,
        features: Tensor,
        samples: int | None = None,
        present: Tensor | None = None,
        positions: int = 1,
    ) -> Tensor:
        """Return the uni-modal logits of a modality's features, attached to the graphs of features and head.

        Args:
            name: name of the modality.
            features: `(B, ...)` features, or several rows for each sample (frames).
            samples: number of samples B; None if unknown.
            present: bool `(B,)`, samples that have the modality; None if not given by the user.
            positions: number T of positions of a sample that the logits are for, as of features `(B, T, D)`.

        Returns:
            `(B, C)` logits, or `(B, T, C)` for several positions; rows only of samples with the modality where the
            encoder ran only on these.

        Raises:
            ValueError: if the features lack the positions or the width of the head, or the shared head does not have
                `out_features` outputs.
        """
        if positions == 1:
            return self._logits(name, features, samples, present)
        if features.dim() != 3 or features.shape[1] != positions:
            raise ValueError(
                f"the targets have {positions} positions (tokens, pixels) or labels a sample, and the features of "
                f"{name!r}, of shape {tuple(features.shape)}, no vector for each: a head on them gives one prediction "
                "a sample. What works: tokens (B, positions, D) by the monitor's `select=`, or weight 0 for this "
                "modality; for several labels a sample, nn.BCEWithLogitsLoss() as the monitor's `loss=`."
            )
        samples_in(name, features, samples, present, frames=False)  # raises for another number of samples
        rows = self._logits(name, features.flatten(0, 1), features.shape[0] * positions, None)
        by_sample: Tensor = rows.unflatten(0, (-1, positions))
        return by_sample

    def trained_logits(
        self, name: str, features: Tensor, samples: int | None, present: Tensor | None, positions: int
    ) -> Tensor:
        """Return the uni-modal logits of a head that exists.

        Raises:
            RuntimeError: for a separate head that no training pass and no checkpoint has built.
            ValueError: as `logits`.
        """
        if not self.shared and is_lazy(self.of(name).weight):
            raise RuntimeError(
                f"the head of {name!r} was never trained: it is built in the first training pass with the modality, "
                "or by load_state_dict. Train the objective, or load what its state_dict() returned."
            )
        return self.logits(name, features, samples, present, positions)

    def _logits(self, name: str, features: Tensor, samples: int | None, present: Tensor | None) -> Tensor:
        project = self.monitor.features.projections.get(name)
        samples = samples_in(name, features, samples, present, frames=project is not None)
        if self.shared:
            assert self.monitor.unimodal is not None  # checked in the objective's constructor
            undo = Undo()
            with undo, undo:
                self._scale_gradient(undo)
                logits = self.monitor.unimodal.live(name, features, samples)
            if logits.shape[-1] != self.out_features:
                raise ValueError(
                    f"`out_features` should be that of the shared head, {logits.shape[-1]}. "
                    f"Found {self.out_features}."
                )
            return logits
        head = self.of(name)
        vectors = pool_features(features, self.pool, project, samples)
        if isinstance(head, OwnHead):
            build(head.to(vectors.device), vectors.shape[1])
        if vectors.shape[1] != head.in_features:
            raise ValueError(
                f"the features of {name!r} should have width {head.in_features}, for which its head was built. "
                f"Found {vectors.shape[1]}."
            )
        if not torch.is_autocast_enabled(vectors.device.type):
            vectors = vectors.to(head.weight.dtype)
        answer: Tensor = head(vectors)
        return answer

    def _shared_modules(self) -> Iterable[nn.Module]:
        head = self.monitor.head
        return head.values() if isinstance(head, Mapping) else [head] if head else []

    def _scale_gradient(self, undo: Undo) -> None:
        """Replace the shared head's parameters, until `undo`, by tensors that pass on a share of the gradient."""
        if self.share == 1 or not torch.is_grad_enabled():
            return
        for module in (part for head in self._shared_modules() for part in head.modules()):
            slots = parameter_dict(module)
            for key, parameter in list(slots.items()):
                if parameter is not None and parameter.requires_grad:
                    undo.set(slots, key, with_share(parameter, self.share))


class GradientAverage:
    """Average gradients over ranks once, at the end of a backward, as in DistributedDataParallel.

    Averaged gradients of earlier micro-batches are equal on all ranks, so that averaging leaves them unchanged.
    """

    def __init__(self, heads: nn.ModuleList, group: Group) -> None:
        """Average the gradients of `heads` over `group`."""
        self.heads = heads
        self.group = group
        self._backward = -1
        self._all_built = False

    def after_this_backward(self) -> None:
        """Schedule the average for the end of the current backward; a collective of all ranks."""
        number = backward_number()
        if active_group(self.group) is not None and number != self._backward:
            self._backward = number
            after_backward(self.run)

    @torch.no_grad()
    def run(self) -> None:
        """Average the gradients now."""
        ranks = active_group(self.group)
        if ranks is None or not len(self.heads):
            return
        if not self._all_built:
            self._build_together(ranks)
        built = [p for p in self.heads.parameters() if not is_lazy(p)]
        if not built:
            return
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in built]
        held = torch.tensor([p.grad is not None for p in built], dtype=torch.float32, device=parts[0].device)
        flat = torch.cat([*(part.flatten().float() for part in parts), held.float()])
        dist.all_reduce(flat, group=ranks)
        sums = flat.split([*(p.numel() for p in built), len(built)])
        # Read only where this rank lacks a gradient, because reading synchronises the device.
        complete = all(p.grad is not None for p in built)
        anywhere = [1.0] * len(built) if complete else sums[-1].tolist()
        for parameter, total, count in zip(built, sums, anywhere, strict=False):
            if count:
                mean = (total / dist.get_world_size(ranks)).view_as(parameter).to(parameter.dtype)
                if parameter.grad is None:
                    parameter.grad = mean
                else:
                    parameter.grad.copy_(mean)

    def _build_together(self, ranks: dist.ProcessGroup) -> None:
        """Build the heads that any rank has built, as batches of this rank may have lacked the modality."""
        heads = [head for head in self.heads if isinstance(head, nn.Linear)]
        built = [0 if is_lazy(head.weight) else head.weight.shape[1] for head in heads]
        widths = torch.tensor(built, dtype=torch.int64, device=heads[0].weight.device)
        dist.all_reduce(widths, op=dist.ReduceOp.MAX, group=ranks)
        for head, width in zip(heads, widths.tolist(), strict=True):
            if width:
                build(head, width)
        self._all_built = bool(widths.all())
