"""Whether a backward leaves gradients in parameters, and whether they are still there when the next one begins."""

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
    """Ask autograd, at the gradient of the logits, for the parameters that the backward under way goes on to."""

    def __init__(self, model: nn.Module, encoders: Mapping[str, nn.Module], head: Head) -> None:
        """Look at one parameter after the other, the likeliest first."""
        self._model = model
        heads = head.values() if isinstance(head, Mapping) else [head]
        self._parts = [*(h for h in heads if h is not None), *encoders.values(), model]
        self._latest: ref[nn.Parameter] | None = None
        self._backward = -1

    def gone(self) -> bool:
        """Whether the gradients that an earlier backward left were cleared since: by `None`, as zero_grad does."""
        parameter = None if self._latest is None else self._latest()
        return parameter is not None and parameter.grad is None and self._backward != backward_number()

    def left(self) -> bool:
        """Whether the backward under way goes to a parameter; it does not where an attack asks for the inputs' alone.

        `torch.autograd.grad` to parameters counts: the loop sets their `.grad` itself.
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
        # Other tensors may stand for the parameters in the graph, as torch.func.functional_call has it.
        return trainable and not self._in_graph()

    def _likely(self, latest: nn.Parameter | None) -> Iterator[nn.Parameter]:
        if latest is not None:
            yield latest
        for module in self._parts:
            yield from module.parameters()

    def _in_graph(self) -> bool:
        """Whether any of the model's parameters is in the graph that the logits came from."""
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
    """Whether the running backward adds to the parameter's gradient; None where it returns it to a caller."""
    node = get_gradient_edge(parameter).node
    try:
        return will_run(node)
    except RuntimeError:  # a leaf that torch.autograd.grad was asked for
        return None
