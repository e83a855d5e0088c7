"""Checks that raise for optimizers and gradients that can't be modulated, and name the alternative."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch

from balanceopt._method import Method
from balanceopt._options import check_flag, check_kind, check_seed
from balanceopt._sharding import is_sharded
from balanceopt._torch import is_flattened, steps_in_backward
from balanceopt._undo import optimizers_in
from balanceopt._warnings import warn_user
from balanceopt.modality import unwrap
from balanceopt.modulation import Modulation, Slot
from balanceopt.monitor import ModalityMonitor, require_scores

# The engine of each modulated optimizer, held weakly so that an engine ends with its wrapper.
_ENGINE_OF: WeakKeyDictionary[torch.optim.Optimizer, ref[Any]] = WeakKeyDictionary()


def claim(engine: object, optimizer: torch.optim.Optimizer, modulations: Iterable[Modulation]) -> None:
    """Record `engine` as the engine of an optimizer and of `modulations`."""
    _ENGINE_OF[optimizer] = ref(engine)
    for modulation in modulations:
        modulation.engine = ref(engine)


def release(optimizer: torch.optim.Optimizer, modulations: Iterable[Modulation]) -> None:
    """Clear the engine of an optimizer and of modulations, so that another engine can use both."""
    _ENGINE_OF.pop(optimizer, None)
    for modulation in modulations:
        modulation.engine = None


def refuse_modulated(optimizer: torch.optim.Optimizer) -> None:
    """Raise for an optimizer that is modulated already, itself or an optimizer inside it.

    Raises:
        ValueError: saying what to do instead.
    """
    for inner in optimizers_in(optimizer):
        engine = _ENGINE_OF.get(inner)
        if engine is not None and engine() is not None:
            raise ValueError(
                f"this {type(optimizer).__name__} is modulated already, by a ModulatedOptimizer or by attach. Call "
                "that one's remove() first. Several methods go into one wrapper: "
                "ModulatedOptimizer(optimizer, monitor, [OGM(), AMSS()])."
            )


def refuse_groups(groups: Sequence[dict[str, Any]]) -> None:
    """Raise for param groups that can't be modulated.

    Raises:
        NotImplementedError: naming the alternative.
    """
    for group in groups:
        refuse_differentiable(group)
        for parameter in group["params"]:
            if steps_in_backward(parameter):
                raise NotImplementedError(
                    "an optimizer that steps inside backward leaves no gradients to modulate. Step it after backward."
                )
            if is_flattened(parameter):
                raise NotImplementedError(
                    "FullyShardedDataParallel (FSDP1) is not supported: its parameters are flat local shards. "
                    "Use torch.distributed.fsdp.fully_shard (FSDP2)."
                )


def refuse_differentiable(group: Mapping[str, Any]) -> None:
    """Raise for a param group with `differentiable=True`.

    Raises:
        NotImplementedError: naming the alternative.
    """
    if group.get("differentiable"):
        raise NotImplementedError(
            "differentiable=True is not supported: gradients are changed in place, and the derivative would be "
            "that of the unmodulated step. Use differentiable=False."
        )


def refuse_shared_gradients(slots: Iterable[Slot]) -> None:
    """Raise for gradients that share memory and so can't be changed in place one by one.

    Raises:
        ValueError: saying what to do instead.
    """
    places: list[tuple[int, int, int, Slot]] = []
    for slot in slots:
        gradient = slot.grad
        if gradient.layout != torch.strided or is_sharded(gradient) or gradient.numel() == 0:
            continue
        span = 1 + sum((n - 1) * stride for n, stride in zip(gradient.shape, gradient.stride(), strict=True))
        if span < gradient.numel():
            raise _no_memory_of_its_own(slot, "an expanded tensor, whose elements share memory")
        memory = gradient.untyped_storage().data_ptr()
        if memory:  # another tensor may lie in the gaps of a strided one: only the first element is certain
            start, size = int(gradient.storage_offset()), int(span) if span == gradient.numel() else 1
            places.append((memory, start * gradient.itemsize, (start + size) * gradient.itemsize, slot))
    places.sort(key=lambda place: place[:3])
    for (memory, _, end, other), (same, start, _, slot) in pairwise(places):
        if memory == same and start < end:
            raise _no_memory_of_its_own(slot, f"memory of the gradient of parameter {other.index}")


def _no_memory_of_its_own(slot: Slot, found: str) -> ValueError:
    return ValueError(
        f"gradients are changed in place, so each should have memory of its own. Found {found}, as the .grad of "
        f"parameter {slot.index} (shape {tuple(slot.parameter.shape)}): set it to a .clone()."
    )


def warn_of_known_defects(optimizer: torch.optim.Optimizer) -> None:
    """Warn of defects of third-party optimizers whose error messages are misleading."""
    kind = type(optimizer)
    if kind.__name__ != "Adafactor" or not kind.__module__.startswith("torch_optimizer."):
        return
    shapes = [tuple(p.shape) for group in optimizer.param_groups for p in group["params"] if p.dim() > 2]
    if shapes:
        warn_user(
            "torch_optimizer's Adafactor can't step parameters of more than two dimensions. "
            f"Found one of shape {shapes[0]}. Use torch.optim.Adafactor."
        )


def steps_others(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer inside `optimizer` has param groups that are separate objects."""
    return any(inner.param_groups is not optimizer.param_groups for inner in optimizers_in(optimizer))


def check_arguments(
    optimizer: torch.optim.Optimizer,
    monitor: ModalityMonitor,
    modulations: Modulation | Sequence[Modulation],
    seed: int | None,
    strict: bool,
) -> list[Modulation]:
    """Return the modulations as a list; raise where optimizer, monitor and modulations are incompatible.

    Raises:
        TypeError: if an argument has another type.
        ValueError: if the optimizer is modulated already, or does not train the monitor's model; or the monitor has no
            head, and a modulation needs scores.
    """
    check_kind("`optimizer`", optimizer, torch.optim.Optimizer, "a torch.optim.Optimizer")
    check_kind("`monitor`", monitor, ModalityMonitor, "a ModalityMonitor")
    chosen = check_modulations(modulations)
    check_seed(seed)
    check_flag("strict", strict)
    refuse_modulated(optimizer)
    for modulation in chosen:
        keeps_state = type(modulation).state_dict is not Method.state_dict
        if keeps_state and modulation.engine is not None and modulation.engine() is not None:
            raise ValueError(
                f"this {type(modulation).__name__} keeps a state, and acts in another optimizer already. Build one for "
                "each optimizer, or call that optimizer's remove() first."
            )
    for modulation in chosen:
        if modulation.needs_scores:
            require_scores(monitor, type(modulation).__name__)
    held = {id(p) for p in unwrap(monitor.model).parameters()}
    if not any(id(p) in held for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            "the optimizer holds none of the monitor's model's parameters. Build the monitor on the model that this "
            "optimizer trains, and both after `fully_shard` or a move that replaces parameters."
        )
    return chosen


def check_modulations(modulations: object) -> list[Modulation]:
    """Return one modulation or several as a list.

    Raises:
        TypeError: if there is no modulation, or an entry has another type.
    """
    several: list[Any] = list(modulations) if isinstance(modulations, (list, tuple)) else [modulations]
    if not several:
        raise TypeError("`modulation` should be a Modulation such as OGM(), or several. Found none.")
    for modulation in several:
        check_kind("`modulation`", modulation, Modulation, "a Modulation such as OGM(), or a list of several")
    return several
