"""Detection of backwards that leave gradients in parameters, and of gradients cleared before the next backward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from weakref import ref

from torch import nn
from torch.autograd.graph import get_gradient_edge

from balanceopt._sharding import is_sharded
from balanceopt._torch import backward_number, running_node, will_run

Head = nn.Module | Mapping[str, nn.Module] | None


class Traces:
    """Ask autograd, at the gradient of the logits, whether the running backward reaches parameters."""

    def __init__(self, model: nn.Module, encoders: Mapping[str, nn.Module], head: Head) -> None:
        """Prepare to search the parameters, the likeliest first: of heads, encoders, then the rest of the model."""
        self._model = model
        heads = head.values() if isinstance(head, Mapping) else [head]
        self._parts = [*(h for h in heads if h is not None), *encoders.values(), model]
        self._latest: ref[nn.Parameter] | None = None
        self._backward = -1

    def gone(self) -> bool:
        """Tell whether gradients of an earlier backward have been set to None since, as zero_grad does."""
        parameter = None if self._latest is None else self._latest()
        return parameter is not None and parameter.grad is None and self._backward != backward_number()

    def left(self) -> bool:
        """Tell whether the running backward reaches a parameter, unlike an attack's, which goes to inputs only.

        `torch.autograd.grad` to parameters counts, since the loop may set `.grad` itself.
        """
        latest = None if self._latest is None else self._latest()
        self._latest, self._backward = None, backward_number()
        trainable = False
        for parameter in self._likely(latest):
            if not parameter.requires_grad or nn.parameter.is_lazy(parameter):
                continue
            if is_sharded(parameter):  # the graph's leaves are other tensors (FSDP2)
                return True
            trainable = True
            reached = _reached(parameter)
            if reached is not False:
                self._latest = ref(parameter) if reached else None
                return True
        # Other tensors may replace the parameters in the graph, as under torch.func.functional_call.
        return trainable and not self._in_graph()

    def _likely(self, latest: nn.Parameter | None) -> Iterator[nn.Parameter]:
        if latest is not None:
            yield latest
        for module in self._parts:
            yield from module.parameters()

    def _in_graph(self) -> bool:
        """Tell whether any of the model's parameters is in the graph of the logits."""
        params = {id(p) for p in self._model.parameters()}
        nodes: list[Any] = [running_node()]
        seen = set(nodes)
        while nodes:
            node = nodes.pop()
            if id(getattr(node, "variable", None)) in params:
                return True
            new = {before for before, _ in getattr(node, "next_functions", ()) if before is not None} - seen
            seen |= new
            nodes += new
        return False


def _reached(parameter: nn.Parameter) -> bool | None:
    """Tell whether the running backward adds to a parameter's `.grad`; None under `torch.autograd.grad`."""
    node = get_gradient_edge(parameter).node
    try:
        return will_run(node)
    except RuntimeError:  # the leaf is an input of torch.autograd.grad
        return None
