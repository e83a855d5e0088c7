"""Average gradients over ranks once, at the end of a backward: for parameters outside of DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parameter import is_lazy

from balanceopt.distributed import Group, active_group


class GradientAverage:
    """What DistributedDataParallel does for its own parameters.

    Gradients that were averaged before, of earlier micro-batches, are equal on all ranks and stay as they are.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], group: Group) -> None:
        """Average the gradients of `parameters` over `group`."""
        self.parameters = list(parameters)
        self.group = group
        self._task = -1

    def after_this_backward(self) -> None:
        """Do so when the backward that is running ends; every rank has to ask."""
        task = torch._C._current_graph_task_id()
        if active_group(self.group) is None or task == self._task:
            return
        self._task = task
        torch.autograd.Variable._execution_engine.queue_callback(self.run)

    @torch.no_grad()
    def run(self) -> None:
        """Do so now."""
        ranks = active_group(self.group)
        built = [p for p in self.parameters if not is_lazy(p)]
        if ranks is None or not built:
            return
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in built]
        held = torch.tensor([p.grad is not None for p in built], device=parts[0].device)
        flat = torch.cat([*(part.flatten().float() for part in parts), held.float()])
        dist.all_reduce(flat, group=ranks)
        sums = flat.split([*(p.numel() for p in built), len(built)])
        anywhere = sums[-1].tolist()
        for parameter, total, count in zip(built, sums, anywhere, strict=False):
            if count:
                mean = (total / dist.get_world_size(ranks)).view_as(parameter).to(parameter.dtype)
                if parameter.grad is None:
                    parameter.grad = mean
                else:
                    parameter.grad.copy_(mean)
