"""TotalCorrelationLoss: TCMax's loss on the logits of the model's own head, over ranks too."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from balanceopt._options import check_flag, check_kind, check_number, to_tensor
from balanceopt.distributed import Group, active_group, concatenate_over_ranks, rank_in
from balanceopt.functional import CorrelationSums, check_class_indices, correlation_sums, total_correlation
from balanceopt.monitor import ModalityMonitor
from balanceopt.objective._additive import additive_logits, check_classes, logits_by_sample
from balanceopt.objective._base import Objective


class TotalCorrelationLoss(Objective):
    r"""TCMax: maximise the total correlation of all modalities' features and the label.

    $$L = \log \sum_y \prod_m \sum_j \exp s^m_{j, y} - \frac{1}{B} \sum_i \sum_m s^m_{i, y_i} - \log B$$

    with each modality's part s of the logits of the latest forward, on clean features (before any drop). It takes the
    place of cross-entropy, or of a part of it: `loss = (1 - w) * criterion(logits, labels) + objective(labels)`. The
    joint samples are told apart from all combinations of one sample's features with another one's, and not from other
    classes alone.

    Each call is a batch of its own: with accumulation each micro-batch. Over ranks the combinations are of the whole
    batch: every rank calls it equally often and gets the same loss, and the mean over ranks of the gradients, as
    DistributedDataParallel and `fully_shard` make it, is that of the whole batch on one rank. Without gradients
    (validation) there is no communication.

    A sample that lacks a modality (`monitor.observe(labels, present=...)`) has the logits 0 for it; samples whose label
    is the monitor's `ignore_index` do not count. Keep a reference to the objective: garbage collection removes its
    hooks.

    Args:
        monitor: a `ModalityMonitor` on the model, with a linear head over concatenated features or a head for each
            modality, whose logits are added.
        weight: factor w on the loss, >= 0; at 0 the loss is a plain 0.
        group_negatives: combine the features of all ranks of the monitor's group; False for each rank's own alone.

    Raises:
        ValueError: for an option outside its range; for a monitor without a head, of another loss than cross-entropy,
            or of a fusion whose logits are no sum over modalities, which may show in the first call only.
        TypeError: if `monitor` is no `ModalityMonitor`.

    Example:
        >>> import balanceopt as bo
        >>> model = torch.nn.ModuleDict({m: torch.nn.Linear(2, 3) for m in ("a", "b")})
        >>> model["head"] = torch.nn.Linear(6, 5)
        >>> monitor = bo.ModalityMonitor(model, {"a": "a", "b": "b"}, head="head")
        >>> bo.TotalCorrelationLoss(monitor)
        TotalCorrelationLoss(weight=1, group_negatives=True)

    Reference:
        Yu et al., Multimodal Classification via Total Correlation Maximization, ICLR 2026; docs/methods/tcmax.md.
    """

    def __init__(
        self, monitor: ModalityMonitor, *, weight: float = 1.0, group_negatives: bool = True
    ) -> None:
        check_kind("`monitor`", monitor, ModalityMonitor, "a ModalityMonitor")
        check_number("weight", weight, at_least=0)
        check_flag("group_negatives", group_negatives)
        check_classes(monitor, "the loss is over combinations of features with one class")
        additive_logits(monitor, "TotalCorrelationLoss")
        super().__init__(monitor)
        self.weight = float(weight)
        self.group_negatives = group_negatives
        self._hook(uncalled="it is not in the total correlation")

    def forward(self, labels: Tensor) -> Tensor:
        """Return the weight times the loss of the latest forward, a scalar in float32 or wider.

        Args:
            labels: class indices `(B,)`.

        Raises:
            RuntimeError: before any forward of the model, or before one has shown how features become the head's input.
            ValueError: if the labels are no class indices, or not one for each sample; for any fusion whose logits are
                no sum over modalities.
            TypeError: if labels are no numbers.
        """
        target = to_tensor("labels", labels, "class indices (B,)")
        check_class_indices(target)
        if not self.weight:
            return torch.zeros((), dtype=torch.float32, device=target.device)
        sums = correlation_sums(self._logits(len(target)), target, self.monitor.labels.ignore_index)
        group = self.monitor.group if self.group_negatives and torch.is_grad_enabled() else False
        return self.weight * _over_ranks(sums, group)

    def extra_repr(self) -> str:
        """Return the options for `repr`."""
        return f"weight={self.weight:g}, group_negatives={self.group_negatives}"

    def _logits(self, size: int) -> list[Tensor]:
        """Return each modality's logits `(B, C)`, attached to the graph; 0 for samples that lack the modality."""
        features, present, samples = self._live.of_latest()
        if samples is not None and size != samples:
            raise ValueError(f"`labels` should have one entry for each of {samples} samples. Found {size}.")
        unimodal = additive_logits(self.monitor, "TotalCorrelationLoss")
        rows = {
            name: logits_by_sample(self.monitor, unimodal, name, z, size, present.get(name))
            for name, z in features.items()
        }
        absent = torch.zeros_like(next(iter(rows.values())))
        return [rows.get(name, absent) for name in self.monitor.modalities]


def _over_ranks(sums: CorrelationSums, group: Group) -> Tensor:
    """Return the loss of all ranks' rows, with a gradient to this rank's, from one collective of M x C + 2 numbers.

    The gradient is multiplied by the number of ranks, because what averages gradients divides by it.
    """
    ranks = active_group(group)
    if ranks is None:
        return total_correlation(sums)
    world = dist.get_world_size(ranks)
    numbers = torch.cat([sums.log_sums.flatten(), torch.stack([sums.label_sum, sums.samples])])
    by_rank = list(concatenate_over_ranks(numbers.detach().unsqueeze(0), [1] * world, group).unbind())
    by_rank[rank_in(group)] = numbers
    table = torch.stack(by_rank)
    log_sums = table[:, :-2].logsumexp(0).view_as(sums.log_sums)
    loss = total_correlation(CorrelationSums(log_sums, table[:, -2].sum(), table[:, -1].sum()))
    if loss.requires_grad:
        loss.register_hook(lambda gradient: world * gradient)
    return loss
