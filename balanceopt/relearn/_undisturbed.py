"""Run a model over data and leave no trace: no mode, no statistic, no random number."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from balanceopt.monitor._outputs import map_tensors
from balanceopt.monitor._replay import random_state_kept

Forward = Callable[[nn.Module, Any], Any]
_LABEL_KEYS = ("labels", "label")


@contextmanager
def undisturbed(model: nn.Module, loader: Any) -> Iterator[None]:
    """Within it the model is in eval mode without gradients; afterwards everything is as it was.

    That is each module's own mode, every buffer, the global random streams, and the generators of the loader and its
    samplers; also after an exception. Modules are set one by one, so that a frozen BatchNorm stays frozen.
    """
    modules = list(model.modules())
    devices = {p.device for p in model.parameters()} | {torch.device("cpu")}
    with ExitStack() as stack:
        stack.callback(_reshard, modules)
        stack.callback(_restore_modes, [(module, module.training) for module in modules])
        stack.callback(_restore_buffers, [(b, b._version, b.clone()) for b in _buffers(model)])
        stack.callback(_restore_generators, [(g, g.get_state()) for g in _generators(loader)])
        for device in devices:
            stack.enter_context(random_state_kept(device))
        stack.enter_context(torch.no_grad())
        for module in modules:
            module.training = False
        yield


def run_batch(model: nn.Module, batch: Any, forward: Forward | None) -> Any:
    """Run one batch through the model; returns its labels.

    Raises:
        TypeError: for a batch of a form that is not known.
    """
    if forward is not None:
        answer = forward(model, batch)
        own = isinstance(answer, Tensor) and answer.dim() == 1 and not answer.is_floating_point()
        return answer if own else labels_of_batch(batch)
    labels = labels_of_batch(batch)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(batch, Mapping):
        rest = {key: value for key, value in batch.items() if key not in _LABEL_KEYS}
        _call_with_mapping(model, map_tensors(lambda x: x.to(device), rest))
    else:
        model(*(map_tensors(lambda x: x.to(device), value) for value in batch[:-1]))
    return labels


def labels_of_batch(batch: Any) -> Any:
    """The last of a tuple or list, or what a mapping has under "labels" or "label".

    Raises:
        TypeError: for anything else.
    """
    if isinstance(batch, Mapping):
        for key in _LABEL_KEYS:
            if key in batch:
                return batch[key]
        found = f"a mapping with {sorted(map(str, batch))}"
    elif isinstance(batch, (tuple, list)) and len(batch) >= 2:
        return batch[-1]
    else:
        found = type(batch).__name__
    raise TypeError(
        f"batches should be (*inputs, labels), or mappings with 'labels' or 'label'. Found {found}. Pass `forward=`: "
        "a function of (model, batch) that runs the model and returns the labels."
    )


def _call_with_mapping(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    try:
        inspect.signature(model.forward).bind(**inputs)
    except TypeError:  # a model that takes the whole batch as one argument
        model(inputs)
    else:
        model(**inputs)


def _buffers(model: nn.Module) -> list[Tensor]:
    return [b for b in model.buffers() if not is_lazy(b)]


def _generators(loader: Any) -> Iterator[torch.Generator]:
    """Generators that iterating a DataLoader draws from."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    holders = (
        loader,
        getattr(loader, "sampler", None),
        batch_sampler,
        getattr(batch_sampler, "sampler", None),
    )
    inner = getattr(getattr(loader, "sampler", None), "sampler", None)
    seen: set[int] = set()
    for holder in (*holders, inner):
        generator = getattr(holder, "generator", None)
        if isinstance(generator, torch.Generator) and id(generator) not in seen:
            seen.add(id(generator))
            yield generator


def _restore_modes(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training


def _restore_buffers(buffers: Iterable[tuple[Tensor, int, Tensor]]) -> None:
    with torch.no_grad():
        for buffer, version, before in buffers:
            if buffer._version != version:
                buffer.copy_(before)


def _restore_generators(states: Iterable[tuple[torch.Generator, Tensor]]) -> None:
    for generator, state in states:
        generator.set_state(state)


def _reshard(modules: Iterable[nn.Module]) -> None:
    """FSDP2's root stays whole after a forward without backward; what changes the weights needs the shards."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    from torch.distributed.fsdp import FSDPModule  # not at import: it takes long, and few need it

    for module in modules:
        if isinstance(module, FSDPModule):
            module.reshard()
