"""Initial weights of the encoders, copied before training, and re-initialisation towards them."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.weak import WeakTensorKeyDictionary

from balanceopt._options import check_kind, names_of, shown
from balanceopt._sharding import local_like, local_part, sharded_like
from balanceopt._torch import WRAPPER_NAMES
from balanceopt._undo import Before, Undo, optimizers_in
from balanceopt._warnings import warn_user
from balanceopt.functional import soft_reinit_
from balanceopt.monitor import ModalityMonitor

OptimizerState = Literal["keep", "reset"]


# Names of weight copies in optimizers' states, which have to move too: slow weights of Lookahead and Ranger
# (torch_optimizer, pytorch_optimizer, timm, the author's), Schedule-Free's z, ASGD's average, float32 master weights.
_COPIES = frozenset(
    {"slow_param", "slow_params", "slow_buffer", "slow_weights", "lookahead_slow_buff", "cached_params"}
    | {"z", "ax", "master_param", "master_params"}
)


class InitialWeights:
    """Copies of the parameters that belong to one encoder alone, keyed by parameter identity.

    A parameter that is frozen or not built yet (lazy modules) is copied at the first forward that finds it trainable
    and built, before any step can have changed it. Parameters added to the model later have no initial value.

    Args:
        monitor: the monitor with the model's encoders.
        device: device of the copies; None for each parameter's device.
    """

    def __init__(self, monitor: ModalityMonitor, device: torch.device | str | None) -> None:
        self.monitor = monitor
        self.device = None if device is None else _checked_device(device)
        # None marks a parameter that is still to be copied.
        self._values: MutableMapping[Tensor, Tensor | None] = WeakTensorKeyDictionary()
        for parameter in self._by_dotted_name().values():
            self._values[parameter] = None
        self._warn_of_shared()
        self.take()

    @property
    def waiting(self) -> bool:
        """Whether some parameters are still to be copied."""
        return any(value is None for value in self._values.values())

    @property
    def nbytes(self) -> int:
        """Memory of the copies in bytes."""
        return sum(v.numel() * v.element_size() for v in self._values.values() if v is not None)

    def parameters(self) -> dict[str, dict[str, nn.Parameter]]:
        """Return each modality's current parameters by dotted name."""
        names = {id(p): _clean(n) for n, p in reversed(list(self.monitor.model.named_parameters()))}
        return {m: {names[id(p)]: p for p in params} for m, params in self.monitor.parameters.items()}

    def take(self) -> None:
        """Copy the waiting parameters that have become built and trainable."""
        for parameter, value in list(self._values.items()):
            if value is None and parameter.requires_grad and not is_lazy(parameter):
                self._values[parameter] = self.copy_of(local_part(parameter.detach()), parameter)

    def give(self, state: Mapping[str, Any]) -> None:
        """Replace the copies by the user's values: the model's state dict, or each encoder's by modality.

        Raises:
            ValueError: if a trainable parameter is missing in `state`, or has another shape.
        """
        given = self._by_name(state)
        current = self._by_dotted_name()
        missing = [name for name, p in current.items() if name not in given and p.requires_grad]
        if missing:
            raise ValueError(
                f"`initial` should hold every trainable parameter of the encoders. Missing: {missing}."
            )
        self._set({name: value for name, value in given.items() if name in current}, current)

    def state(self) -> dict[str, Tensor | None]:
        """Return the copies by name for a checkpoint, sharded like the parameters; None where there is no copy."""
        values = {name: (p, self._values.get(p)) for name, p in self._by_dotted_name().items()}
        later = {name: None for name, (p, _) in values.items() if p not in self._values}
        return later | {name: sharded_like(v, p) for name, (p, v) in values.items() if v is not None}

    def check(self, state: Mapping[str, Tensor | None]) -> None:
        """Check that a checkpoint's initial weights belong to this model.

        Raises:
            ValueError: if names or shapes differ.
            TypeError: if `state` is not a mapping to tensors.
        """
        check_kind("the state's initial weights", state, Mapping, "a mapping from name to tensor")
        current = self._by_dotted_name()
        copied = {name for name, p in current.items() if self._values.get(p) is not None}
        unknown, missing = state.keys() - current.keys(), copied - state.keys()
        if unknown or missing:
            raise ValueError(
                f"the state should hold this model's initial weights. Unknown: {names_of(unknown)}; missing: "
                f"{names_of(missing)}."
            )
        _check_shapes(state, current)

    def load(self, state: Mapping[str, Tensor | None]) -> None:
        """Replace the copies by a checkpoint's initial weights, which `check` has checked."""
        self._set(state, self._by_dotted_name())

    def starts(self, current: Mapping[str, nn.Parameter]) -> list[tuple[nn.Parameter, Tensor]]:
        """Pair each trainable parameter with this rank's part of the parameter's initial value."""
        built = {name: p for name, p in current.items() if p.requires_grad and not is_lazy(p)}
        values = {name: self._values.get(p) for name, p in built.items()}
        unknown = [name for name, value in values.items() if value is None]
        if unknown:
            warn_user(
                f"parameters {unknown} came after the scheduler was built: there is no initial value for them, and "
                "they are left as they are."
            )
        return [(built[n], local_like(v, built[n])) for n, v in values.items() if v is not None]

    def _by_dotted_name(self) -> dict[str, nn.Parameter]:
        """Return the parameters of all modalities by dotted name."""
        return {name: p for params in self.parameters().values() for name, p in params.items()}

    def _set(self, state: Mapping[str, Tensor | None], current: Mapping[str, Tensor]) -> None:
        _check_shapes(state, current)
        copies = {}
        for name, value in state.items():
            if value is not None:
                value = self.copy_of(local_like(value.detach(), current[name]), current[name])
            copies[name] = value
        for name, value in copies.items():
            self._values.pop(current[name], None)
            if value is not None:
                self._values[current[name]] = value

    def copy_of(self, value: Tensor, like: Tensor) -> Tensor:
        """Copy a value to the device of the initial weights; `like` is the value's parameter."""
        return value.detach().to(like.device if self.device is None else self.device, copy=True)

    def _by_name(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """Convert the user's values, in either form, to a mapping by dotted name in the model."""
        by_modality = set(state) <= set(self.monitor.modalities)
        if not by_modality or not all(isinstance(values, Mapping) for values in state.values()):
            return {_clean(name): value for name, value in state.items()}
        prefixes = {id(part): name for name, part in self.monitor.model.named_modules()}
        given = {}
        for modality, values in state.items():
            prefix = prefixes[id(self.monitor.encoders[modality])]
            for name, value in values.items():
                given[_clean(f"{prefix}.{name}" if prefix else name)] = value
        return given

    def _warn_of_shared(self) -> None:
        unshared = {id(p) for params in self.monitor.parameters.values() for p in params}
        encoders = self.monitor.encoders.items()
        shared = {m: sum(id(p) not in unshared for p in encoder.parameters()) for m, encoder in encoders}
        if any(shared.values()):
            counts = ", ".join(f"{modality}: {count}" for modality, count in shared.items() if count)
            warn_user(
                f"some of the encoders' parameters are shared with other modules ({counts}): no single strength would "
                "be right for them, and re-learning leaves them as they are."
            )


@torch.no_grad()
def reinitialise(
    undo: Undo,
    strength: Mapping[str, float],
    initial: InitialWeights,
    optimizer: torch.optim.Optimizer,
    optimizer_state: OptimizerState,
) -> None:
    """Move each modality's encoder towards the initial weights by the modality's strength, in place.

    Weight copies in the state of the optimizer, or of an inner one, move too, because the next step may start from
    them. `undo` gets the steps that restore all, with copies of all moved tensors on the initial weights' device.
    """
    holders = {id(o.state): o for o in optimizers_in(optimizer)}.values()  # a wrapper shares its base's state
    moves: dict[int, tuple[Tensor, Tensor, float]] = {}
    forgotten: list[tuple[torch.optim.Optimizer, Tensor]] = []
    for modality, params in initial.parameters().items():
        alpha = strength.get(modality, 0.0)
        for parameter, start in initial.starts(params) if alpha > 0 else ():
            states = [(o, o.state[parameter]) for o in holders if parameter in o.state]
            copies = [value for _, state in states for key, value in state.items() if key in _COPIES]
            for tensor in (parameter, *copies):
                moves[id(tensor)] = (local_part(tensor.detach()), start, alpha)
            forgotten += [(o, parameter) for o, state in states if state.keys() - _COPIES]
    targets = [target for target, _, _ in moves.values()]
    undo.note(Before(optimizer).restore)
    undo.note(partial(_put_back, targets, [initial.copy_of(target, target) for target in targets]))
    soft_reinit_(targets, [start for _, start, _ in moves.values()], [alpha for *_, alpha in moves.values()])
    if optimizer_state == "reset":
        for holder, owner in forgotten:
            _forget(holder, owner)


def _put_back(targets: list[Tensor], values: list[Tensor]) -> None:
    with torch.no_grad():
        for target, value in zip(targets, values, strict=True):
            target.copy_(value)


def _forget(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
    """Reset an optimizer's state of a parameter to the state before the first step."""
    state = optimizer.state[parameter]
    if isinstance(optimizer, torch.optim.Adagrad):  # Adagrad makes its state in the constructor only
        first = optimizer.defaults["initial_accumulator_value"]
        state.update(step=torch.zeros_like(state["step"]), sum=torch.full_like(state["sum"], first))
    else:
        del optimizer.state[parameter]


def _checked_device(device: torch.device | str) -> torch.device:
    try:
        return torch.device(device)
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"`snapshot_device` should be a device such as 'cpu', or None. Found {shown(device)}."
        ) from error


def _check_shapes(state: Mapping[str, Tensor | None], current: Mapping[str, Tensor]) -> None:
    for name, value in state.items():
        if value is None:
            continue
        check_kind(f"the initial value of {name!r}", value, Tensor, "a tensor")
        tensor = current[name]
        if not is_lazy(tensor) and value.shape != tensor.shape:
            raise ValueError(
                f"the initial value of {name!r} should have shape {tuple(tensor.shape)}. Found {tuple(value.shape)}."
            )


def _clean(name: str) -> str:
    for part in WRAPPER_NAMES:
        name = name.replace(part, "")
    return name.removeprefix("module.")  # DistributedDataParallel adds this prefix
