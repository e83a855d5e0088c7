"""Assignment of parameters to modalities by module and parameter identity, never by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from balanceopt._options import check_kind, names_of, shown
from balanceopt._torch import compiled_module, has_forward

Encoders = Mapping[str, nn.Module | str] | nn.ModuleDict


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's module inside DistributedDataParallel, DataParallel and torch.compile wrappers."""
    while True:
        parallel = isinstance(model, (DistributedDataParallel, DataParallel))
        inner = model.module if parallel else compiled_module(model)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def find_module(model: nn.Module, module: nn.Module | str, role: str) -> nn.Module:
    """Return a module of `model`, given as the module itself or by its dotted name.

    Raises:
        ValueError: if `model` has no such module.
        TypeError: if `module` is neither a module nor a name.
    """
    inner = unwrap(model)
    if isinstance(module, str):
        try:
            return inner.get_submodule(module)
        except AttributeError as error:
            names = [name for name, _ in inner.named_children()]
            raise ValueError(
                f"{role} should name a module of {type(inner).__name__}. Found {module!r}; its children are {names}."
            ) from error
    check_kind(role, module, nn.Module, "a module or the dotted name of one")
    if all(module is not own for own in model.modules()):
        raise ValueError(
            f"{role} should be a module of {type(inner).__name__}. Found a {type(module).__name__} outside of it."
        )
    return module


def resolve_encoders(model: nn.Module, encoders: Encoders) -> dict[str, nn.Module]:
    """Return each modality's encoder as a module of `model`.

    Raises:
        ValueError: for no encoders, an unknown name, a module outside the model, or encoders that overlap.
        TypeError: if an encoder is neither a module nor a name.
    """
    if isinstance(encoders, nn.ModuleDict):
        encoders = dict(encoders.items())
    if not isinstance(encoders, Mapping) or not encoders:
        raise ValueError(
            "`encoders` should map each modality to its module, like {'audio': model.audio_net}. "
            f"Found {shown(encoders)}."
        )
    for name in encoders:
        if not isinstance(name, str) or not name:
            raise ValueError(
                f"`encoders` should be given by name, a string each. Found the name {shown(name)}."
            )
    found = {name: find_module(model, module, f"encoders[{name!r}]") for name, module in encoders.items()}
    for name, encoder in found.items():
        _refuse_container(name, encoder)
        if unwrap(encoder) is unwrap(model):
            raise ValueError(
                f"encoders[{name!r}] should be a part of {type(unwrap(model)).__name__}. Found the model itself."
            )
    for first, a in found.items():
        for second, b in found.items():
            if first != second and any(b is part for part in a.modules()):
                raise ValueError(
                    f"`encoders` should not overlap. Found that the encoder of {second!r} is "
                    f"{'the same module as' if a is b else 'inside'} that of {first!r}."
                )
    return found


def _refuse_container(name: str, encoder: nn.Module) -> None:
    inner = unwrap(encoder)
    if "forward" not in vars(inner) and not has_forward(inner):
        raise ValueError(
            f"encoders[{name!r}] should be a module that the model calls. Found a {type(inner).__name__}, which has no "
            "forward: its parts are called one by one. Put the modality's layers into a module of their own, whose "
            "forward returns its features, or give the part whose output is the features."
        )


def resolve_head(
    model: nn.Module,
    encoders: Mapping[str, nn.Module],
    head: nn.Module | str | Mapping[str, nn.Module | str] | None,
) -> nn.Module | dict[str, nn.Module] | None:
    """Return the joint head, or each modality's head, as modules of `model`; None for no head.

    Raises:
        ValueError: for an unknown name, a module outside the model or inside an encoder, or a mapping whose
            modalities are not the encoders'.
        TypeError: if a head is neither a module nor a name.
    """
    if head is None:
        return None
    if isinstance(head, Mapping):
        if head.keys() != encoders.keys():
            raise ValueError(
                f"`head` should have one head for each of {names_of(encoders)}. Found {names_of(head)}."
            )
        found = {name: find_module(model, head[name], f"head[{name!r}]") for name in encoders}
        for name, own in found.items():
            _refuse_inside(own, {n: e for n, e in encoders.items() if n != name}, f"`head[{name!r}]`")
        return found
    if isinstance(head, nn.Module) and unwrap(head) is unwrap(model):
        return unwrap(model)
    joint = find_module(model, head, "`head`")
    _refuse_inside(joint, encoders, "`head`")
    return joint


def _refuse_inside(head: nn.Module, encoders: Mapping[str, nn.Module], role: str) -> None:
    for name, encoder in encoders.items():
        if any(head is part for part in encoder.modules()):
            raise ValueError(
                f"{role} should come after the encoders. Found a part of the encoder of {name!r}."
            )


def modality_parameters(model: nn.Module, encoders: Encoders) -> dict[str, list[nn.Parameter]]:
    """Return each modality's parameters that no module outside the modality's encoder holds.

    Parameters shared between modalities, or tied to the head, belong to no modality.

    Raises:
        ValueError: if a modality is left without a parameter, and as `resolve_encoders`.
    """
    result: dict[str, list[nn.Parameter]] = {}
    for name, encoder in resolve_encoders(model, encoders).items():
        elsewhere = {
            id(p) for part in modules_outside(model, [encoder]) for p in part.parameters(recurse=False)
        }
        result[name] = [p for p in encoder.parameters() if id(p) not in elsewhere]
        if not result[name]:
            shared = any(True for _ in encoder.parameters())
            raise ValueError(
                f"encoders[{name!r}] should have parameters of its own. Found "
                + ("only parameters shared with other modules." if shared else "none.")
            )
    return result


def modules_outside(model: nn.Module, parts: Iterable[nn.Module]) -> list[nn.Module]:
    """Return every module that is reachable from `model` without passing through one of `parts`."""
    closed = {id(part) for part in parts}
    found: dict[int, nn.Module] = {}
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if id(module) not in closed and id(module) not in found:
            found[id(module)] = module
            waiting.extend(module.children())
    return list(found.values())


def modality_groups(model: nn.Module, encoders: Encoders, **defaults: Any) -> list[dict[str, Any]]:
    """Make an optimizer's parameter groups, one for each modality and one for the rest.

    Each modality's group has `"modality": name`; the last group has `"modality": None` for every other parameter
    (left out when empty). Every parameter of `model` is in exactly one group, in the model's order. Parameters
    shared between modalities, or tied to a module outside the encoders (a head), are in the last group.

    Args:
        model: the whole model.
        encoders: each modality's encoder, as a module of `model` or its dotted name.
        **defaults: options of every group, such as `lr` or `weight_decay`.

    Returns:
        Parameter groups for any `torch.optim.Optimizer`.

    Raises:
        ValueError: for an unknown name, a module outside the model, encoders that overlap, an encoder that shares
            all of its parameters or has none, or an option named `params` or `modality`.
        TypeError: if `model` is not a module, or an encoder neither a module nor a name.

    Example:
        >>> import torch
        >>> model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 3), "b": torch.nn.Linear(2, 3)})
        >>> [(g["modality"], len(g["params"])) for g in modality_groups(model, {"a": model["a"]}, lr=0.1)]
        [('a', 2), (None, 2)]

    Reference:
        The published scripts match parameter names instead; see docs/concepts.md.
    """
    check_kind("`model`", model, nn.Module, "the model, a torch.nn.Module")
    reserved = {"params", "modality"} & defaults.keys()
    if reserved:
        raise ValueError(f"`defaults` should not set {sorted(reserved)}: they are made from `encoders`.")
    own = modality_parameters(model, encoders)
    tagged = {id(p) for parameters in own.values() for p in parameters}
    groups = [{"params": parameters, "modality": name, **defaults} for name, parameters in own.items()]
    rest = [p for p in model.parameters() if id(p) not in tagged]
    if rest:
        groups.append({"params": rest, "modality": None, **defaults})
    return groups
